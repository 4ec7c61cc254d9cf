"""`vlmrob canary`."""

from __future__ import annotations

from typing import Annotated

import typer

from robustbench_vlm import console


def canary(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or a packaged checkpoint.")],
) -> None:
    """Take the canary of a checkpoint anew: what it makes of fixed inputs, written into its card.json."""
    from robustbench_vlm.models import convert

    console.result(str(convert.add_canary(model)))
