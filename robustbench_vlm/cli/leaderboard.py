"""`vlmrob leaderboard`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from robustbench_vlm import console
from robustbench_vlm.cards import reader
from robustbench_vlm.cli import image
from robustbench_vlm.cli.options import AsJson, DataRoot, Results, print_grids, print_json


def leaderboard(
    results: Results = Path("results"),
    suite: Annotated[str, typer.Option(help="Suite name or TOML file.")] = "tiny",
    out: Annotated[Path, typer.Option(help="Folder of the tables.")] = Path("leaderboards"),
    no_bits: Annotated[
        bool, typer.Option("--no-bits", help="Leave the verdicts of single images out of the page.")
    ] = False,
    gallery: Annotated[
        int, typer.Option(min=0, help="Pictures a row in the page, where eval kept images or evidence.")
    ] = 0,
    data_root: DataRoot = Path("data"),
    as_json: AsJson = False,
) -> None:
    """Render leaderboards/<suite>.csv, .md and .html from the results.

    The .html file needs no other file and no network. It holds the verdict of every image, from which it
    computes means, intervals, tests and ranks of the rows and datasets that its reader picks.
    """
    from robustbench_vlm.results import leaderboard
    from robustbench_vlm.results.page.gallery import Gallery

    pictures = Gallery(gallery, partial(image.clean_or_none, data_root=data_root)) if gallery else None
    card = reader.suite(suite)
    rows, files = leaderboard.render(results, card, out, with_bits=not no_bits, gallery=pictures)
    if as_json:
        print_json(rows)
    else:
        print_grids(rows)
    for path in files:
        console.remark(f"written: {path}")
