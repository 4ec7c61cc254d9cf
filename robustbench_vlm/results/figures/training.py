"""Curves of a training run, from its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustbench_vlm import safe_text, store
from robustbench_vlm.errors import DataError
from robustbench_vlm.results.figures import style

LOG = "log.jsonl"
OTHERS = frozenset({"grad_norm", "lr", "images_per_second", "data_seconds"})
"""Numbers of a step that are no term of the loss."""


def figure(run: Path) -> Figure:
    """The loss and its terms above, the accuracies of the probes below; both against the step.

    Args:
        run: folder of the run.

    Raises:
        DataError: no log there, or no step in it.
    """
    path = run / LOG
    if not path.is_file():
        raise DataError(str(path), "no such file", "the log of a training run", "name the folder of a run")
    lines = list(store.records(path))
    steps, probes = [line for line in lines if "loss" in line], [line for line in lines if "probe" in line]
    if not steps:
        raise DataError(str(path), "no step", "one at least", "wait until the run has made one")
    with mpl.rc_context(style.RC):
        made = style.new(6.4, 5.6 if probes else 3.4)
        panels = made.subplots(2 if probes else 1, sharex=True, squeeze=False)[:, 0]
        _terms(panels[0], steps)
        if probes:
            _accuracies(panels[1], probes)
        panels[-1].set_xlabel("step")
        made.suptitle(safe_text.line(run.resolve().name), fontsize=10, parse_math=False)
    return made


def _terms(axes: Axes, steps: list[dict[str, Any]]) -> None:
    names = [name for name, value in steps[-1].items() if name not in OTHERS and isinstance(value, float)]
    for number, name in enumerate(["loss", *(name for name in names if name != "loss")]):
        points = [(line["step"], line[name]) for line in steps if isinstance(line.get(name), int | float)]
        look = style.series(number) | {"marker": ""}
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, **look)
    axes.set_ylabel("loss")
    _finish(axes)


def _accuracies(axes: Axes, probes: list[dict[str, Any]]) -> None:
    for number, name in enumerate(("clean", "robust")):
        points = [(line["step"], 100 * line["probe"][name]) for line in probes if name in line["probe"]]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **style.series(number))
    axes.set_ylabel("accuracy of the probe, %")
    axes.set_ylim(0, 100)
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(frameon=False)
