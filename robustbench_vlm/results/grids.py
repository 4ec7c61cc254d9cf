"""Leaderboard rows for people: one grid a contest, and the Markdown page made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pandas as pd

from robustbench_vlm import safe_text
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.results import contest


def grids(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Title and grid of each contest: models down, datasets across, `clean / robust` in percent.

    The model with the largest mean robust accuracy comes first. `!` marks a number with a flag.
    """
    if rows.empty:
        return
    columns = list(contest.COLUMNS)
    kinds = rows[columns].drop_duplicates()
    alike = Counter(kinds[list(contest.TITLE)].itertuples(index=False, name=None))
    for values, part in rows.groupby(columns, sort=False):
        shared = dict(zip(columns, values, strict=True))
        ambiguous = alike[tuple(shared[name] for name in contest.TITLE)] > 1
        yield contest.table_title(shared, ambiguous=ambiguous), _grid(part)


def _grid(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of one contest as a grid."""
    flagged = rows.flag.map(lambda flag: " !" if flag else "")
    rows = rows.assign(
        entry=rows.clean + " / " + rows.robust + flagged,
        row=rows.model_id + rows.checkpoint_sha256.map(lambda sha: f" ({sha[:6]})"),
        value=rows.robust.astype(float),
    )
    grid = rows.pivot_table(index="row", columns="dataset", values="entry", aggfunc="first", sort=False)
    strength = rows.groupby("row").value.mean().sort_values(ascending=False, kind="stable")
    return grid.loc[strength.index].fillna("")


def markdown(rows: pd.DataFrame, suite: Suite) -> bytes:
    """The page of a suite."""
    code = suite.name.replace("`", "'")
    lines = [
        f"# {safe_text.markdown(suite.title)}",
        "",
        f"Suite `{safe_text.line(code)}` version {suite.version}. Each entry: clean / robust, %.",
        *_per_class_note(rows),
    ]
    for title, grid in grids(rows):
        columns = [safe_text.markdown(str(column)) for column in grid.columns]
        lines += ["", f"## {safe_text.markdown(title)}", "", "| model | " + " | ".join(columns) + " |"]
        lines += ["|---|" + "---|" * len(grid.columns)]
        lines += [
            f"| {safe_text.markdown(str(model))} | " + " | ".join(entries) + " |"
            for model, entries in grid.T.to_dict("list").items()
        ]
    return ("\n".join(lines) + "\n").encode()


def _per_class_note(rows: pd.DataFrame) -> list[str]:
    """A line that names the datasets whose makers report the mean over classes."""
    names = list(dict.fromkeys(rows.dataset[rows.clean_per_class != ""]))
    if not names:
        return []
    listed = safe_text.markdown(", ".join(names))
    where = "columns `clean_per_class` and `robust_per_class` of the CSV"
    return [
        "",
        f"All numbers are top-1. The makers of {listed} report the mean over classes: {where}.",
    ]
