"""`vlmrob list`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustbench_vlm import console
from robustbench_vlm.cli.options import AsJson, DataRoot


def list_(
    what: Annotated[
        str,
        typer.Argument(
            help="defenses, attacks, suites, datasets, models, recipes, protocols, prompts or studies."
        ),
    ],
    as_json: AsJson = False,
    data_root: DataRoot = Path("data"),  # noqa: ARG001 - it is searched for cards when it is read
) -> None:
    """List what can be named on the command line."""
    from robustbench_vlm import catalogue

    if what in ("model", "models"):
        table = catalogue.models()
        if as_json:
            console.result_json(table)
        else:
            columns = ["name", "what it is", *list(table[0])[2:]]
            console.show("models", columns, [list(row.values()) for row in table])
        return
    rows = catalogue.names(what)
    if as_json:
        console.result_json([{"name": name, "title": title} for name, title in rows])
    else:
        console.show(what, ["name", "what it is"], [list(row) for row in rows])
