"""`vlmrob study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustbench_vlm import console
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.study import Study
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.cli.options import DataRoot, Device, device_of, require_tiny


def study(
    name: Annotated[str, typer.Argument(help="efficiency, ablation, or a TOML file.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs; studies share it.")] = Path("runs/study"),
    tables: Annotated[Path, typer.Option(help="Folder of the tables and the plot.")] = Path("leaderboards"),
    seeds: Annotated[int | None, typer.Option(min=1, help="Only the first so many seeds.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process of one thread.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, and stop.")] = False,
    data_root: DataRoot = Path("data"),
    device: Device = "auto",
) -> None:
    """Train every arm of a study with every seed, attack all models, and write the tables and the plot.

    An interrupted study continues when the command is repeated.
    """
    card = reader.read("studies", name, Study)
    from robustbench_vlm.studies import findings, render, runner

    todo = runner.runs(card, out, seeds)
    if dry_run:
        rows = [
            [
                run.arm,
                str(run.seed),
                str(run.recipe.optim.steps),
                "done" if done else "to do",
                str(run.folder),
            ]
            for run in todo
            for done in [run.cells(card.final).exists()]
        ]
        console.show(f"study {card.name}", ["arm", "seed", "steps", "state", "folder"], rows)
        return
    where = runner.Resources(data_root, str(device_of(device)), jobs)
    datasets = {run.recipe.data.dataset for run in todo}
    datasets |= set(reader.read("suites", card.final.suite, Suite).datasets)
    require_tiny(sorted(datasets), data_root)
    runner.perform(card, todo, where, console.remark)
    for path in render.write(findings.read(card, todo), tables):
        console.result(str(path))
