"""`vlmrob submit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustbench_vlm import console
from robustbench_vlm.errors import InputError


def submit(
    results: Annotated[list[Path], typer.Argument(help="Folders of vlmrob eval --save-evidence.")],
    licence: Annotated[
        str, typer.Option(help="Licence of the weights: an SPDX identifier, or a sentence; must be answered.")
    ] = "",
    source: Annotated[
        str, typer.Option(help="Where the weights can be had: an address, or `not public`; must be answered.")
    ] = "",
    contact: Annotated[str, typer.Option(help="A name or an address for questions.")] = "",
    out: Annotated[Path, typer.Option(help="Folder to make.")] = Path("submission"),
) -> None:
    """Make the folder of a pull request: results with evidence, rows, model cards and provenance."""
    for flag, answer, example in (
        ("--licence", licence, "MIT"),
        ("--source", source, "https://... or 'not public'"),
    ):
        if not answer.strip():
            raise InputError("submit", f"no {flag}", "an answer", f"type for example {flag} {example}")
    from robustbench_vlm.results import submission

    files = submission.write(results, out, submission.Answers(licence, source, contact))
    for path in files:
        console.result(str(path))
    console.remark(f"next: vlmrob verify {out}, then commit the folder below leaderboards/submissions/")
