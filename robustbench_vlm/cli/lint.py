"""`vlmrob lint`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from robustbench_vlm import console
from robustbench_vlm.cli.options import AsJson
from robustbench_vlm.errors import FAULT


def lint(
    table: Annotated[Path, typer.Argument(help="CSV with a header, or LaTeX file with one tabular.")],
    as_json: AsJson = False,
) -> None:
    """Say which cells of a table of results may not be compared, and why.

    Each row is traced by its method's name and its numbers to what papers printed (`published.csv`). Nothing
    is said about a number whose source was not found, nor about what its source does not state.

    Exits 3 when anything was found, 0 when nothing was.
    """
    from robustbench_vlm.results.lint.report import lint as check

    report = check(table)
    if as_json:
        console.result_json(report)
    else:
        _print(table.name, report)
    if report["findings"]:
        raise typer.Exit(FAULT)


def _print(name: str, report: dict[str, Any]) -> None:
    """The findings as a table, then the sources, then what was not found."""
    found, cells, unmatched = report["findings"], report["matches"], report["unmatched"]
    rows = []
    for finding in found:
        sides = [
            f"{side['is']} [{', '.join(side['rows'])}]" if side["rows"] else side["is"]
            for side in finding["groups"]
        ]
        rows.append([finding["column"], finding["kind"], " | ".join(sides), finding["why"]])
    title = (
        f"{name}: {len(found)} findings; {len(cells)} of {len(cells) + len(unmatched)} numbers have a source"
    )
    if rows:
        console.show(title, ["column", "kind", "which [rows]", "why"], rows)
    else:
        console.result(title)
    sources = {(cell["row"], source["source"]) for cell in cells for source in cell["sources"]}
    if sources:
        console.show(
            "sources that the rows may have", ["row", "source"], [list(pair) for pair in sorted(sources)]
        )
    if unmatched:
        lines = [[cell["row"], cell["column"], cell["text"], cell["why"]] for cell in unmatched]
        console.show("not matched, and not judged", ["row", "column", "cell", "why"], lines)
