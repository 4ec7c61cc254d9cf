"""What is known of a frontier study: trials, choices, and the verdicts that comparisons are counted from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from robustbench_vlm.cards.frontier import Comparison, Frontier, Measurement
from robustbench_vlm.studies.frontier import choice, fronts, resampling
from robustbench_vlm.studies.frontier.choice import Candidate, MethodTrials
from robustbench_vlm.studies.frontier.outcomes import KINDS, Id, Outcome
from robustbench_vlm.studies.frontier.resampling import Estimate, Models
from robustbench_vlm.studies.frontier.trials import Judging, Trial, fingerprint, trials

Span = tuple[float, float]
SEEN, UNSEEN, VALIDATION = "seen", "unseen", "validation"


@dataclass(frozen=True)
class Report:
    """A study and its outcomes, complete or not.

    Attributes:
        study: the card.
        out: folder of the runs, which need not exist.
        known: outcomes.
    """

    study: Frontier
    out: Path
    known: Mapping[Id, Outcome]
    _seeded: dict[tuple[str, int], list[Trial]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def tried(self) -> list[MethodTrials]:
        """Trials of every method."""
        return choice.tried(self.study, self.out, self.known)

    @cached_property
    def choices(self) -> dict[str, Candidate | None]:
        """See `choice.choices`."""
        return choice.choices(self.study, self.tried)

    @cached_property
    def made(self) -> dict[str, Candidate]:
        """The choice of every method that has one."""
        return {name: best for name, best in self.choices.items() if best is not None}

    @property
    def test(self) -> Measurement | None:
        """The first test: operating points are compared by it."""
        return next(iter(self.study.test), None)

    @property
    def front(self) -> Measurement | None:
        """The test that fronts are read from: that of all that lies on them, or else the first one."""
        return next((test for test in self.study.test if test.of == "front"), self.test)

    def of(self, method: str) -> MethodTrials:
        """The trials of a method."""
        return next(one for one in self.tried if one.method.name == method)

    def trial(self, point: Candidate, seed: int) -> Trial:
        """A point's trial with another seed."""
        place = (point.trial.method, seed)
        if place not in self._seeded:
            self._seeded[place] = trials(self.study, self.of(point.trial.method).method, self.out, seed)
        return self._seeded[place][point.trial.number - 1]

    def outcome(self, point: Candidate, seed: int, measurement: Measurement) -> Outcome:
        """What came out for a point with a seed of `seeds`."""
        return self.known[self._id(point, seed, measurement)]

    def seeds(self, points: Sequence[Candidate], measurement: Measurement) -> list[int]:
        """The seeds with which every one of some points of a method was measured."""
        return [
            seed
            for seed in choice.seeds(self.study, points[0].trial.method, self.choices)
            if all(self._id(point, seed, measurement) in self.known for point in points)
        ]

    def _id(self, point: Candidate, seed: int, measurement: Measurement) -> Id:
        return Judging(self.trial(point, seed), point.share, measurement).id

    def names(self, measurement: Measurement, exposure: str = "") -> list[str]:
        """The datasets of a measurement; with an exposure, those that have it for every model."""
        judged = fingerprint(measurement)
        measured = [outcome.datasets for id_, outcome in self.known.items() if id_[2] == judged]
        return [
            name
            for name in (measured[0] if measured else ())
            if not exposure or all(one[name].exposure == exposure for one in measured)
        ]

    def models(
        self, points: Sequence[Candidate], seeds: Sequence[int], measurement: Measurement, exposure: str = ""
    ) -> Models | None:
        """The verdicts of a method's points; None without a seed, or without a dataset.

        Args:
            points: of one method.
            seeds: with which all of them were measured.
            measurement: which one.
            exposure: only the datasets that are `seen` or `unseen` for every model; empty: all.
        """
        found = [[self.outcome(point, seed, measurement) for point in points] for seed in seeds]
        if not found:
            return None
        names = self.names(measurement, exposure)
        verdicts = {
            name: np.array(
                [[[one.datasets[name].of(kind) for kind in KINDS] for one in row] for row in found]
            )
            for name in names
        }
        return Models(verdicts) if names else None

    def of_chosen(self, method: str, measurement: Measurement, exposure: str = "") -> Models | None:
        """The chosen point of a method with every seed that is known."""
        best = [self.made[method]]
        return self.models(best, self.seeds(best, measurement), measurement, exposure)

    @property
    def hidden(self) -> int:
        """Test outcomes in the ledger of what was not chosen; they are not shown."""
        tests = {fingerprint(test) for test in self.study.test}
        chosen = {judging.id for judging in choice.judgings_of_chosen(self.study, self.out, self.tried)}
        return sum(id_[2] in tests and id_ not in chosen for id_ in self.known)

    def hours(self) -> float:
        """Processor hours of all trainings and measurements."""
        trainings = {id_[0]: outcome.hours[0] for id_, outcome in self.known.items()}
        return sum(trainings.values()) + sum(outcome.hours[1] for outcome in self.known.values())


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
        if span is None:
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
