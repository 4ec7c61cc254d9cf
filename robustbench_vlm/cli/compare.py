"""`vlmrob compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robustbench_vlm import console
from robustbench_vlm.cards import reader
from robustbench_vlm.cli.options import AsJson, Results
from robustbench_vlm.errors import InputError


def compare(
    a: Annotated[
        str, typer.Argument(help="Model name, the first digits of its fingerprint, or its checkpoint folder.")
    ],
    b: Annotated[str, typer.Argument(help="The other model; left out with --published.")] = "",
    results: Results = Path("results"),
    suite: Annotated[str, typer.Option(help="Suite name or TOML file.")] = "tiny",
    published: Annotated[
        bool, typer.Option("--published", help="Show the numbers of papers under the same protocol.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Paired tests of two models on the same images.

    Each dataset, and all images together, get the exact McNemar test; in the line `all images` a dataset
    weighs as much as it has images. The line `mean` tests the difference of the unweighted means.
    """
    from robustbench_vlm.results import compare, result_file

    if published == bool(b):
        raise InputError(
            "compare",
            "neither a second model nor --published, or both",
            "one of the two",
            "type vlmrob compare A B, or vlmrob compare A --published",
        )
    cells = result_file.of_suite(result_file.read(results), reader.suite(suite))
    if published:
        _beside(cells, _key(a), as_json=as_json)
        return
    lines = compare.compare(cells, _key(a), _key(b))
    if as_json:
        console.result_json([line.record for line in lines])
    else:
        title = f"A = {a}, B = {b}; differences in points; {compare.WEIGHTS}"
        console.show(title, [*compare.COLUMNS], [line.texts for line in lines])
        for line in compare.conclusion(lines, a, b):
            console.remark(line)


def _key(model: str) -> str:
    """What results know a model by: the fingerprint of a checkpoint folder, or the name as typed."""
    from robustbench_vlm.models import checkpoint_card

    return checkpoint_card.read_card(Path(model)).sha256 if (Path(model) / "card.json").is_file() else model


def _beside(cells: Any, model: str, *, as_json: bool) -> None:  # noqa: ANN401 - cells, not imported here
    """Print the rows of a model and those that papers published under the same protocol."""
    from robustbench_vlm.results import published

    lines = published.beside(cells, model)
    if as_json:
        console.result_json([dict(zip(published.COLUMNS, line, strict=True)) for line in lines])
    else:
        console.show("measured rows, and copied ones with their source", [*published.COLUMNS], lines)
