"""`vlmrob verify`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from robustbench_vlm import console
from robustbench_vlm.cli.options import AsJson, DataRoot, Device, comma_separated, device_of
from robustbench_vlm.errors import FAULT, InputError

STATES = ("re-attacked", "verified", "unproven", "failed")
COLUMNS = ["model", "dataset", "attack", "threat", "images", "broken", "packed", "survivors", "status"]


def verify(  # noqa: PLR0913 - one parameter a flag
    target: Annotated[Path, typer.Argument(help="Bundle, folder of results, submission or leaderboard CSV.")],
    model: Annotated[
        list[str] | None,
        typer.Option(help="Models at hand, by name or folder; default: those that the results name."),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder of the results of a CSV; default: its folder, or results/.")
    ] = None,
    reattack: Annotated[
        str, typer.Option(help="Share of the survivors that are attacked again, e.g. 2%.")
    ] = "",
    seed: Annotated[int | None, typer.Option(help="By which these are drawn; choose it afterwards.")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep what is found in the folder; its page then shows it.")
    ] = False,
    data_root: DataRoot = Path("data"),
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Check results by their evidence: forward passes over the stored adversarial images.

    Exits 3 when anything that is claimed does not hold.
    """
    if bool(reattack) != (seed is not None):
        found = "--reattack without --seed" if reattack else "--seed without --reattack"
        raise InputError("verify", found, "both or neither", "type for example --reattack 2% --seed 7")
    from robustbench_vlm.evaluation import reattack as again
    from robustbench_vlm.evaluation import verify_folder
    from robustbench_vlm.evaluation.verify import Verifier
    from robustbench_vlm.results import result_file, submission, verification

    own = (target / result_file.FOLDER).is_dir() and not (target / submission.FILE).exists()
    if record and not own:
        raise InputError("verify --record", str(target), "a folder of results of your own evaluations")
    share = again.share_of(reattack) if reattack else None
    near = target.parent if (target.parent / "cells").is_dir() else Path("results")
    wanted = verify_folder.Target.of(target, results or near)
    with TemporaryDirectory() as scratch, console.meter() as meter:
        verifier = Verifier(data_root, Path(scratch), device_of(device), comma_separated(model), meter)
        report = verify_folder.verify(wanted, verifier, share, seed or 0, meter)
    if as_json:
        console.result_json(report.record)
    else:
        _print(report.record)
    if record:
        console.remark(f"written: {verification.write(target, report.checked)}")
    for line in report.faults():
        console.warning(f"fault: {line}")
    if report.faults():
        raise typer.Exit(FAULT)
    if report.drawn is not None and report.drawn.impossible:
        found = "no result can be attacked again here"
        raise InputError(f"verify --reattack {reattack}", found, "results of --engine native in fp32")


def _print(record: dict[str, Any]) -> None:
    """The report as a table, followed by what is not known."""
    rows = []
    for cell in record["cells"]:
        kinds = ", ".join(f"{count} {kind}" for kind, (count, _) in cell["packed"].items())
        known = {**dict.fromkeys(COLUMNS, ""), **cell, "packed": kinds}
        rows.append([str(known[name] or (0 if name == "broken" else "")) for name in COLUMNS])
    counts = [f"{sum(cell['status'] == status for cell in record['cells'])} {status}" for status in STATES]
    console.show(f"{len(rows)} results: {', '.join(counts)}", COLUMNS, rows)
    for table in record["tables"]:
        state = "follow from the results" if table["passed"] else "do not all follow from the results"
        console.result(f"{table['path']}: its {table['rows']} rows {state}")
    drawn = record["reattack"]
    if drawn:
        chances = ", ".join(
            f"{float(share):.0%} of them forged is found with {chance:.0%}"
            for share, chance in drawn["detection"].items()
        )
        many = f"{drawn['drawn']} of {drawn['survivors']} survivors attacked again"
        console.result(f"{many}, seed {drawn['seed']}: {chances}")
        for line in drawn["refused"]:
            console.remark(f"note: {line}")
    for line in record["lacking"]:
        console.remark(f"note: {line}")
    for line in record["unknown"]:
        console.remark(f"not shown: {line}")
