"""`vlmrob eval`."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, cast

import typer

from robustbench_vlm import console
from robustbench_vlm.cards import reader
from robustbench_vlm.cli.images import Images
from robustbench_vlm.cli.options import (
    AsJson,
    BatchSize,
    DataRoot,
    Device,
    Engine,
    batch_size_of,
    comma_separated,
    device_of,
    print_grids,
    print_json,
)
from robustbench_vlm.errors import FAULT, InputError
from robustbench_vlm.models import model_ids

DEFAULT = "tiny"  # suite


def eval_(  # noqa: PLR0913 - one parameter a flag
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Name, folder, weights file, ARCH:TAG, local-dir:DIR; a,b; default: the newest under runs/."
        ),
    ] = None,
    arch: Annotated[
        str, typer.Option(help="What a weights file was made from, e.g. ViT-L-14:openai or local-dir:DIR.")
    ] = "",
    attack: Annotated[
        list[str] | None,
        typer.Option(help="Attack chains, e.g. aa2,pgd20; repeatable; default: autoattack."),
    ] = None,
    suite: Annotated[
        str, typer.Option(help="Suite name or TOML file; default: the protocol's, or tiny.")
    ] = "",
    protocol: Annotated[
        str, typer.Option(help="Evaluate as a paper does: attack, radii, images, prompts, canvas.")
    ] = "",
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="Only these datasets of the suite, e.g. cars,dtd; repeatable. One dataset needs no suite."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Images without a card: class folders, or a .csv, .jsonl or .parquet file."),
    ] = None,
    names: Annotated[Path | None, typer.Option(help="With --data: class names, one a line.")] = None,
    templates: Annotated[
        Path | None, typer.Option(help="With --data: sentences with {c} for the class name, one a line.")
    ] = None,
    columns: Annotated[
        str, typer.Option(help="With --data and a table: image=NAME,label=NAME; default: the usual names.")
    ] = "",
    split: Annotated[
        str, typer.Option(help="With --data: which of its splits; default: the one for testing.")
    ] = "",
    eps: Annotated[str, typer.Option(help="Radii, e.g. 4 or 1,2,4; default: the suite's.")] = "",
    norm: Annotated[str, typer.Option(help="linf, l2 or l1; default: the suite's.")] = "",
    n: Annotated[
        int | None, typer.Option(min=0, help="Images a dataset, 0 for all; default: the suite's.")
    ] = None,
    until: Annotated[
        float | None,
        typer.Option(
            help="Stop a model when the mean's interval is this many points to each side, e.g. 2.5."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results"),
    batch_size: BatchSize = "auto",
    workers: Annotated[
        str,
        typer.Option(
            help="Attack by N workers on this machine, or by ray: those of the cluster RAY_ADDRESS."
        ),
    ] = "",
    save_adversarial: Annotated[
        bool, typer.Option("--save-adversarial", help="Store the adversarial images.")
    ] = False,
    save_evidence: Annotated[
        bool, typer.Option("--save-evidence", help="Store a bundle a result that vlmrob verify can check.")
    ] = False,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out datasets that are not on disk.")
    ] = False,
    engine: Engine = "native",
    mode: Annotated[
        str,
        typer.Option(help="fast, or reference: the noise and schedule of the reference implementation."),
    ] = "fast",
    precision: Annotated[
        str, typer.Option(help="In which attacks see the model: fp32 or bf16. Verdicts are in fp32.")
    ] = "fp32",
    tf32: Annotated[bool, typer.Option("--tf32", help="Let fp32 products round to TF32 (CUDA).")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Attack through torch.compile.")] = False,
    graphs: Annotated[bool, typer.Option("--cuda-graphs", help="Attack by replayed CUDA graphs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would cost, and stop.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 3 when a check of a result failed.")] = False,
    data_root: DataRoot = Path("data"),
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Attack models on the datasets of a suite.

    Finished results are never computed again, and interrupted ones continue when the command is repeated.
    """
    images = Images(data, names, templates, columns, split)
    images.require_consistent(suite=suite, dataset=dataset, protocol=protocol)
    datasets, chains = comma_separated(dataset), comma_separated(attack)
    models = comma_separated(model) or (newest_checkpoint(),)
    _require_models(models, chains)
    from robustbench_vlm.backends.backend import Backend
    from robustbench_vlm.engine.attacked_view import Precision
    from robustbench_vlm.evaluation import estimate, planning
    from robustbench_vlm.evaluation.run import flagged, run_plan

    attacked_in = Precision(cast("Any", precision), tf32=tf32, compiled=compiled, graphs=graphs)
    request = planning.EvalRequest(
        models=models,
        attacks=chains or (() if protocol else ("autoattack",)),
        suite=suite,
        datasets=datasets,
        eps=eps,
        norm=norm,
        n=n,
        results=out,
        data_root=data_root,
        batch_size=batch_size_of(batch_size),
        save_images=save_adversarial,
        save_evidence=save_evidence,
        skip_missing=skip_missing,
        backend=Backend(engine, mode, attacked_in),
        arch=arch,
        protocol=protocol,
        until=until,
        workers=workers,
    )
    with TemporaryDirectory() as scratch:
        if data is not None:
            root = Path(scratch) if dry_run else data_root
            request = replace(request, suite=images.add(root), data_root=root)
        elif not (suite or protocol):
            request = replace(request, suite=default_suite(datasets))
        plan = planning.plan(request, device_of(device))
        if dry_run:  # leaves nothing behind, so what would be rendered or exported counts as there
            for line in estimate.price(plan):
                console.result(line)
            return
    with console.meter() as meter:
        rows = run_plan(plan, meter, console.remark)
    if as_json:
        print_json(rows)
    else:
        print_grids(rows)
        line = shlex.join(["vlmrob", "leaderboard", "--results", str(out), "--suite", plan.request.suite])
        line += reader.as_typed()
        console.remark(f"results in {out}; next: {line}")
    for line in flagged(rows, "fact"):
        console.remark(f"note: {line}")
    failed = flagged(rows, "failed")
    for line in failed:
        console.warning(f"flag: {line}")
    if strict and failed:
        raise typer.Exit(FAULT)


