"""`vlmrob leaderboard`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustbench_vlm import console
from robustbench_vlm.cards import reader
from robustbench_vlm.cli.options import AsJson, Results, print_grids, print_json


def leaderboard(
    results: Results = Path("results"),
    suite: Annotated[str, typer.Option(help="Suite name or TOML file.")] = "tiny",
    out: Annotated[Path, typer.Option(help="Folder of the tables.")] = Path("leaderboards"),
    as_json: AsJson = False,
) -> None:
    """Render leaderboards/<suite>.csv and .md from the results."""
    from robustbench_vlm.results import leaderboard

    rows, files = leaderboard.render(results, reader.suite(suite), out)
    if as_json:
        print_json(rows)
    else:
        print_grids(rows)
    for path in files:
        console.remark(f"written: {path}")
