"""`vlmrob plot`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from robustbench_vlm import console, store
from robustbench_vlm.cards import reader
from robustbench_vlm.cli.options import Results
from robustbench_vlm.errors import InputError


class What(StrEnum):
    """What is drawn."""

    RADIUS = "radius"
    CLEAN_ROBUST = "clean-robust"
    HEATMAP = "heatmap"
    TRAINING = "training"


class Format(StrEnum):
    """Kind of file."""

    SVG = "svg"
    PNG = "png"
    PDF = "pdf"


def plot(
    what: Annotated[
        What,
        typer.Argument(
            help="radius: robust accuracy against it; clean-robust; heatmap: models and datasets; training."
        ),
    ],
    results: Results = Path("results"),
    suite: Annotated[str, typer.Option(help="Suite name or TOML file.")] = "tiny",
    dataset: Annotated[str, typer.Option(help="A dataset or a mean; of radius and clean-robust.")] = "mean",
    run: Annotated[Path | None, typer.Option(help="Folder of the training run; of training.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the figures.")] = Path("figures"),
    kind: Annotated[Format, typer.Option("--format", help="Kind of file.")] = Format.SVG,
) -> None:
    """Draw figures for a paper, one file for each contest: rows of different contests are not comparable."""
    if (what is What.TRAINING) != (run is not None):
        raise InputError(
            f"plot {what.value}",
            "--run" if run else "no --run",
            "--run FOLDER with training, and with nothing else",
            "see vlmrob plot --help",
        )
    from robustbench_vlm.results.figures import board, style, training

    if run is not None:
        figures = {f"training-{store.file_name(run.resolve().name)}": training.figure(run)}
    else:
        from robustbench_vlm.results import leaderboard

        card = reader.suite(suite)
        found = board.drawn(leaderboard.rows_of(results, card), what.value, dataset)
        stem = f"{store.file_name(card.name)}-{what.value}"
        figures = {f"{stem}-{digits}": figure for digits, figure in found.items()}
    for name, figure in figures.items():
        path = out / f"{name}.{kind.value}"
        store.write(path, style.content(figure, kind.value))
        console.result(str(path))
