"""The validation fronts of a study as one SVG; every point leads to its row in the page."""

from __future__ import annotations

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from robustbench_vlm import safe_text
from robustbench_vlm.results.figures import style
from robustbench_vlm.results.figures.style import COLOURS
from robustbench_vlm.studies.frontier import choice, sections
from robustbench_vlm.studies.frontier.choice import MethodTrials
from robustbench_vlm.studies.frontier.report import Report

MARKERS = "osD^vPX*<>hp"


def svg(report: Report) -> bytes:
    """The picture as bytes, without a date or anything else that differs between two calls."""
    with mpl.rc_context(style.RC):
        return style.content(figure(report), "svg")


def figure(report: Report) -> Figure:
    """The compared methods with all of their trials left, the fronts of all methods right."""
    made = Figure(figsize=(11.0, 5.6), layout="constrained", facecolor="white")
    FigureCanvasSVG(made)
    left, right = made.subplots(1, 2, sharey=True, sharex=True)
    own = [one for one in report.tried if one.candidates]
    for number, one in enumerate(own):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        if one.method.name in report.study.compared:
            _points(left, one, colour, marker)
        _front(left if one.method.name in report.study.compared else None, right, report, one, colour, marker)
    left.set_title("compared methods: all trials and their fronts")
    right.set_title("all methods: fronts")
    attack = safe_text.line(report.study.validation.attack)
    left.set_ylabel(f"robust accuracy ({attack}), %", parse_math=False)
    for axes in (left, right):
        axes.set_xlabel("clean accuracy, %")
        axes.grid(alpha=0.25, linewidth=0.5)
    handles, labels = right.get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    words = "validation images, one seed; a star is the operating point"
    made.suptitle(f"{safe_text.line(report.study.title)}\n{words}", fontsize=10, parse_math=False)
    return made


def _points(axes: Axes, one: MethodTrials, colour: str, marker: str) -> None:
    """All candidates of a method, small; each leads to its row."""
    found = axes.scatter(
        [c.clean for c in one.candidates],
        [c.robust for c in one.candidates],
        s=14,
        color=colour,
        marker=marker,
        alpha=0.4,
        linewidths=0,
    )
    found.set_urls([f"#{sections.anchor(c)}" for c in one.candidates])


def _front(
    left: Axes | None, right: Axes, report: Report, one: MethodTrials, colour: str, marker: str
) -> None:
    """The front of a method, and its operating point if it was chosen."""
    own = [one.candidates[i] for i in choice.on_front(one)]
    best = report.made.get(one.method.name)
    for axes in (left, right):
        if axes is None:
            continue
        x, y = [c.clean for c in own], [c.robust for c in own]
        axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.4, label=one.method.name)
        found = axes.scatter(x, y, s=16, color=colour, marker=marker)
        found.set_urls([f"#{sections.anchor(c)}" for c in own])
        if best is not None:
            axes.scatter([best.clean], [best.robust], s=130, color=colour, marker="*", zorder=3)
