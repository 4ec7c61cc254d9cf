"""`vlmrob study`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robustbench_vlm import console
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.frontier import Frontier
from robustbench_vlm.cards.study import Study
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.cli.options import DataRoot, Device, device_of, require_tiny
from robustbench_vlm.errors import InputError, nearest

if TYPE_CHECKING:
    from robustbench_vlm.studies.frontier.perform import Places
    from robustbench_vlm.studies.task import Resources


def study(  # noqa: PLR0913 - options of a command
    name: Annotated[
        str, typer.Argument(help="frontier, teacher-map, options, efficiency, ablation, or a TOML file.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the runs; studies share it.")] = Path("runs/study"),
    tables: Annotated[
        Path, typer.Option(help="Folder of tables, pages and plots, and of a frontier study's outcomes.")
    ] = Path("leaderboards"),
    seeds: Annotated[int | None, typer.Option(min=1, help="Only the first so many seeds.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Of a frontier study, train only this method; repeatable.")
    ] = None,
    workers: Annotated[
        str,
        typer.Option(help="Train by N workers on this machine, or by ray: those of the cluster RAY_ADDRESS."),
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, and stop.")] = False,
    render: Annotated[
        bool, typer.Option("--render", help="Of a frontier study, write the pages from outcomes alone.")
    ] = False,
    data_root: DataRoot = Path("data"),
    device: Device = "auto",
) -> None:
    """Train every arm of a study with every seed, attack all models, and write the tables and the plot.

    An interrupted study continues when the command is repeated.
    """
    from robustbench_vlm.evaluation.executor import require_workers

    require_workers(workers)
    card = reader.study(name)
    given = [("--method", bool(method)), ("--render", render)]
    if isinstance(card, Frontier):
        if seeds is not None:
            raise InputError("--seeds", f"{card.name} is a frontier study", "seeds as its card says")
        if render and (method or dry_run):
            other = "--method" if method else "--dry-run"
            raise InputError(f"--render {other}", "the pages have all methods", "one of the two options")
    elif refused := [flag for flag, there in given if there]:
        raise InputError(refused[0], f"{card.name} is no frontier study", 'a card with kind = "frontier"')
    from robustbench_vlm.studies.frontier.perform import Places
    from robustbench_vlm.studies.task import Resources

    where = Resources(data_root, "cpu" if dry_run or render else str(device_of(device)), workers)
    _require_shared(workers, {"--out": out, "--tables": tables, "--data-root": data_root})
    places = Places(out, tables)
    if not isinstance(card, Frontier):
        _arms(card, places, where, seeds, dry_run=dry_run)
    elif dry_run:
        _frontier_state(card, places, method or [])
    else:
        _frontier(card, places, where, method or [], render=render)


def _require_shared(workers: str, folders: Mapping[str, Path]) -> None:
    """Refuse folders that the nodes of a cluster could not find.

    Raises:
        InputError: a relative path, which means another folder in another process.
    """
    from robustbench_vlm.evaluation.executor import CLUSTER

    for flag, folder in folders.items():
        if workers == CLUSTER and not folder.is_absolute():
            expected = "a path from the root, on a disk that all nodes have"
            raise InputError(f"{flag} {folder}", f"a relative path, with --workers {CLUSTER}", expected)


def _arms(card: Study, places: Places, where: Resources, seeds: int | None, *, dry_run: bool) -> None:
    """A study of arms: train, attack, write."""
    from robustbench_vlm.studies import findings, render, runner

    todo = runner.runs(card, places.out, seeds)
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
    datasets = {run.recipe.data.dataset for run in todo}
    datasets |= set(reader.read("suites", card.final.suite, Suite).datasets)
    require_tiny(sorted(datasets), where.data_root)
    runner.perform(card, todo, where, console.remark)
    for path in render.write(findings.read(card, todo), places.tables):
        console.result(str(path))


def _frontier_state(card: Frontier, places: Places, methods: list[str]) -> None:
    """List the trainings of a frontier study."""
    from robustbench_vlm.studies.frontier import perform

    _require_methods(card, methods)
    rows = perform.state(card, places, methods)
    console.show(f"study {card.name}", ["method", "seed", "trial", "hyperparameters", "state"], rows)


def _frontier(card: Frontier, places: Places, where: Resources, methods: list[str], *, render: bool) -> None:
    """A frontier study: train and judge, unless the pages alone are asked for; write."""
    from robustbench_vlm.studies.frontier import files, perform

    _require_methods(card, methods)
    if not render:
        require_tiny(perform.datasets(card, places), where.data_root)
        perform.perform(card, places, where, console.remark, methods)
    for path in files.write(card, places):
        console.result(str(path))


def _require_methods(card: Frontier, methods: list[str]) -> None:
    known = [method.name for method in card.method]
    for name in methods:
        if name not in known:
            raise InputError(f"--method {name}", f"no method of study {card.name}", do=nearest(name, known))
