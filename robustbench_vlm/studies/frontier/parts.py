"""The parts of a page: sections, tables, and how numbers are written in them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from robustbench_vlm.results.stats import Mean
from robustbench_vlm.studies.frontier import resampling
from robustbench_vlm.studies.frontier.resampling import Estimate

COMMAND = "command"
"""The column of commands."""


@dataclass(frozen=True)
class Cell:
    """A field of a table.

    Attributes:
        text: plain.
        href: where it leads, inside the page; empty: nowhere.
        anchor: name by which other places lead to it; empty: none.
        code: whether it is a command.
    """

    text: str
    href: str = ""
    anchor: str = ""
    code: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, sentences, and a table.

    Attributes:
        title: the heading.
        sentences: paragraphs of plain text.
        columns: of the table; none for no table.
        rows: of the table.
        picture: name of an SVG file beside the page; empty: none.
    """

    title: str
    sentences: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Cell, ...], ...] = ()
    picture: str = field(default="")


def interval(found: Estimate, sign: str = "+") -> str:
    """`+4.0 [+1.2, +6.8]`; `beyond` where a front has no value."""
    if math.isnan(found.value):
        return "beyond"
    if math.isnan(found.low):
        return f"{found.value:{sign}.1f}"
    return f"{found.value:{sign}.1f} [{found.low:{sign}.1f}, {found.high:{sign}.1f}]"


def mean_interval(mean: Mean | None) -> str:
    """`44.0 [42.1, 45.9]`; without brackets from one seed."""
    if mean is None:
        return ""
    if math.isnan(mean.low):
        return f"{mean.value:.1f}"
    return f"{mean.value:.1f} [{mean.low:.1f}, {mean.high:.1f}]"


def ratio(mean: Mean | None) -> str:
    """`1.20x [1.05, 1.37]`."""
    if mean is None:
        return "not always reached"
    text = f"{mean.value:.2f}x"
    return text if math.isnan(mean.low) else f"{text} [{mean.low:.2f}, {mean.high:.2f}]"


def p_value(p: float) -> str:
    """A p-value, or the least one that so many draws can give."""
    if math.isnan(p):
        return ""
    least = 2 / (resampling.DRAWS + 1)
    return f"<= {least:.4f}" if p <= least * 1.0001 else f"{p:.2g}"
