"""How all figures look, and how they become bytes that are the same in every run."""

from __future__ import annotations

import io
from typing import Any, Literal, get_args

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Format = Literal["svg", "png", "pdf"]
FORMATS: tuple[Format, ...] = get_args(Format)

# Okabe and Ito's palette, which people with any kind of colour vision can tell apart.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKS = ("o", "s", "^", "D", "v", "P", "X")
RC: Any = {
    "svg.hashsalt": "vlmrob",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
UNDATED: dict[str, dict[str, None]] = {
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def new(width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(made)
    return made


def series(number: int) -> dict[str, Any]:
    """Colour, mark and dash of a series; the first 210 differ."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKS[number % len(MARKS)],
        "linestyle": DASHES[number % len(DASHES)],
    }


def content(figure: Figure, kind: Format) -> bytes:
    """The figure as a file, without a date or anything else that differs between two calls."""
    file = io.BytesIO()
    with mpl.rc_context(RC):
        figure.savefig(file, format=kind, dpi=200, metadata=UNDATED[kind])
    return file.getvalue()
