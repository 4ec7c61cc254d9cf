"""Which cells of one column may not be compared, and which numbers of one row do not belong together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

from robustbench_vlm.results.lint import names
from robustbench_vlm.results.lint.matching import Match, contradictions
from robustbench_vlm.results.lint.records import Record
from robustbench_vlm.results.lint.table import Table, rounding

NOISE = Decimal("0.2")
"""Points by which library versions and hardware may move a clean accuracy."""


@dataclass(frozen=True)
class Side:
    """Cells that are alike in what a finding is about.

    Attributes:
        is_: what they have, in words.
        rows: labels of their rows.
    """

    is_: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """Cells that may not be compared.

    Attributes:
        kind: what differs, one of `KINDS`.
        column: name of the column; empty for a finding about a row.
        sides: at least one group of cells, which may not be compared with each other.
    """

    kind: str
    column: str
    sides: tuple[Side, ...]

    @property
    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "kind": self.kind,
            "column": self.column,
            "why": KINDS[self.kind],
            "groups": [{"is": side.is_, "rows": list(side.rows)} for side in self.sides],
        }


FACTS: dict[str, Callable[[Record], str]] = {
    "datasets": lambda record: record.dataset,
    "field": lambda record: record.field,
    "attack": lambda record: record.attack,
    "steps": lambda record: f"pgd-{record.steps}" if record.steps else "",
    "radius": lambda record: record.eps,
    "norm": lambda record: record.norm,
    "canvas": lambda record: record.facts.canvas if record.field == "robust" else "",
    "resize": lambda record: record.facts.resize,
    "images": lambda record: record.facts.images,
    "split": lambda record: record.split,
    "prompts": lambda record: record.facts.prompts,
    "metric": lambda record: record.facts.metric,
    "training-data": lambda record: record.trained_on,
}
"""What two numbers of one column must share; an empty text is not known and differs from nothing."""

KINDS = {
    "datasets": "other datasets, other images of a dataset, or averages over other lists of datasets",
    "field": "a clean and a robust accuracy stand in one column",
    "attack": "another attack",
    "steps": "another number of steps of PGD",
    "radius": "another radius",
    "norm": "another norm",
    "canvas": "the ball lies at another size of the image, so a radius means something else",
    "resize": "images are brought to the model in another way",
    "images": "another number of images",
    "split": "another split",
    "prompts": "other class names or sentences",
    "metric": "another metric",
    "training-data": "models by these names were trained on different data",
    "baseline": "the sources print different clean accuracies for the same undefended CLIP",
    "re-evaluated": "one source evaluated a model by this name again and prints another number",
    "contradicted": "another source prints another number for the same model and setting",
    "rounding": "the difference is smaller than what rounding may have moved",
    "clean-of-another-source": "clean and robust accuracy of the row come from different sources",
    "robust-above-clean": "robust above clean accuracy: they cannot be of the same images",
    "header-attack": "the table names another attack than the source",
    "header-radius": "the table names another radius than the source",
    "header-norm": "the table names another norm than the source",
}
"""What each finding means."""


def judge(table: Table, matches: Sequence[Match], printed: Sequence[Record]) -> list[Finding]:
    """All findings: those of columns from left to right, then those of rows.

    Args:
        table: as it was read.
        matches: cells with the records that they may be.
        printed: every record, to find what other sources print.
    """
    columns: dict[tuple[int, str], list[Match]] = defaultdict(list)
    for match in matches:
        columns[match.column, _dataset_of_row(table, match)].append(match)
    found: list[Finding] = []
    for (column, dataset), cells in sorted(columns.items()):
        name = f"{table.column(column)} ({dataset})" if dataset else table.column(column)
        found += _facts(table, name, cells)
        found += _baseline(table, name, cells, printed)
        found += _evaluated_again(table, name, cells, printed)
        found += _contradicted(table, name, cells, printed)
        found += _rounding(table, name, cells)
    return found + _rows(table, matches)


def _dataset_of_row(table: Table, match: Match) -> str:
    """The dataset that a row names and its header does not: rows of several datasets are not compared."""
    return "" if names.dataset(table.header[match.column]) else names.dataset(table.rows[match.row].context)


def only(values: Sequence[str]) -> str:
    """The one value that all have, or empty when there is another or none."""
    return values[0] if values and len(set(values)) == 1 else ""


def _label(table: Table, match: Match) -> str:
    return table.rows[match.row].label


def _facts(table: Table, column: str, cells: Sequence[Match]) -> list[Finding]:
    """Facts that differ between cells, of those cells whose records all have the same."""
    found = []
    for kind, fact in FACTS.items():
        sides: dict[str, list[str]] = defaultdict(list)
        for match in cells:
            value = only([fact(record) for record in match.records])
            if value:
                sides[value].append(_label(table, match))
        if len(sides) > 1:
            found.append(_finding(kind, column, sides))
    return found


def _finding(kind: str, column: str, sides: dict[str, list[str]]) -> Finding:
    return Finding(kind, column, tuple(Side(value, tuple(rows)) for value, rows in sides.items()))


def _differ(a: Record, b: Record) -> bool:
    """Whether two printed numbers differ by more than rounding.

    Zeros at the end are left away in the published file, so both are taken to have the digits of the longer.
    """
    return abs(a.value - b.value) > max(rounding(a.value), rounding(b.value))


def _baseline(table: Table, column: str, cells: Sequence[Match], printed: Sequence[Record]) -> list[Finding]:
    """Clean accuracies of undefended CLIP in the sources of a column, if they differ on the same data."""
    sides: dict[str, list[str]] = defaultdict(list)
    values: list[Record] = []
    for match in cells:
        dataset, arch = only([r.dataset for r in match.records]), only([r.arch for r in match.records])
        paper = only([r.paper for r in match.records])
        own = [
            r
            for r in printed
            if r.paper == paper and r.arch == arch and r.dataset == dataset and r.field == "clean"
            if arch and r.method == "clip" and "laion" not in r.model
        ]
        if own:
            sides[f"{paper}: {own[0].value} ({arch}, {dataset})"].append(_label(table, match))
            values.append(own[0])
    other = any(
        abs(a.value - b.value) > NOISE
        for a in values
        for b in values
        if (a.arch, a.dataset) == (b.arch, b.dataset)
    )
    return [_finding("baseline", column, sides)] if other else []


def _evaluated_again(
    table: Table, column: str, cells: Sequence[Match], printed: Sequence[Record]
) -> list[Finding]:
    """Methods of one source that another source of the column prints with another number."""
    papers = {paper for match in cells if (paper := only([r.paper for r in match.records]))}
    found = []
    for match in cells:
        first = match.records[0]
        own = only([r.paper for r in match.records])
        if not own or first.method == "clip":
            continue
        others = [
            r
            for r in printed
            if r.paper in papers - {own} and r.method == first.method and r.field == first.field
            if r.arch == first.arch and r.eps == first.eps and not _same(r, first)
            if (r.data == first.data or (r.is_mean and first.is_mean)) and _differ(r, first)
        ]
        alike = [r for r in others if r.attacked_by == first.attacked_by]
        others = alike or [r for r in others if r.attack == first.attack] or others
        sides = {f"{own}: {first.value}": [_label(table, match)]}
        sides |= {f"{r.paper}: {r.value} ({r.model}{_by(r)})": [] for r in others}
        if others:
            found.append(_finding("re-evaluated", column, sides))
    return found


def _by(record: Record) -> str:
    """The attack of a record, after a comma."""
    return f", {record.attacked_by}" if record.attack else ""


def _contradicted(
    table: Table, column: str, cells: Sequence[Match], printed: Sequence[Record]
) -> list[Finding]:
    """Numbers that another place prints otherwise for the same model under the same setting."""
    by_method: dict[str, list[Record]] = defaultdict(list)
    for record in printed:
        by_method[record.method].append(record)
    found = []
    for match in cells:
        others = {
            f"{r.paper}: {r.value}": list[str]()
            for own in match.records
            for r in by_method[own.method]
            if _same(own, r) and _differ(own, r)
        }
        if others:
            sides = {f"{match.records[0].paper}: {match.records[0].value}": [_label(table, match)]}
            found.append(_finding("contradicted", column, sides | others))
    return found


def _same(a: Record, b: Record) -> bool:
    """Whether two records are the same model, dataset and setting in different places."""
    keys = ("method", "arch", "dataset", "field", "attack", "steps", "eps", "norm", "trained_on", "facts")
    stated = a.arch and a.facts.prompts and (a.field == "clean" or a.attack)
    if not stated or a.source == b.source or ("laion" in a.model) != ("laion" in b.model):
        return False
    return all(getattr(a, key) == getattr(b, key) for key in keys)


def _rounding(table: Table, column: str, cells: Sequence[Match]) -> list[Finding]:
    """Neighbours whose printed digits differ in number and whose difference rounding can make."""
    found = []
    for i, a in enumerate(cells):
        for b in cells[i + 1 :]:
            x, y = a.cell, b.cell
            same = only([record.dataset for match in (a, b) for record in match.records])
            if not same or x.value is None or y.value is None or x.unit == y.unit:
                continue
            if 0 < abs(x.value - y.value) <= max(x.unit, y.unit):
                sides = {match.cell.text: [_label(table, match)] for match in (a, b)}
                found.append(_finding("rounding", column, sides))
    return found


def _rows(table: Table, matches: Sequence[Match]) -> list[Finding]:
    """Findings about single rows."""
    found: list[Finding] = []
    for index, row in enumerate(table.rows):
        own = [match for match in matches if match.row == index]
        papers: dict[str, dict[str, str]] = {"clean": {}, "robust": {}}
        for match in own:
            field, paper = (only([getattr(r, key) for r in match.records]) for key in ("field", "paper"))
            if field and paper:
                papers[field].setdefault(paper, table.column(match.column))
        if papers["clean"] and papers["robust"] and not papers["clean"].keys() & papers["robust"].keys():
            sides = {f"{name}: {paper}": [row.label] for name in papers for paper in papers[name]}
            found.append(_finding("clean-of-another-source", "", sides))
        found += _robust_above_clean(table, own)
        for match in own:
            found += _header(table, match)
    return found


def _robust_above_clean(table: Table, own: Sequence[Match]) -> list[Finding]:
    """Robust cells above the clean cell of the same dataset in their row."""
    found = []
    for a in own:
        for b in own:
            fields = [only([r.field for r in match.records]) for match in (a, b)]
            datasets = {r.dataset for match in (a, b) for r in match.records}
            if fields != ["clean", "robust"] or len(datasets) != 1:
                continue
            if a.cell.value is not None and b.cell.value is not None and b.cell.value > a.cell.value:
                label = [_label(table, a)]
                sides = {f"{table.column(m.column)}: {m.cell.text}": label for m in (a, b)}
                found.append(_finding("robust-above-clean", "", sides))
    return found


def _header(table: Table, match: Match) -> list[Finding]:
    """What the table says about a cell, and every record of it says otherwise."""
    row = table.rows[match.row]
    per_record = [contradictions(table, row, match.column, record) for record in match.records]
    found = []
    for kind, said, source in per_record[0]:
        if all(kind in [other for other, _, _ in contradicted] for contradicted in per_record):
            sides = {f"table: {said}": [row.label], f"source: {source} ({match.records[0].paper})": []}
            found.append(_finding(f"header-{kind}", table.column(match.column), sides))
    return found


def as_json(match: Match, table: Table) -> dict[str, Any]:
    """A cell with its possible sources, as JSON."""
    records = []
    for record in match.records:
        facts = {key: value for key, value in asdict(record.facts).items() if value}
        stated = {
            key: getattr(record, key)
            for key in ("model", "dataset", "field", "attack", "steps", "eps", "norm", "trained_on", "source")
            if getattr(record, key)
        }
        records.append(stated | {"value": str(record.value)} | facts)
    where = {"row": _label(table, match), "column": table.column(match.column)}
    return where | {"text": match.cell.text, "sources": records}
