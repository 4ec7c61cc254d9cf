"""`vlmrob crosscheck`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustbench_vlm import console
from robustbench_vlm.cards import reader
from robustbench_vlm.cli.options import AsJson, DataRoot, Device, device_of, require_tiny

N = 32  # images, by default: the reference spends its whole budget on every robust one


def crosscheck(  # noqa: PLR0913 - one parameter a flag
    model: Annotated[str, typer.Argument(help="Name, folder, weights file or ARCH:TAG.")],
    arch: Annotated[
        str, typer.Option(help="What a weights file was made from, e.g. ViT-L-14:openai or local-dir:DIR.")
    ] = "",
    dataset: Annotated[str, typer.Option(help="Dataset of the suite; default: its first.")] = "",
    suite: Annotated[str, typer.Option(help="Suite name or TOML file.")] = "tiny",
    attack: Annotated[str, typer.Option(help="Attack chain.")] = "autoattack",
    engine: Annotated[
        list[str] | None,
        typer.Option(help="autoattack or torchattacks, beside native; repeatable; default: all there."),
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="Images.")] = N,
    eps: Annotated[str, typer.Option(help="Radius, e.g. 4; default: the suite's first.")] = "",
    norm: Annotated[str, typer.Option(help="linf or l2; default: the suite's.")] = "",
    seed: Annotated[int | None, typer.Option(help="Of the noise; default: the suite's.")] = None,
    data_root: DataRoot = Path("data"),
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Run all engines on the same images; print where verdicts agree, and what each engine spent."""
    from dataclasses import replace

    from robustbench_vlm.backends.backend import Backend
    from robustbench_vlm.evaluation import crosscheck, planning
    from robustbench_vlm.evaluation.cells import Subject

    chosen = reader.suite(suite)
    request = planning.EvalRequest(
        models=(model,),
        attacks=(attack,),
        suite=suite,
        results=Path("results"),
        data_root=data_root,
        datasets=(dataset or chosen.datasets[0],),
        eps=eps or chosen.eps[0],
        norm=norm,
        n=n,
        arch=arch,
    )
    where = device_of(device)
    plan = planning.plan(request, where)
    settings, (card,) = plan.settings, plan.datasets

    def require(backend: Backend) -> None:
        planning.require_supported(replace(settings, backend=backend), [card])

    backends, lacking = crosscheck.available(engine or [], require)
    for text in lacking:
        console.remark(f"left out: {text}")
    require_tiny([card.name], data_root)
    (split,) = planning.open_data(planning.require_data(plan))
    subject = Subject.of(plan.models[0], split.card, split)
    for line in subject.split.bad:
        console.remark(f"note: {card.name}: left out: {line}")
    noise = replace(settings, seed=settings.seed if seed is None else seed)
    with console.meter() as meter:
        found = crosscheck.run(subject, settings.chains[0], noise, backends, meter)
    if as_json:
        console.result_json(found.record)
        return
    title = f"{found.attack} on {found.model}, {found.dataset}, {found.threat}, seed {found.seed}"
    console.show(title, [*crosscheck.PAIRS], found.agreements)
    console.show("cost, in model calls of the fixed shape", [*crosscheck.RUNS], found.costs)
