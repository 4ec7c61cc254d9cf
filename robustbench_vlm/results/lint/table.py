"""A table of results as text and numbers, from a CSV file or the `tabular` of a LaTeX file."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from robustbench_vlm import text_files
from robustbench_vlm.errors import InputError
from robustbench_vlm.results.lint import latex

NUMBER = re.compile(
    r"(?P<number>\d{1,3}(?:[.,]\d{1,4})?)\s*%?"
    r"(?:\s*(?:±|\+/-)\s*\d+(?:[.,]\d+)?\s*%?)?"  # its spread
    r"(?:\s*\(\s*[-+−↑↓]?\s*\d+(?:[.,]\d+)?\s*%?\s*\))?"  # a difference to another row
    r"\s*[*†‡↑↓]*",
    re.ASCII,  # digits of other scripts stay text
)
"""A percentage as papers print it; spread, difference and marks behind it are read over."""

MISSING = {"", "-", "--", "---", "–", "—", "n/a", "na"}
LABELS = {"method", "methods", "model", "modelid", "defense", "defence", "approach", "algorithm"}
"""Headers of the column with the names of the methods; without one, it is the first column with texts."""

NOTE = re.compile(r"\([^)]*\)")
RADIUS = re.compile(r"(?i)(?:eps|epsilon|ε|radius)\s*(?:\(?/\s*255\)?)?")
LARGEST_FILE = 2**22  # bytes
LARGEST = 4000
"""Cells of one table; a results table of a paper has a few hundred."""


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: as printed, blanks at the ends removed.
        value: the percentage in it, 0 to 100, or None for text.
    """

    text: str
    value: Decimal | None

    @classmethod
    def of(cls, text: str) -> Cell:
        """Read a text; what is no percentage between 0 and 100 stays text."""
        text = " ".join(text.split())
        found = NUMBER.fullmatch(text)
        value = Decimal(found["number"].replace(",", ".")) if found else None
        return cls(text, value if value is not None and value <= 100 else None)

    @property
    def missing(self) -> bool:
        """Whether the cell says that there is no number."""
        return self.text.lower() in MISSING

    @property
    def is_text(self) -> bool:
        """Whether the cell says something that is no percentage."""
        return self.value is None and not self.missing

    @property
    def unit(self) -> Decimal:
        """Half of the last printed digit: by how much rounding may have moved the number."""
        return rounding(self.value) if self.value is not None else Decimal(0)


def rounding(value: Decimal) -> Decimal:
    """Half of the last digit of a printed number: 0.05 for 43.6."""
    exponent = value.as_tuple().exponent
    return Decimal(5).scaleb(int(exponent) - 1)


@dataclass(frozen=True)
class Row:
    """One row below the header.

    Attributes:
        label: its first text, the name of the method.
        context: its other texts, the last heading above it inside the table, and the header of its label.
        cells: all its cells, one a column.
    """

    label: str
    context: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A table: the texts of the header, one a column, and the rows below."""

    header: tuple[str, ...]
    rows: tuple[Row, ...]

    def column(self, index: int) -> str:
        """What a column is called in a message."""
        return self.header[index] or f"column {index + 1}"


def read(path: Path) -> Table:
    """The table of a `.csv` or `.tex` file.

    Raises:
        InputError: another kind of file, not UTF-8, not there, or no table that can be read without guessing.
    """
    kind = path.suffix.lower()
    if kind not in {".csv", ".tex"}:
        raise InputError(str(path), f"a name that ends in {kind!r}", "TABLE.csv or TABLE.tex")
    try:
        text = text_files.decoded(text_files.read_bytes(path, LARGEST_FILE))
    except UnicodeDecodeError as error:
        raise InputError(str(path), f"byte {error.start} is not UTF-8", "a UTF-8 text file") from None
    except OSError as error:
        raise InputError(str(path), error.strerror or "cannot be read", "a text file") from None
    lines, header = latex.lines(text, str(path)) if kind == ".tex" else (_csv_lines(text, path), 1)
    return _table(lines, header, str(path))


def _csv_lines(text: str, path: Path) -> list[list[str]]:
    """The records of a CSV file, with commas or semicolons between the fields; blank lines are left out."""
    first = text.lstrip("\n").partition("\n")[0]
    separator = ";" if first.count(";") > first.count(",") else ","
    try:
        lines = list(csv.reader(io.StringIO(text), delimiter=separator, strict=True))
    except csv.Error as error:
        raise InputError(str(path), f"not a CSV file ({error})", "fields separated by commas") from None
    return [line for line in lines if any(field.strip() for field in line)]


def _table(lines: Sequence[Sequence[str]], header: int, where: str) -> Table:
    """A table of lines that all have as many fields as the header."""
    if len(lines) <= header:
        raise InputError(where, "no row below the header", "a header and at least one row")
    width = len(lines[0])
    for number, line in enumerate(lines, 1):
        if len(line) != width:
            found = f"{len(line)} cells in row {number}, {width} in the first"
            raise InputError(where, found, "as many cells in every row")
    if width * len(lines) > LARGEST:
        raise InputError(where, f"{width * len(lines)} cells", f"at most {LARGEST}")
    heads = [
        " ".join(dict.fromkeys(filter(None, (" ".join(line[i].split()) for line in lines[:header]))))
        for i in range(width)
    ]
    rows = _rows(lines[header:], heads)
    if not any(cell.value is not None for row in rows for cell in row.cells):
        found = "no row with a name and a number"
        raise InputError(where, found, "a name and percentages between 0 and 100 in every row")
    return Table(tuple(heads), tuple(rows))


def _rows(lines: Sequence[Sequence[str]], heads: Sequence[str]) -> list[Row]:
    """The rows that have a name; a line with one text alone is a heading of those below it."""
    columns = range(len(heads))
    named = [i for i in columns if re.sub(r"[^a-z]", "", NOTE.sub("", heads[i].lower())) in LABELS][:1]
    order = [*named, *(i for i in columns if i not in named)]
    rows: list[Row] = []
    heading = ""
    for line in lines:
        cells = tuple(_cell(text, head) for text, head in zip(line, heads, strict=True))
        label = next((i for i in order if cells[i].is_text), None)
        if label is None:
            continue
        name = cells[label].text
        if all(cell.text in {"", name} for cell in cells):
            heading = name
            continue
        others = [cells[i].text for i in order if i != label and cells[i].is_text]
        rows.append(Row(name, " ".join(filter(None, [*others, heading, heads[label]])), cells))
    return rows


def _cell(text: str, head: str) -> Cell:
    """A cell; a number below a header such as `eps` is a radius, in 255ths."""
    if not RADIUS.fullmatch(head):
        return Cell.of(text)
    text = text.strip()
    return Cell(f"{text}/255" if text.isdecimal() else text, None)
