"""Tables on disk (CSV, TSV, JSON lines, Parquet) as rows of plain values, one column at a time if need be."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robustbench_vlm.errors import DataError, nearest

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
IMAGE_COLUMNS = ("image", "img", "path", "file", "filepath", "file_name", "filename")
LABEL_COLUMNS = ("label", "class", "target")
LARGEST_LINE = 1 << 20  # bytes of one record of a JSON-lines file
ROWS = 64  # rows of a Parquet file that are in memory together; each may hold a whole image

Row = tuple[str, Mapping[str, Any]]
"""Where the row stands, for messages, and its values by column."""


@dataclass(frozen=True)
class Table:
    """A table whose rows can be read more than once.

    Attributes:
        file: where it lies.
        columns: names of the columns.
        rows: starts reading the named columns.
        inline: columns that hold encoded images instead of paths.
        names: class names of a label column that states them, as files written by `datasets` do.
    """

    file: Path
    columns: tuple[str, ...]
    rows: Callable[[Sequence[str]], Iterator[Row]]
    inline: frozenset[str] = frozenset()
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read(file: Path) -> Table:
    """The table in a file, by its ending; rows are read when they are asked for.

    Raises:
        DataError: no such file, or one that is not what its ending says.
    """
    if not file.is_file():
        raise DataError(str(file), "no such file", f"a table that ends in {', '.join(SUFFIXES)}")
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return _parquet(file)
    start = _json_lines if suffix == ".jsonl" else _separated
    first = next(start(file), None)
    columns = tuple(first[1]) if first else ()
    return Table(file, columns, lambda _: start(file))


def column(table: Table, wanted: str, known: Sequence[str]) -> str:
    """The column called `wanted`, or the first of the `known` names that the table has, whatever its case.

    Raises:
        DataError: no such column.
    """
    if wanted:
        if wanted not in table.columns:
            raise DataError(str(table.file), f"no column {wanted!r}", do=nearest(wanted, table.columns))
        return wanted
    by_lower = {name.lower(): name for name in table.columns}
    kind = "image" if known is IMAGE_COLUMNS else "label"
    found = next((by_lower[name] for name in known if name in by_lower), None)
    if found is None:
        columns = ", ".join(map(repr, table.columns[:12])) or "none"
        expected = f"one called {', '.join(known[:-1])} or {known[-1]}"
        raise DataError(
            str(table.file), f"columns {columns:.200}", expected, f"name it: --columns {kind}=NAME"
        )
    return found


def _separated(file: Path) -> Iterator[Row]:
    """The rows of a CSV or TSV file with a header."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
            filled = (row for row in rows if row)  # a blank line is no row
            header = _distinct(file, next(filled, []))
            for row in filled:
                where = f"{file}, line {rows.line_num}"
                if len(row) != len(header):
                    do = 'put " round a field that has the delimiter in it'
                    raise DataError(where, f"{len(row)} fields", f"{len(header)}, as the header has", do)
                yield where, dict(zip(header, row, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(str(file), f"not a table ({error})", "UTF-8 text with a header line") from None


def _distinct(file: Path, columns: Sequence[str]) -> Sequence[str]:
    """The names of columns, which must not repeat: of two columns with one name, one would be lost."""
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise DataError(str(file), f"two columns {twice[0]!r:.80}", "each name once", "rename one")
    return columns


def _json_lines(file: Path) -> Iterator[Row]:
    """The rows of a file with one JSON object a line."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            try:
                row = json.loads(line[:LARGEST_LINE])
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise DataError(where, f"{line[:60]!r}", "a JSON object with an image and a label")
            yield where, row


def _parquet(file: Path) -> Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(file)
        schema = opened.schema_arrow
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(str(file), f"not a Parquet file ({reason:.120})", "a whole one") from None

    def rows(columns: Sequence[str]) -> Iterator[Row]:
        number = 0
        try:
            for batch in parquet.ParquetFile(file).iter_batches(ROWS, columns=list(columns)):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
        except (pa.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{file}, row {number + 1}", f"unreadable ({reason:.120})") from None

    types = {name: schema.field(name).type for name in _distinct(file, schema.names)}
    inline = {n for n, t in types.items() if pa.types.is_struct(t) or pa.types.is_binary(t)}
    inline |= {n for n, t in types.items() if pa.types.is_large_binary(t)}
    return Table(file, tuple(types), rows, frozenset(inline), _class_names(schema.metadata or {}))


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Class names by column, where the file was written by the package `datasets`."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        stated = {str(name): feature.get("names") for name, feature in features.items()}
        return {name: tuple(map(str, names)) for name, names in stated.items() if isinstance(names, list)}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
