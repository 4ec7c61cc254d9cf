"""Figures of a leaderboard, each of one contest, or of contests that differ in the radius alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from robustbench_vlm import safe_text
from robustbench_vlm.errors import DataError
from robustbench_vlm.results import contest, grids
from robustbench_vlm.results.figures import style
from robustbench_vlm.threat import parse_eps

APART = tuple(name for name in contest.COLUMNS if name not in ("eps", "eps_ladder"))
"""What the contests of one curve share."""


def drawn(rows: pd.DataFrame, kind: str, dataset: str) -> dict[str, Figure]:
    """The figures of one kind, by a short name that tells them apart.

    Args:
        rows: of a leaderboard; see `leaderboard.table`.
        kind: one of `KINDS`.
        dataset: the rows that curves and crosses show: a dataset, `mean`, or another mean.

    Raises:
        DataError: no row of that dataset.
    """
    chosen = rows if kind == "heatmap" else rows[rows.dataset == dataset]
    if chosen.empty:
        known = ", ".join(dict.fromkeys(rows.dataset))
        do = "a mean has a row where a model has all its datasets"
        raise DataError("plot", f"no row of {dataset!r}", f"one of: {known}", do)
    with mpl.rc_context(style.RC):
        return KINDS[kind](chosen)


def _names(rows: pd.DataFrame) -> list[str]:
    """What a figure calls the models of some rows, in order of first appearance."""
    return [safe_text.line(f"{name} ({sha[:6]})") for name, sha in _models(rows)]


def _models(rows: pd.DataFrame) -> list[tuple[str, str]]:
    return list(dict.fromkeys(zip(rows.model_id, rows.checkpoint_sha256, strict=True)))


def _title(rows: pd.DataFrame, of: str) -> str:
    first = rows.iloc[0]
    n = first.n_requested or "all"
    return safe_text.line(f"{first.attack} · {first.norm} {of} · n = {n} · {first.suite}")


def _against_radius(rows: pd.DataFrame) -> dict[str, Figure]:
    """Robust accuracy against the radius: one figure for each ladder that no other one goes on from."""
    made: dict[str, Figure] = {}
    for _, part in rows.groupby(list(APART), sort=False):
        ladders = list(dict.fromkeys(part.eps_ladder))
        for ladder in ladders:
            if any(other != ladder and f"{other} ".startswith(f"{ladder} ") for other in ladders):
                continue
            steps = [step for step in ladders if f"{ladder} ".startswith(f"{step} ")]
            chosen = part[part.eps_ladder.isin(steps)]
            made[_digits(chosen[chosen.eps_ladder == ladder])] = _curves(chosen)
    return made


def _digits(rows: pd.DataFrame) -> str:
    """`Contest.digits` of the contest of some rows."""
    return contest.digits({str(name): value for name, value in rows.iloc[0].items()})


def _curves(rows: pd.DataFrame) -> Figure:
    made = style.new(6.4, 4.2)
    axes = made.subplots()
    radii = {eps: float(parse_eps(eps, norm)) for eps, norm in zip(rows.eps, rows.norm, strict=True)}
    for number, (model, name) in enumerate(zip(_models(rows), _names(rows), strict=True)):
        own = rows[(rows.model_id == model[0]) & (rows.checkpoint_sha256 == model[1])]
        own = own.assign(radius=own.eps.map(radii)).sort_values("radius")
        clean = own.iloc[0][["clean", "clean_ci_low", "clean_ci_high"]].tolist()
        points = [clean, *own[["robust", "ci_low", "ci_high"]].to_numpy().tolist()]
        y, low, high = ([float(point[k]) for point in points] for k in range(3))
        bars = [_gaps(y, low), _gaps(high, y)]
        axes.errorbar([0.0, *own.radius], y, yerr=bars, label=name, capsize=2, **style.series(number))
    axes.set_xticks([0.0, *radii.values()], ["0", *radii])
    axes.set_xlabel(f"{rows.norm.iloc[0]} radius")
    _finish(made, "robust accuracy, %", _title(rows, "against the radius"))
    return made


def _gaps(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Lengths of error bars; rounding of a table may put a limit on the wrong side by its last digit."""
    return [max(0.0, a - b) for a, b in zip(above, below, strict=True)]


def _clean_robust(rows: pd.DataFrame) -> dict[str, Figure]:
    """Clean against robust accuracy, with both intervals."""
    made: dict[str, Figure] = {}
    for _, part in rows.groupby(list(contest.COLUMNS), sort=False):
        figure = style.new(6.4, 4.6)
        axes = figure.subplots()
        for number, (name, row) in enumerate(zip(_names(part), part.to_dict("records"), strict=True)):
            x, left, right = (float(row[key]) for key in ("clean", "clean_ci_low", "clean_ci_high"))
            y, low, high = (float(row[key]) for key in ("robust", "ci_low", "ci_high"))
            across, up = [_gaps([x], [left]), _gaps([right], [x])], [_gaps([y], [low]), _gaps([high], [y])]
            look = style.series(number) | {"linestyle": "none"}
            axes.errorbar([x], [y], xerr=across, yerr=up, label=name, **look)
        axes.set_xlim(0, 100)
        axes.set_xlabel("clean accuracy, %")
        _finish(figure, "robust accuracy, %", _title(part, part.eps.iloc[0]))
        made[_digits(part)] = figure
    return made


def _heatmap(rows: pd.DataFrame) -> dict[str, Figure]:
    """Robust accuracy of every model on every dataset and mean, as numbers on a scale of grey."""
    made: dict[str, Figure] = {}
    for _, part in rows.groupby(list(contest.COLUMNS), sort=False):
        sets = sorted(dict.fromkeys(part.dataset), key=lambda name: not grids.is_mean(name))
        models = _models(part)
        figure = style.new(2.2 + 0.62 * len(sets), 1.6 + 0.32 * len(models))
        axes = figure.subplots()
        named = zip(part.model_id, part.checkpoint_sha256, part.dataset, strict=True)
        cells = dict(zip(named, part.robust.astype(float), strict=True))
        values = [[cells.get((*model, name), math.nan) for name in sets] for model in models]
        axes.imshow(values, cmap="Greys", vmin=0, vmax=140, aspect="auto")  # text stays legible on 100 %
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                shown = "–" if math.isnan(value) else f"{value:.1f}"
                axes.text(j, i, shown, ha="center", va="center", color="white" if value > 80 else "black")
        shown_sets = [safe_text.line(name) for name in sets]
        axes.set_xticks(range(len(sets)), shown_sets, rotation=40, ha="right", parse_math=False)
        axes.set_yticks(range(len(models)), _names(part), parse_math=False)
        axes.tick_params(length=0)
        title = f"robust accuracy, %: {_title(part, part.eps.iloc[0])}"
        figure.suptitle(title, fontsize=10, parse_math=False)
        made[_digits(part)] = figure
    return made


def _finish(figure: Figure, y_label: str, title: str) -> None:
    """Scale, grid, legend and title that curves and crosses share."""
    axes = figure.axes[0]
    axes.set_ylim(0, 100)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25, linewidth=0.5)
    legend = figure.legend(loc="outside right upper", frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    axes.set_title(title, fontsize=9, parse_math=False)


KINDS: Mapping[str, Callable[[pd.DataFrame], dict[str, Figure]]] = {
    "radius": _against_radius,
    "clean-robust": _clean_robust,
    "heatmap": _heatmap,
}
"""The figures that a leaderboard has, by the name that is typed."""
