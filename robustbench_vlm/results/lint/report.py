"""The whole check of one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robustbench_vlm.results.lint import judging, matching, records, table


def lint(path: Path) -> dict[str, Any]:
    """Read a table and judge it.

    Args:
        path: `.csv` or `.tex`.

    Returns:
        `table`, the name of the file; `findings` with `kind`, `column`, `why` and `groups` of rows; `matches`
        with the possible sources of each cell; `unmatched` with the cells that were not found, and why.

    Raises:
        InputError: the file is no table that can be read.
    """
    read = table.read(path)
    printed = records.read()
    matches, unmatched = matching.match(read, printed)
    return {
        "table": path.name,
        "findings": [finding.record for finding in judging.judge(read, matches, printed)],
        "matches": [judging.as_json(match, read) for match in matches],
        "unmatched": [
            {
                "row": read.rows[cell.row].label,
                "column": read.column(cell.column),
                "text": cell.text,
                "why": cell.why,
            }
            for cell in unmatched
        ],
    }
