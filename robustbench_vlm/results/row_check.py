"""Check that the rows of a leaderboard CSV follow from results: they are rendered again and compared."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.errors import DataError, some
from robustbench_vlm.results import contest, leaderboard, result_file
from robustbench_vlm.results.result_file import Result

ENTRY = ("model_id", "checkpoint_sha256", *contest.COLUMNS)
"""Columns that tell the models of a table apart, and the contests in which they stand."""

RANKS = ("rank_low", "rank_high", "tie_group")
"""Columns that depend on all rows of a table: without one result they cannot be made again."""

Key = tuple[str, ...]


@dataclass(frozen=True)
class RowReport:
    """What was found out about the rows of one CSV.

    Attributes:
        path: the CSV.
        rows: how many it has.
        faults: rows that do not follow from the results, and rows that were left out; one sentence each.
        unproven: rows whose results are not at hand.
        incomplete: datasets of the suite that a model lacks; one sentence a model.
    """

    path: Path
    rows: int
    faults: tuple[str, ...]
    unproven: tuple[str, ...]
    incomplete: tuple[str, ...]


def read(path: Path) -> pd.DataFrame:
    """The rows of a leaderboard CSV, as text.

    Raises:
        DataError: no CSV, or one without the columns of a leaderboard.
    """
    try:
        table = pd.read_csv(io.BytesIO(path.read_bytes()), dtype=str, keep_default_na=False)
    except ValueError as error:
        raise DataError(str(path), f"not a CSV ({str(error).splitlines()[0]:.80})", "a leaderboard") from None
    lacking = [name for name in (*ENTRY, "suite", "dataset", "cell_sha256") if name not in table]
    if lacking or not len(table):
        found = f"no column {lacking[0]!r}" if lacking else "no row"
        raise DataError(str(path), found, "a table of vlmrob leaderboard")
    if table.suite.nunique() != 1:
        raise DataError(str(path), f"rows of {table.suite.nunique()} suites", "one suite a file")
    return table


def check(path: Path, results: Iterable[Result]) -> RowReport:
    """Render the rows of a CSV again from results, and compare every entry.

    Models and contests of which the CSV has no row are left out, so a table may have fewer models than the
    folder of results; it may not have fewer datasets of a model.

    Raises:
        DataError: see `read`; or results that cannot share a table.
    """
    stated = read(path)
    suite = reader.suite(stated.suite.iloc[0])
    entries = {_key(row, ENTRY) for row in stated.to_dict("records")}
    listed = {*stated.cell_sha256}
    chosen = [
        result
        for result in result_file.of_suite(results, suite)
        if _entry_of(result, suite) in entries or result.content.sha256 in listed
    ]
    made = _text(leaderboard.csv(leaderboard.table(chosen, suite))) if chosen else stated.iloc[:0]
    known = {_key(row, (*ENTRY, "dataset")): row for row in made.to_dict("records")}
    cells = {result.content.sha256 for result in chosen}
    faults, unproven, seen = [], [], set()
    whole = all(_key(row, (*ENTRY, "dataset")) in known for row in stated.to_dict("records"))
    compared = [column for column in stated if whole or column not in RANKS]
    for row in stated.to_dict("records"):
        key = _key(row, (*ENTRY, "dataset"))
        name = f"{row['model_id']} on {row['dataset']}, {row['norm']} {row['eps']}"
        if key in seen:
            faults.append(f"{name}: the row stands twice")
        elif key not in known and row["cell_sha256"] in cells:
            faults.append(f"{name}: the result of this row is of another model, dataset or contest")
        elif key not in known:
            unproven.append(f"{name}: no result at hand, so no rank of the table was checked")
        else:
            differing = [column for column in compared if row[column] != known[key].get(column, "")]
            texts = [f"{column} is {row[column]}, {known[key].get(column, '')} here" for column in differing]
            faults += [f"{name}: {some(texts)}"] if texts else []
        seen.add(key)
    faults += [
        f"{row['model_id']} on {row['dataset']}, {row['norm']} {row['eps']}: the row was left out"
        for key, row in known.items()
        if key not in seen
    ]
    return RowReport(path, len(stated), tuple(faults), tuple(unproven), tuple(_incomplete(stated, suite)))


def _entry_of(result: Result, suite: Suite) -> Key:
    """The entries `ENTRY` of a result's row, as the CSV spells them."""
    row = _text(leaderboard.csv(leaderboard.table([result], suite))).to_dict("records")[0]
    return _key(row, ENTRY)


def _text(content: bytes) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)


def _key(row: Mapping[object, object], columns: Sequence[str]) -> Key:
    return tuple(str(row[column]) for column in columns)


def _incomplete(stated: pd.DataFrame, suite: Suite) -> Iterable[str]:
    """Models that have no row for a dataset of the suite, in one contest."""
    for (model, *_), group in stated.groupby(list(ENTRY), sort=False):
        lacking = [name for name in suite.datasets if name not in set(group.dataset)]
        if lacking:
            yield f"{model} has no row on {some(lacking)}"
