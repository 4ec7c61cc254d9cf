"""The curves of a study as one SVG: accuracy against steps, images and time; same findings, same bytes."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from robustbench_vlm import safe_text
from robustbench_vlm.results import stats
from robustbench_vlm.results.figures import style
from robustbench_vlm.results.figures.style import COLOURS, DASHES
from robustbench_vlm.studies.findings import Findings


def svg(findings: Findings) -> bytes:
    """The picture of `figure` as bytes, without a date or anything else that differs between two calls."""
    with mpl.rc_context(style.RC):
        return style.content(figure(findings), "svg")


def figure(findings: Findings) -> Figure:
    """Four plots: robust accuracy above, clean below; against steps (and images) left, against time right."""
    made = Figure(figsize=(9.0, 6.6), layout="constrained", facecolor="white")
    FigureCanvasSVG(made)
    grid = made.subplots(2, 2, sharey="row", sharex="col")
    for row, kind in enumerate(("robust", "clean")):
        for column, timed in enumerate((False, True)):
            _curves(grid[row][column], findings, kind, timed=timed)
        where = safe_text.line(findings.study.probe.split)
        grid[row][0].set_ylabel(f"{kind} accuracy on {where}, %", parse_math=False)
    batch = findings.of(findings.study.baseline)[0].run.recipe.optim.batch_size
    images = grid[0][0].secondary_xaxis("top", functions=(lambda s: s * batch, lambda i: i / batch))
    images.set_xlabel("training images")
    grid[1][0].set_xlabel("steps")
    grid[1][1].set_xlabel(f"training time, in whole runs of {findings.study.baseline}")
    handles, labels = grid[0][0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    words = f"mean over {len(findings.seeds)} seeds; bands: 95 % t interval"
    made.suptitle(f"{safe_text.line(findings.study.title)}\n{words}", fontsize=10, parse_math=False)
    return made


def _curves(axes: Axes, findings: Findings, kind: str, *, timed: bool) -> None:
    """One line and interval band for each arm; time is counted in whole runs of the baseline."""
    coloured = 0
    for number, arm in enumerate(findings.study.arm):
        baseline = arm.name == findings.study.baseline
        colour = "black" if baseline else COLOURS[coloured % len(COLOURS)]
        coloured += not baseline
        curves = [run.curve for run in findings.of(arm.name)]
        steps = curves[0].steps
        unit = findings.cost(arm.name).value / steps[-1] if timed else 1.0
        x = [step * unit for step in steps]
        points = [stats.t_mean([curve.of(kind)[i] for curve in curves]) for i in range(len(steps))]
        style: dict[str, Any] = {"color": colour, "linestyle": DASHES[number % len(DASHES)]}
        axes.plot(x, [p.value for p in points], label=arm.name, linewidth=1.6, **style)
        if not math.isnan(points[0].low):
            low, high = [p.low for p in points], [p.high for p in points]
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))  # a band may pass zero, an accuracy does not
