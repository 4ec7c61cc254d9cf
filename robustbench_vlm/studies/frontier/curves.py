"""How soon one method's training has the accuracy of another, in steps and in processor time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from robustbench_vlm.results import stats
from robustbench_vlm.results.stats import Mean
from robustbench_vlm.studies.frontier.outcomes import Outcome

LEVELS = (0.8, 0.9, 0.95, 1.0)
"""Shares of the other method's last accuracy."""

COLUMNS = {"clean": 1, "robust": 2}
"""Of a point of a training curve."""


@dataclass(frozen=True)
class Speed:
    """How soon a level is reached for good.

    Attributes:
        kind: `clean` or `robust`.
        level: accuracy on the probe images, in points: a share of the other method's last one, which differs
            from seed to seed; the mean over seeds.
        reached: number of seeds in which the method reaches it.
        held: number of seeds in which one of the two is never below the level, from the start on, so that
            there is nothing to be reached.
        steps, time: the other method's steps, or processor time, over this one's; the geometric mean over
            seeds. None where one of the two holds or never reaches the level in some seed.
    """

    kind: str
    level: float
    reached: int
    held: int
    steps: Mean | None
    time: Mean | None


def settled_at(steps: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """The step from which a curve, linear between its points, stays at or above a level.

    Clean accuracy is high before training, falls, and rises again: only the last rise counts. None if the
    curve ends below the level; the first step if it is never below.
    """
    if values[-1] < level:
        return None
    last = max((i for i, value in enumerate(values) if value < level), default=None)
    if last is None:
        return float(steps[0])
    share = (level - values[last]) / (values[last + 1] - values[last])
    return steps[last] + share * (steps[last + 1] - steps[last])


def speeds(
    own: Sequence[Outcome], other: Sequence[Outcome], kinds: Sequence[str] = ("robust", "clean")
) -> list[Speed]:
    """How soon a method is where another one ends, at each of `LEVELS`.

    Args:
        own: outcomes of one method.
        other: of another one, with the same seeds.
        kinds: which accuracies. Robust accuracies are comparable only if both trained at one radius, which
            is the one that their probes attack at.
    """
    found = []
    for kind in kinds:
        column = COLUMNS[kind]
        ends = [100 * run.curve[-1][column] for run in other]
        for share in LEVELS:
            levels = [share * end for end in ends]
            at = [_settled(run, column, level) for run, level in zip(own, levels, strict=True)]
            theirs = [_settled(run, column, level) for run, level in zip(other, levels, strict=True)]
            ratios = [
                None if a is None or b is None or not a or not b else b / max(a, 1.0)
                for a, b in zip(at, theirs, strict=True)
            ]
            costs = [_cost(a, b) for a, b in zip(own, other, strict=True)]
            timed = [None if r is None or c is None else r * c for r, c in zip(ratios, costs, strict=True)]
            reached = sum(a is not None for a in at)
            level = sum(levels) / len(levels)
            held = sum(0.0 in pair for pair in zip(at, theirs, strict=True))
            found.append(Speed(kind, level, reached, held, _geometric(ratios), _geometric(timed)))
    return found


def _settled(run: Outcome, column: int, level: float) -> float | None:
    return settled_at([p[0] for p in run.curve], [100 * p[column] for p in run.curve], level)


def _cost(own: Outcome, other: Outcome) -> float | None:
    """Time of the other's step over that of the own one."""
    if own.step_seconds is None or other.step_seconds is None:
        return None
    return other.step_seconds / own.step_seconds


def _geometric(ratios: Sequence[float | None]) -> Mean | None:
    """Geometric mean of ratios with the t interval of their logarithms; None if a ratio is missing.

    A run that never reached its target has no ratio, and a mean over the others would flatter.
    """
    if any(ratio is None for ratio in ratios):
        return None
    mean = stats.t_mean([math.log(ratio) for ratio in ratios if ratio is not None])
    return Mean(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high))
