"""What commands print: results on stdout; progress and remarks on stderr, in plain lines off a terminal."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from robustbench_vlm import safe_text

RECENT = 60.0  # seconds over which the rate of a progress line is taken
PLAIN_EVERY = 10.0  # seconds between progress lines when stderr is not a terminal


class _Stream:
    r"""`sys.stdout` or `sys.stderr` as it is at the time; what its encoding lacks is written as an escape.

    A middle dot becomes `\xb7` on an ASCII terminal, as Python itself writes it to stderr.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever a stream has
        return getattr(getattr(sys, self._name), name)

    @property
    def unicode(self) -> bool:
        """Whether every character can be written."""
        return (getattr(self, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")

    def write(self, text: str) -> int:
        """Write a text."""
        stream = getattr(sys, self._name)
        if not self.unicode:
            text = text.encode(stream.encoding, "backslashreplace").decode(stream.encoding)
        written: int = stream.write(text)
        return written


_stdout = _Stream("stdout")
out = Console(file=cast("IO[str]", _stdout), soft_wrap=True, highlight=False, emoji=False)
err = Console(file=cast("IO[str]", _Stream("stderr")), soft_wrap=True, highlight=False, emoji=False)


quiet = False
"""Whether remarks and progress are left out; `vlmrob --quiet` sets it."""


def remark(text: str) -> None:
    """One line of log on stderr, unless the command is quiet."""
    if not quiet:
        err.print(Text(safe_text.lines(text), style="dim"))


def warning(text: str) -> None:
    """One line on stderr that even a quiet command prints."""
    err.print(Text(safe_text.lines(text), style="dim"))


def result(text: str) -> None:
    """One line of result on stdout."""
    out.print(Text(safe_text.lines(text)))


def error(text: str) -> None:
    """An error on stderr; it may have several lines."""
    err.print(Text(f"error: {safe_text.lines(text)}", style="bold red"))


def result_json(value: Any) -> None:  # noqa: ANN401 - any JSON value
    """A JSON result on stdout."""
    text = safe_text.json_text(json.dumps(value, indent=2, ensure_ascii=not _stdout.unicode))
    _stdout.write(text + "\n")


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout.

    When stdout is not a terminal it is tab-separated lines, which can be cut and sorted. On a terminal too
    narrow for the longest words of all columns, each row becomes a block of lines, so no word is broken.
    """
    title, columns = safe_text.line(title), [safe_text.line(column) for column in columns]
    rows = [[safe_text.line(entry) for entry in row] for row in rows]
    if not out.is_terminal:
        _stdout.write(f"# {title}\n")
        for row in [columns, *rows]:
            _stdout.write("\t".join(row) + "\n")
        return
    out.print(Text(title, style="bold"))  # above the table: a title inside would be cut to its width
    if _least_width(columns, rows) > out.width:
        _show_blocks(columns, rows)
        return
    table = Table(header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(Text(column, overflow="fold"), no_wrap=_one_word(rows, i), overflow="fold")
    for row in rows:
        table.add_row(*[Text(entry) for entry in row])
    out.print(table, soft_wrap=False)


def _least_width(columns: list[str], rows: list[list[str]]) -> int:
    """Characters that a table needs so that no word is broken, frame included."""
    least = 1
    for i in range(len(columns)):
        entries = [row[i] for row in [columns, *rows]]
        words = entries if _one_word(rows, i) else [word for entry in entries for word in entry.split()]
        least += max(map(cell_len, words), default=0) + 3
    return least


def _one_word(rows: list[list[str]], i: int) -> bool:
    """Whether the entries of a column have no blank; such a column is not wrapped, nor is its name."""
    return not any(" " in row[i] for row in rows)


def _show_blocks(columns: list[str], rows: list[list[str]]) -> None:
    """One block of `column  entry` lines a row; empty entries are left out."""
    width = max(map(cell_len, columns))
    for row in rows:
        for column, entry in zip(columns, row, strict=True):
            if entry:
                out.print(Text(f"{column:<{width}}  ", style="bold") + Text(entry, style="not bold"))
        out.print()


class Meter:
    """Progress of counted work: a bar with rate and time left, or a line every `PLAIN_EVERY` seconds."""

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar
        self._task: TaskID | None = None
        self._what = ""
        self._printed = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque()  # time, and units done by then

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` units of the work called `what` are finished."""
        if what != self._what:
            self._what = what
            self._recent.clear()
            if self._bar is not None and self._task is not None:
                self._bar.remove_task(self._task)
            shown = escape(safe_text.line(what))
            self._task = self._bar.add_task(shown, total=total, note="") if self._bar is not None else None
        rate = self._rate(done)
        if self._bar is not None and self._task is not None:
            note = escape(safe_text.line(note))
            text = f"{rate:.1f}/s {note}" if rate else note
            self._bar.update(self._task, completed=done, total=total, note=text)
        elif not quiet and time.monotonic() - self._printed > PLAIN_EVERY:
            self._printed = time.monotonic()
            left = f", about {(total - done) / rate:.0f} s left" if rate > 0 else ""
            remark(f"{what}: {done} of {total}, {rate:.1f}/s{left} {note}".rstrip())

    def _rate(self, done: int) -> float:
        """Units a second over the last `RECENT` seconds, so that a slow beginning is soon forgotten."""
        now = time.monotonic()
        self._recent.append((now, done))
        while len(self._recent) > 2 and self._recent[1][0] < now - RECENT:
            self._recent.popleft()
        begun, first = self._recent[0]
        return (done - first) / max(now - begun, 1e-9)


@contextmanager
def meter() -> Iterator[Meter]:
    """A `Meter` whose bar disappears at the end of the `with` block."""
    if quiet or not err.is_terminal:
        yield Meter(None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        yield Meter(bar)
