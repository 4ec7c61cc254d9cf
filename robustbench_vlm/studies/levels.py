"""How much sooner an arm reaches fixed accuracies, and differences whose intervals hold seeds and images."""

from __future__ import annotations

import math

import numpy as np

from robustbench_vlm.errors import DataError
from robustbench_vlm.results import stats
from robustbench_vlm.results.stats import Mean
from robustbench_vlm.studies.findings import Curve, Findings

STEP = 5  # points between two levels
SHOWN = 5  # levels of a kind, the highest ones


def levels(findings: Findings, kind: str) -> list[int]:
    """The highest multiples of 5 points that every run of the baseline rises to from below, in order."""
    rising = [_rising(run.curve, kind)[1] for run in findings.of(findings.study.baseline)]
    lowest, highest = max(values[0] for values in rising), min(max(values) for values in rising)
    first = STEP * (math.floor(lowest / STEP) + 1)
    return list(range(first, math.floor(highest) + 1, STEP))[-SHOWN:]


def speedups(findings: Findings, arm: str, kind: str, level: float, *, timed: bool) -> list[float | None]:
    """The baseline's steps to a level over the arm's, for each seed; None where the arm never gets there.

    Args:
        findings: all runs.
        arm: name of the arm.
        kind: `clean` or `robust`.
        level: accuracy of the validation probe in points, one of `levels`.
        timed: compare seconds of training instead of steps.
    """
    found: list[float | None] = []
    for a, b in findings.pairs(arm):
        at, reference = (stats.first_reach(*_rising(run.curve, kind), level) for run in (a, b))
        assert reference is not None  # `levels` has none that the baseline misses
        ratio = b.step_seconds / a.step_seconds if timed else 1.0
        found.append(None if at is None else ratio * max(reference, 1.0) / max(at, 1.0))
    return found


def _rising(curve: Curve, kind: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Steps and accuracies from the lowest probe on: the start of a defense loses clean accuracy at first."""
    values = curve.of(kind)
    lowest = values.index(min(values))
    return curve.steps[lowest:], values[lowest:]


def over_images(findings: Findings, arm: str, part: str, kind: str) -> Mean:
    """Points above the baseline, unweighted over datasets, with an interval over seeds and images together.

    Raises:
        DataError: runs that were not evaluated on the same images.
    """
    pairs = list(findings.pairs(arm))
    tables = []
    for name in pairs[0][0].datasets(part):
        keys = pairs[0][0].verdicts[name].key.tolist()
        rows = []
        for a, b in pairs:
            for run in (a, b):
                if run.verdicts[name].key.tolist() != keys:
                    do = "run the study again with one data folder"
                    raise DataError(str(run.run.folder), "evaluated on other images", f"{name} of seed 0", do)
            rows.append(
                a.verdicts[name][kind].to_numpy(dtype=float) - b.verdicts[name][kind].to_numpy(dtype=float)
            )
        tables.append(100 * np.stack(rows))
    return stats.crossed_mean(tables, f"{findings.study.name}/{arm}/{part}/{kind}")
