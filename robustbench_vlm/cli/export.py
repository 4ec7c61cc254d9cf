"""`vlmrob export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from robustbench_vlm import console
from robustbench_vlm.errors import InputError


class Format(StrEnum):
    """Formats of other programs that results are written in."""

    EVERY_EVAL_EVER = "every-eval-ever"


def export(
    to: Annotated[  # noqa: ARG001 - there is one format so far, and it must be named
        Format, typer.Option(help="Format to write.")
    ],
    results: Annotated[Path, typer.Argument(help="Folder of the results.")] = Path("results"),
    organization: Annotated[str, typer.Option(help="Who ran the evaluation; must be answered.")] = "",
    developer: Annotated[
        str, typer.Option(help="Who made the models that do not name their maker; default: --organization.")
    ] = "",
    out: Annotated[Path, typer.Option(help="Folder that gets data/.")] = Path("export"),
) -> None:
    """Write results in the format of another program, one log a model and contest, and a line an image."""
    if not organization.strip():
        do = "type for example --organization 'University of X'"
        raise InputError("export", "no --organization", "an answer: the format asks who reports", do)
    from robustbench_vlm.results import every_eval_ever

    source = every_eval_ever.Source(organization, developer or organization)
    for path in every_eval_ever.write(results, out, source):
        console.result(str(path))
