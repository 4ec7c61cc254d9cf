"""`vlmrob show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustbench_vlm import console
from robustbench_vlm.cli.options import DataRoot


def show(
    what: Annotated[
        str,
        typer.Argument(help="defense, attack, suite, dataset, model, recipe, protocol, prompts or study."),
    ],
    name: Annotated[str, typer.Argument(help="Its name.")],
    data_root: DataRoot = Path("data"),  # noqa: ARG001 - it is searched for cards when it is read
) -> None:
    """Print all facts about a defense, attack, suite, dataset, model, recipe or study, as JSON."""
    from robustbench_vlm import catalogue

    console.result_json(catalogue.details(what, name))
