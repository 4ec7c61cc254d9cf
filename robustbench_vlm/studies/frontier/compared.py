"""What is said of one method against another one: differences at their points and of their fronts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from robustbench_vlm.cards.study import Comparison, Measurement
from robustbench_vlm.studies.frontier import choice, fronts, resampling
from robustbench_vlm.studies.frontier.choice import Candidate
from robustbench_vlm.studies.frontier.outcomes import KINDS, SEEN, UNSEEN
from robustbench_vlm.studies.frontier.report import Report
from robustbench_vlm.studies.frontier.resampling import Estimate, Models

LEAST = 1.0
"""Points of accuracy that two fronts must share: over less, a mean is that of a few images."""

Span = tuple[float, float]
VALIDATION = "validation"


@dataclass(frozen=True)
class Statement:
    """One thing that is said of A against B.

    Attributes:
        what: in words.
        part: `seen` or `unseen` of the test, or `validation`.
        kind: `clean` or `robust`: what the difference is of.
        equal: `clean` or `robust`: the accuracy that is equal; empty at the operating points.
        seeds: number of seeds that both have.
        images: number of images.
        estimate: A minus B, in points.
    """

    what: str
    part: str
    kind: str
    equal: str
    seeds: int
    images: int
    estimate: Estimate


@dataclass(frozen=True)
class Compared:
    """A comparison with its contenders.

    Attributes:
        comparison: the card's.
        a, b: the methods that the rule prefers.
        statements: on test images, then on those of validation.
    """

    comparison: Comparison
    a: str
    b: str
    statements: tuple[Statement, ...]


def compared(report: Report, comparison: Comparison) -> Compared | None:
    """A comparison; None while a contender is not known."""
    names = [
        choice.contender(report.study, family, report.choices) for family in (comparison.a, comparison.b)
    ]
    if names[0] is None or names[1] is None:
        return None
    a, b = names[0], names[1]
    candidates = [report.of(name).candidates for name in (a, b)]
    pair = _pair(report, candidates, report.study.validation, "", report.study.seeds[:1])
    return Compared(comparison, a, b, (*_tested(report, a, b), *_of_fronts(pair, VALIDATION)))


def _tested(report: Report, a: str, b: str) -> list[Statement]:
    """What test images say of two contenders, as far as they were tested."""
    if report.test is None or report.front is None:
        return []
    best = [[report.made[name]] for name in (a, b)]
    curves = [choice.measured(report.front, report.of(name), report.made[name]) for name in (a, b)]
    return [
        statement
        for part in (SEEN, UNSEEN)
        for statement in (
            *_at_points(_pair(report, best, report.test, part), part),
            *_of_fronts(_pair(report, curves, report.front, part), part),
        )
    ]


def _pair(
    report: Report,
    points: Sequence[Sequence[Candidate]],
    measurement: Measurement,
    part: str,
    of: Sequence[int] | None = None,
) -> list[Models]:
    """The models of both contenders, with the seeds that both have; empty where there are none."""
    both = [report.seeds(own, measurement) for own in points]
    seeds = [seed for seed in both[0] if seed in both[1] and (of is None or seed in of)]
    found = [report.models(own, seeds, measurement, part) for own in points]
    return [one for one in found if one is not None]


def _at_points(models: Sequence[Models], part: str) -> list[Statement]:
    """Differences at the operating points."""
    if not models:
        return []

    def differences(drawn: Sequence[np.ndarray]) -> list[float]:
        return [float(drawn[0][0, kind] - drawn[1][0, kind]) for kind in range(len(KINDS))]

    found = resampling.estimates(models, differences)
    return [
        Statement(f"{kind} accuracy at the operating points", part, kind, "", *_size(models), estimate)
        for kind, estimate in zip(KINDS, found, strict=True)
    ]


def _of_fronts(models: Sequence[Models], part: str) -> list[Statement]:
    """Differences at equal clean or robust accuracy, where the fronts share enough for an interval."""
    if not models:
        return []
    found = []
    own = [fronts.front(one.points()) for one in models]
    for kind, equal in enumerate(KINDS):
        span = fronts.common_range(own[0], own[1], kind)
        if span[1] - span[0] < LEAST:
            continue

        def above(drawn: Sequence[np.ndarray], kind: int = kind, span: Span = span) -> list[float]:
            a, b = (fronts.front(points) for points in drawn)
            return [fronts.above(a, b, span, kind)]

        (estimate,) = resampling.estimates(models, above)
        other = KINDS[1 - kind]
        what = f"{other} accuracy at equal {equal} accuracy, mean over {span[0]:.1f} to {span[1]:.1f} %"
        if not math.isnan(estimate.low):
            found.append(Statement(what, part, other, equal, *_size(models), estimate))
    return found


def _size(models: Sequence[Models]) -> tuple[int, int]:
    return models[0].seeds, models[0].images
