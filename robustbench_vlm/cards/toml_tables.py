"""The table in a TOML file that somebody else may have written: plain values of bounded size."""

from __future__ import annotations

import copy
import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from robustbench_vlm import text_files
from robustbench_vlm.errors import CardError

LARGEST_CARD = 4 * 2**20  # bytes; the largest card of the project has 4 KB
LARGEST_STRING = 10_000  # characters of a key or of a value
LARGEST_INTEGER = 2**63 - 1  # TOML promises no larger one
DEEPEST = 32  # tables and lists inside each other

DOTTED = re.compile(rf"(?<![\w.-])(?:[\w-]+|\"[^\"\n]*\"|'[^'\n]*')(?:[ \t]*\.[ \t]*[\w-]+){{{DEEPEST}}}")
"""A key with more parts than `DEEPEST`; `tomllib` needs time quadratic in their number."""
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that no text has; line ends and tabs are not among them."""


def read(path: Path, roots: Sequence[Path]) -> dict[str, Any]:
    """The table of a TOML file, with `@file` strings replaced by that file's lines.

    A value `"@prompts/x.txt"` of `names`, `templates`, `wordnet_ids` or `wordnet_synsets` means the lines of
    `x.txt` below one of `roots`, so a list of a thousand names is written once and shared.

    Raises:
        CardError: unreadable, not TOML, or a value that no card has: a number that is not finite or has more
            than 64 bits, a control character, a string or nesting above the limits of this file.
    """
    where, expected = str(path), "a TOML card"
    try:
        text = text_files.decoded(text_files.read_bytes(path, LARGEST_CARD))
        table = copy.deepcopy(_parsed(text, where))
    except FileNotFoundError:
        raise CardError(where, "no such file", expected) from None
    except OSError as error:
        raise CardError(where, f"cannot be read ({error.strerror})", expected) from None
    except (ValueError, RecursionError) as error:  # TOML errors and undecodable bytes are ValueErrors, too
        raise CardError(where, f"not TOML ({error!s:.120})", expected) from None
    replaced: dict[str, Any] = {}
    for key in ("names", "templates", "wordnet_ids", "wordnet_synsets"):
        value = table.get(key)
        if isinstance(value, str) and value.startswith("@"):
            table[key] = replaced[key] = lines_of(path, value.removeprefix("@"), roots)
        if isinstance(value, dict):
            files = {n: f for n, f in value.items() if isinstance(f, str) and f.startswith("@")}
            rows = {name: lines_of(path, file.removeprefix("@"), roots) for name, file in files.items()}
            value.update(rows)
            replaced[key] = rows
    require_plain(replaced, where)
    return table


@lru_cache(maxsize=512)
def _parsed(text: str, where: str) -> dict[str, Any]:
    """The table that a text says; a command reads many cards again and again, and `tomllib` is slow."""
    if found := DOTTED.search(text):
        raise CardError(where, f"the key {found[0]!r:.40} has too many parts", f"at most {DEEPEST}")
    table = tomllib.loads(text)
    require_plain(table, where)
    return table


def require_plain(table: dict[str, Any], where: str) -> None:
    """Refuse values that no card has.

    Raises:
        CardError: see `read`; the message names the key.
    """
    for key, value, depth in _values(table):
        place = f"{where}, {key:.80}" if key else where
        if depth > DEEPEST:
            raise CardError(place, f"more than {DEEPEST} tables and lists inside each other", "a flat card")
        if isinstance(value, str) and len(value) > LARGEST_STRING:
            raise CardError(place, f"text of {len(value)} characters", f"at most {LARGEST_STRING}")
        if isinstance(value, str) and (found := CONTROL.search(value)):
            raise CardError(place, f"the control character {found[0]!r}", "printable text")
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            raise CardError(place, "a whole number of more than 64 bits", f"at most {LARGEST_INTEGER}")
        if isinstance(value, float) and not math.isfinite(value):  # JSON has no spelling for it
            raise CardError(place, f"{value}", "a finite number")
        if not isinstance(value, str | int | float | dict | list):
            expected = "text, a number, true or false, a list or a table"
            raise CardError(place, f"{value!s:.40}, a {type(value).__name__}", expected)


def _values(table: dict[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """Every key, table, list and plain value of a table: (dotted key, value, depth)."""
    waiting: list[tuple[str, Any, int]] = [("", table, 0)]
    while waiting:
        key, value, depth = waiting.pop()
        yield key, value, depth
        if depth > DEEPEST:
            continue
        if isinstance(value, dict):
            for name, inner in value.items():
                yield key, name, depth
                waiting.append((f"{key}.{name}".lstrip("."), inner, depth + 1))
        elif isinstance(value, list):
            waiting += [(key, inner, depth + 1) for inner in value]


def lines_of(card: Path, name: str, roots: Sequence[Path]) -> list[str]:
    """The lines of the file `name` below the first of `roots` that has it.

    Args:
        card: which names the file, for messages.
        name: a path below a folder of cards.
        roots: folders of cards.

    Raises:
        CardError: no such file, or no text.
    """
    for root in roots:
        if path := below(root, name):
            try:
                return text_files.read_text(path).removesuffix("\n").split("\n")
            except (OSError, UnicodeDecodeError):
                raise CardError(str(path), "unreadable", "UTF-8 text") from None
    raise CardError(str(card), f"names the file {name!r:.200}, which does not exist", f"it below {roots[-1]}")


def below(root: Path, name: str) -> Path | None:
    """The file called `name` below a folder; None if there is none, or if it lies elsewhere."""
    if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    path = root / name
    try:
        return path if path.is_file() and path.resolve().is_relative_to(root.resolve()) else None
    except OSError:  # a name that no file system takes
        return None
