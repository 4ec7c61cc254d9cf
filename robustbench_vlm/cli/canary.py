"""`vlmrob canary`."""

from __future__ import annotations

from typing import Annotated

import typer

from robustbench_vlm import console


def canary(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or a packaged checkpoint.")],
) -> None:
    """Compute the canary of a checkpoint again: its outputs on fixed inputs, written into card.json.

    Loading a checkpoint compares its outputs with the canary, so a change of code or libraries is noticed.
    """
    from robustbench_vlm.models import convert

    console.result(str(convert.add_canary(model)))
