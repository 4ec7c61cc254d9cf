"""The verbs about datasets on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustbench_vlm import console


def make(
    suite: Annotated[str, typer.Argument(help="tiny, or a suite to make a generated miniature of.")],
    root: Annotated[
        Path, typer.Option("--root", "--data-root", envvar="VLMROB_DATA", help="Folder of the datasets.")
    ] = Path("data"),
    n: Annotated[int, typer.Option(min=1, help="Images a dataset, for a miniature.")] = 16,
    per_class: Annotated[
        int | None, typer.Option(min=1, help="Images of every class instead, for a miniature.")
    ] = None,
    label_with: Annotated[
        str, typer.Option(help="Model whose own predictions become the labels of a miniature.")
    ] = "",
) -> None:
    """Make the tiny world, or a miniature of a suite with generated images in the real layout."""
    from robustbench_vlm import session

    with console.meter() as meter:
        if suite == "tiny":
            session.make_tiny(root, meter)
        else:
            session.make_miniature(suite, root, n, label_with, meter, per_class)
    console.result(str(root))
