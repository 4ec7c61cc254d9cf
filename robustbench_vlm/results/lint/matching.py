"""Which printed number each cell of a table is.

A cell matches a record when the method has the same name, the architecture and the dataset do not contradict,
and the value is equal once it is rounded to the digits that the table shows. A row is explained by as few
models of as few papers as possible, since tables are copied row by row. Records that cannot be told apart all
stay, and what is said about a cell later holds for all of them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from decimal import Decimal

from robustbench_vlm.results.lint import names
from robustbench_vlm.results.lint.records import Record
from robustbench_vlm.results.lint.table import Cell, Row, Table, rounding

SPECIFIC = 3
"""Digits of a number that tells a source alone: without another match in its row or a dataset's name."""

NEAR = Decimal(1)  # points; a printed number that is no farther away is named beside one that was not found

Group = tuple[str, str]
"""Paper and model: what one row of a paper's table has."""


@dataclass(frozen=True)
class Match:
    """A cell and the records that it may be, of which there is at least one."""

    row: int
    column: int
    cell: Cell
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Unmatched:
    """A cell that no record explains.

    Attributes:
        why: in words, with the nearest printed number where one is near.
    """

    row: int
    column: int
    text: str
    why: str


def match(table: Table, records: tuple[Record, ...]) -> tuple[list[Match], list[Unmatched]]:
    """The records of every cell with a number, and the cells that were not found or not read."""
    matches: list[Match] = []
    unmatched: list[Unmatched] = []
    for index, row in enumerate(table.rows):
        possible = _of_method(row, records)
        found = _explained(row, table, possible)
        for column, cell in enumerate(row.cells):
            if cell.value is not None and column in found:
                matches.append(Match(index, column, cell, found[column]))
            elif cell.value is not None:
                unmatched.append(Unmatched(index, column, cell.text, _why(table, row, column, possible)))
            elif not cell.missing and _is_number_column(table, column):
                unmatched.append(Unmatched(index, column, cell.text, "not a percentage between 0 and 100"))
    return matches, unmatched


def _is_number_column(table: Table, column: int) -> bool:
    """Whether most of what a column says is numbers."""
    said = [row.cells[column] for row in table.rows if not row.cells[column].missing]
    return 2 * sum(cell.value is not None for cell in said) > len(said)


def _of_method(row: Row, records: tuple[Record, ...]) -> list[Record]:
    """The records that the label of a row may mean."""
    name = names.method(row.label)
    arch = names.architecture(row.label) or names.architecture(row.context)
    # FARE in a table may be FARE2 or FARE4 in the paper; FARE2 is never FARE4
    return [
        record
        for record in records
        if name and name in {record.method, record.method.rstrip("0123456789")}
        if not arch or not record.arch or arch == record.arch
    ]


def _fits(table: Table, row: Row, column: int, record: Record) -> bool:
    """Whether header and row allow a record, its value aside."""
    header = table.header[column]
    named = names.dataset(header) or names.dataset(row.context)
    if named == "mean" and not record.is_mean:
        return False
    if named not in {"", "mean", record.data}:
        return False
    return record.field in names.fields(header)


def agrees(cell: Cell, record: Record) -> bool:
    """Whether a cell is a record's value, at the digits that the cell shows.

    The published file leaves zeros at the end away, so a cell with more digits has to be equal.
    """
    if cell.value is None:
        return False
    return abs(cell.value - record.value) <= (cell.unit if cell.unit >= rounding(record.value) else 0)


def _explained(row: Row, table: Table, possible: list[Record]) -> dict[int, tuple[Record, ...]]:
    """The records of each cell of a row that was found."""
    by_group: dict[Group, dict[int, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for column, cell in enumerate(row.cells):
        for record in possible:
            if agrees(cell, record) and _fits(table, row, column, record):
                by_group[record.paper, record.model][column].append(record)
    found: dict[int, tuple[Record, ...]] = {}
    while True:
        left = {
            group: {column: records for column, records in columns.items() if column not in found}
            for group, columns in by_group.items()
        }
        scores = {group: _score(table, row, columns) for group, columns in left.items() if columns}
        best = max(scores.values(), default=(0, 0))
        groups = [group for group, score in scores.items() if score == best]
        if not groups or not _tells(table, row, groups, left):
            return found
        columns: dict[int, list[Record]] = defaultdict(list)
        for group in groups:
            for column, records in left[group].items():
                columns[column] += _as_labelled(table, row, column, records)
        found |= {column: tuple(records) for column, records in columns.items()}


def _score(table: Table, row: Row, columns: dict[int, list[Record]]) -> tuple[int, int]:
    """How many cells a group explains, and in how many of them attack and radius are those of the header."""
    labelled = sum(
        any(not contradictions(table, row, column, record) for record in records)
        for column, records in columns.items()
    )
    return len(columns), labelled


def _tells(
    table: Table,
    row: Row,
    groups: list[Group],
    left: dict[Group, dict[int, list[Record]]],
) -> bool:
    """Whether what a group explains is more than chance: two numbers that are not 0, or a specific one."""
    cells = [column for column in left[groups[0]] if row.cells[column].value]
    if len(cells) > 1:
        return True
    for column in cells:
        value = row.cells[column].value or Decimal(0)
        digits = len(str(value).replace(".", "").lstrip("0"))
        named = names.dataset(table.header[column]) or names.dataset(row.context)
        if named or (digits > SPECIFIC or (digits == SPECIFIC and len(groups) == 1)):
            return True
    return False


def _as_labelled(table: Table, row: Row, column: int, records: list[Record]) -> list[Record]:
    """Those records whose attack and radius are what the table says; all of them if none is."""
    fitting = [record for record in records if not contradictions(table, row, column, record)]
    return fitting or records


def contradictions(table: Table, row: Row, column: int, record: Record) -> list[tuple[str, str, str]]:
    """What the table says about a robust number and its source says otherwise: kind, table, source."""
    if record.field == "clean":
        return []
    said = f"{table.header[column]} {row.context}"
    header = names.family(said)
    found = []
    own = names.family(record.attack)
    # papers print the first two attacks of AutoAttack under its name, and those are APGD
    alike = {header, own} == {"autoattack", "apgd"} and (header == "apgd" or "+" in record.attack)
    if header and own and header != own and not alike:
        found.append(("attack", header, record.attack))
    if names.steps(said) and record.steps and names.steps(said) != record.steps:
        found.append(("attack", f"pgd-{names.steps(said)}", f"pgd-{record.steps}"))
    if names.radius(said) and record.eps and names.radius(said) != record.eps:
        found.append(("radius", names.radius(said), record.eps))
    if names.norm(said) and record.norm and names.norm(said) != record.norm:
        found.append(("norm", names.norm(said), record.norm))
    return found


def _why(table: Table, row: Row, column: int, possible: list[Record]) -> str:
    """Why a number was not found, with the nearest printed one."""
    value = row.cells[column].value
    if not possible:
        return f"no source prints a method {row.label!r}"
    fitting = [record for record in possible if _fits(table, row, column, record)]
    if not fitting or value is None:
        return "no source prints this method on this dataset"
    nearest = min(fitting, key=lambda record: abs(record.value - value))
    if abs(nearest.value - value) <= NEAR:
        return f"no source prints it; the nearest is {nearest.value}: {nearest.shown}"
    return "no source prints it"