def _require_models(models: tuple[str, ...], chains: tuple[str, ...]) -> None:
    """Refuse an unknown model before torch is imported, unless the chain is not a packaged card.

    Errors in the user's own chain are reported before errors in the name of a model.
    """
    known = [name for name in chains if reader.has("attacks", name)]
    if all(name in known and reader.path("attacks", name).is_relative_to(reader.home()) for name in chains):
        for name in models:
            model_ids.require(name)


def default_suite(datasets: tuple[str, ...]) -> str:
    """The suite to take when none was named: `tiny`, or the one dataset that was named and is not in it.

    Raises:
        InputError: several datasets that no default suite has together.
    """
    known = reader.suite(DEFAULT).datasets
    unknown = [name for name in datasets if not reader.has("datasets", name)]
    outside = [name for name in datasets if reader.shown("datasets", name) not in known]
    if not outside or unknown:
        return DEFAULT
    suites = reader.suites_with(outside[0])
    if len(datasets) > 1:
        do = f"name a suite that has them all: --suite {suites[0] if suites else 'FILE.toml'}"
        do += ", or write it: vlmrob new suite NAME"
        found = f"several datasets without --suite, and not all in {DEFAULT}"
        raise InputError(f"--dataset {','.join(datasets)}", found, "one dataset, or datasets of a suite", do)
    alone = reader.suite(outside[0])
    console.remark(f"no --suite: {outside[0]} alone, eps {','.join(alone.eps)}, n {alone.n}")
    if suites and suites != [alone.name]:
        console.remark(f"suites with {outside[0]}: {', '.join(suites)}; --suite takes their radii and images")
    return alone.name


def newest_checkpoint() -> str:
    """The newest checkpoint folder below runs/, or `tiny`; the choice is printed."""
    found = sorted(Path("runs").rglob("card.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        console.remark("no --model and no checkpoint under runs/: taking the packaged `tiny`")
        return "tiny"
    console.remark(f"no --model: taking the newest checkpoint, {found[-1].parent}")
    return str(found[-1].parent)
