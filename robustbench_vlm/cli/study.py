"""`vlmrob study`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from robustbench_vlm import console
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.study import Study
from robustbench_vlm.cli.options import DataRoot, Device, device_of, require_tiny
from robustbench_vlm.errors import InputError, nearest


def study(  # noqa: PLR0913 - options of a command
    name: Annotated[
        str,
        typer.Argument(
            help="frontier, schedules, options, teacher-map, efficiency, ablation, or a TOML file."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the trainings; studies share it.")] = Path(
        "runs/study"
    ),
    tables: Annotated[Path, typer.Option(help="Folder of outcomes, tables, pages and plots.")] = Path(
        "leaderboards"
    ),
    method: Annotated[
        list[str] | None, typer.Option(help="Train only this method of the study; repeatable.")
    ] = None,
    workers: Annotated[
        str,
        typer.Option(help="Train by N workers on this machine, or by ray: those of the cluster RAY_ADDRESS."),
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the trainings, and stop.")] = False,
    render: Annotated[
        bool, typer.Option("--render", help="Write the pages from outcomes alone, and stop.")
    ] = False,
    data_root: DataRoot = Path("data"),
    device: Device = "auto",
) -> None:
    """Train every method at all its hyperparameters, attack the models, and write tables, page and plot.

    An interrupted study continues when the command is repeated.
    """
    from robustbench_vlm.evaluation.executor import require_workers

    require_workers(workers)
    card, methods = reader.read("studies", name, Study), method or []
    if render and (methods or dry_run):
        other = "--method" if methods else "--dry-run"
        raise InputError(f"--render {other}", "the pages have all methods", "one of the two options")
    _require_methods(card, methods)
    from robustbench_vlm.studies.frontier import files, perform
    from robustbench_vlm.studies.task import Resources

    places = perform.Places(out, tables)
    if dry_run:
        rows = perform.state(card, places, methods)
        console.show(f"study {card.name}", ["method", "seed", "trial", "hyperparameters", "state"], rows)
        return
    if not render:
        where = Resources(data_root, str(device_of(device)), workers)
        _require_shared(workers, {"--out": out, "--tables": tables, "--data-root": data_root})
        require_tiny(perform.datasets(card, places), data_root)
        perform.perform(card, places, where, console.remark, methods)
    for path in files.write(card, places):
        console.result(str(path))


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


def _require_methods(card: Study, methods: list[str]) -> None:
    known = [method.name for method in card.method]
    for name in methods:
        if name not in known:
            raise InputError(f"--method {name}", f"no method of study {card.name}", do=nearest(name, known))
