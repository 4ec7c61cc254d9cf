"""`--set key=value`: replace single entries of a card's table."""

from __future__ import annotations

import math
import tomllib
from typing import Any

from robustbench_vlm.errors import CardError


def number(text: str) -> float:
    """A TOML float.

    Raises:
        ValueError: it is not finite: JSON has no spelling for such a number, and results are JSON.
    """
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def override(table: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """The table with `--set a.b=value` applied; values are TOML (`0.1`, `true`, `"text"`), else plain text.

    Raises:
        CardError: a setting without `=`.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise CardError(f"--set {setting}", "no '='", "key=value, for example optim.steps=100")
        try:
            value = tomllib.loads(f"v = {text}", parse_float=number)["v"]
        except (
            ValueError,
            RecursionError,
        ):  # not TOML: text, which the record refuses where it wants another kind
            value = text
        *parents, last = key.split(".")
        inner = table
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise CardError(f"--set {setting}", f"{parent!r} is not a table")
        inner[last] = value
    return table
