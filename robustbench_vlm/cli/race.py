"""`vlmrob race`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robustbench_vlm import console, one_writer
from robustbench_vlm.cli.options import AsJson, BatchSize, DataRoot, Device, device_of

PAIRS = ("A", "B", "images", "only A right", "only B right", "A-B, points", "E", "p (Holm)", "decided")
MODELS = ("model", "images a dataset", "rank")


def race(  # noqa: PLR0913 - one parameter a flag
    model: Annotated[list[str], typer.Argument(help="Names, folders or ARCH:TAG of two models or more.")],
    decide: Annotated[
        bool, typer.Option("--decide", help="Attack until every pair is decided; else only print the price.")
    ] = False,
    attack: Annotated[str, typer.Option(help="Attack chain.")] = "autoattack",
    suite: Annotated[str, typer.Option(help="Suite name or TOML file.")] = "tiny",
    dataset: Annotated[
        list[str] | None, typer.Option(help="Only these datasets of the suite; repeatable.")
    ] = None,
    eps: Annotated[str, typer.Option(help="Radius, e.g. 4; default: the suite's largest.")] = "",
    norm: Annotated[str, typer.Option(help="linf, l2 or l1; default: the suite's.")] = "",
    n: Annotated[
        int | None, typer.Option(min=0, help="Images a dataset at most, 0 for all; default: the suite's.")
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(min=1, help="Images a dataset between two looks; default: the rows of the chain."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results"),
    batch_size: BatchSize = "auto",
    data_root: DataRoot = Path("data"),
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Attack models in turn, in the frozen order of the images, until it is decided which are better.

    With 95 % probability no pair is decided wrongly, however often the race is looked at. An interrupted race
    goes on when the command is repeated, and a finished one is printed again.
    """
    from robustbench_vlm.cards import reader
    from robustbench_vlm.cli.options import batch_size_of, comma_separated
    from robustbench_vlm.evaluation import estimate, planning, sequential
    from robustbench_vlm.evaluation.run import prepared
    from robustbench_vlm.threat import Threat, parse_eps

    chosen = reader.suite(suite)
    request = planning.EvalRequest(
        models=comma_separated(model),
        attacks=(attack,),
        suite=suite,
        datasets=comma_separated(dataset),
        eps=eps or max(chosen.eps, key=lambda text: parse_eps(text, chosen.norm)),
        norm=norm,
        n=n,
        results=out,
        data_root=data_root,
        batch_size=batch_size_of(batch_size),
    )
    plan = planning.plan(request, device_of(device))
    sequential.require_race(plan)
    if not decide:
        for line in estimate.price(plan):
            console.result(line)
        console.remark("nothing was attacked; --decide starts the race")
        return
    with console.meter() as meter, one_writer.locked(out):
        present = prepared(plan, meter, console.remark)
        found = sequential.race(present, block or plan.settings.chains[0].rows, meter, console.remark)
    if as_json:
        console.result_json(record(found))
        return
    threat = Threat(plan.settings.norm, plan.settings.ladder[0])
    title = f"{attack} {threat} on {len(present.datasets)} datasets of {suite}"
    lines = [[str(value) for value in line] for line in _pairs(found)]
    console.show(f"{title}: every pair", [*PAIRS], lines)
    models = zip(found.names, found.images, found.rank_sets, strict=True)
    ranks = [[name, str(n), f"{a}" if a == b else f"{a} to {b}"] for name, n, (a, b) in models]
    console.show(f"{title}: ranks", [*MODELS], ranks)


def _pairs(found: Any) -> list[list[Any]]:  # noqa: ANN401 - a Race, not imported here
    """One line a pair, in the order of `PAIRS`."""
    lines = []
    for pair in record(found)["pairs"]:
        winner = {1: pair["a"], -1: pair["b"], 0: "not decided"}[pair["decided"]]
        numbers = [f"{pair['difference']:+.2f}", f"{pair['e']:.3g}", f"{pair['p']:.3g}"]
        lines.append([pair["a"], pair["b"], pair["images"], pair["only_a"], pair["only_b"], *numbers, winner])
    return lines


def record(found: Any) -> dict[str, Any]:  # noqa: ANN401 - a Race, not imported here
    """A race with numbers as numbers: differences in points, `decided` 1 for A, -1 for B, 0 for neither."""
    import math

    pairs = [
        {
            "a": found.names[i],
            "b": found.names[j],
            "images": int(found.seen[i, j]),
            "only_a": int(found.only[i, j]),
            "only_b": int(found.only[j, i]),
            "difference": 100 * float(found.only[i, j] - found.only[j, i]) / float(found.seen[i, j]),
            "e": math.exp(min(float(found.log_e[i, j]), 700.0)),
            "p": float(found.p[i, j]),
            "decided": int(found.better[i, j]) - int(found.better[j, i]),
        }
        for i in range(len(found.names))
        for j in range(i + 1, len(found.names))
    ]
    models = [
        {"model": name, "images": n, "rank_low": low, "rank_high": high}
        for name, n, (low, high) in zip(found.names, found.images, found.rank_sets, strict=True)
    ]
    return {"pairs": pairs, "models": models}
