"""`vlmrob show`."""

from __future__ import annotations

from typing import Annotated

import typer

from robustbench_vlm import console


def show(
    what: Annotated[str, typer.Argument(help="defense, attack, suite, dataset, model, recipe or study.")],
    name: Annotated[str, typer.Argument(help="Its name.")],
) -> None:
    """Print everything that is known about one of them, as JSON."""
    from robustbench_vlm import catalogue

    console.result_json(catalogue.details(what, name))
