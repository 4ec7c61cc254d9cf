"""What is known of a frontier study: trials, choices, and the verdicts that comparisons are counted from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from robustbench_vlm.cards.frontier import Comparison, Frontier, Measurement
from robustbench_vlm.studies.frontier import choice, fronts, resampling
from robustbench_vlm.studies.frontier.choice import Candidate, MethodTrials
from robustbench_vlm.studies.frontier.outcomes import KINDS, Id, Outcome
from robustbench_vlm.studies.frontier.resampling import Estimate, Models
from robustbench_vlm.studies.frontier.trials import Judging, Trial, trials

SEEN, UNSEEN = "seen", "unseen"


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

    @cached_property
    def tried(self) -> list[MethodTrials]:
        """Trials of every method."""
        return choice.tried(self.study, self.out, self.known)

    @cached_property
    def made(self) -> dict[str, Candidate]:
        """The choice of every method whose trials are complete."""
        return choice.choices(self.study, self.tried)

    @property
    def line(self) -> Measurement | None:
        """The first test at all interpolations, by which methods are compared."""
        return next((test for test in self.study.test if test.of == "line"), None)

    def runs(self, method: str) -> list[Trial]:
        """The chosen trial of a method with every seed that it has a validation outcome for."""
        best = self.made[method]
        found = []
        for seed in choice.seeds(self.study, method, self.made):
            card = next(one.method for one in self.tried if one.method.name == method)
            trial = trials(self.study, card, self.out, seed)[best.trial.number - 1]
            if Judging(trial, best.share, self.study.validation).id in self.known:
                found.append(trial)
        return found

    def models(
        self, runs: Sequence[Trial], shares: Sequence[float], measurement: Measurement, exposure: str = ""
    ) -> Models | None:
        """The verdicts of some runs at some interpolations; None unless all of them are known.

        Args:
            runs: a trial with its seeds.
            shares: of the trained weights.
            measurement: which one.
            exposure: only the datasets that are `seen` or `unseen`; empty: all.
        """
        ids = [[Judging(run, share, measurement).id for share in shares] for run in runs]
        if not ids or any(id_ not in self.known for row in ids for id_ in row):
            return None
        first = self.known[ids[0][0]].datasets
        names = [name for name, one in first.items() if exposure in ("", one.exposure)]
        if not names:
            return None
        verdicts = {
            name: np.stack(
                [
                    np.stack(
                        [np.stack([self.known[id_].datasets[name].of(kind) for kind in KINDS]) for id_ in row]
                    )
                    for row in ids
                ]
            )
            for name in names
        }
        return Models(verdicts)

    def measured_runs(self, method: str, measurement: Measurement) -> list[Trial]:
        """The seeds of a method's chosen trial for which a measurement is complete."""
        shares = choice.shares(self.study, measurement, self.made[method])
        return [
            run
            for run in self.runs(method)
            if all(Judging(run, share, measurement).id in self.known for share in shares)
        ]

    def of_chosen(self, method: str, measurement: Measurement, exposure: str = "") -> Models | None:
        """The chosen trial at the chosen interpolation."""
        runs = self.measured_runs(method, measurement)
        return self.models(runs, [self.made[method].share], measurement, exposure)

    @property
    def hidden(self) -> int:
        """Test outcomes in the ledger that belong to no chosen trial; they are not shown."""
        chosen = {judging.id for judging in choice.judgings_of_chosen(self.study, self.out, self.made)}
        validation = {
            Judging(trial, share, self.study.validation).id
            for one in self.tried
            for trial in one.trials
            for share in self.study.interpolation
        }
        return len(self.known.keys() - chosen - validation)

    def hours(self) -> float:
        """Processor hours of all trainings and measurements."""
        trainings = {id_[0]: outcome.hours[0] for id_, outcome in self.known.items()}
        return sum(trainings.values()) + sum(outcome.hours[1] for outcome in self.known.values())


@dataclass(frozen=True)
class Statement:
    """One thing that is said of A against B.

    Attributes:
        what: in words.
        part: `seen` or `unseen`.
        kind: `clean` or `robust`: what the difference is of.
        estimate: A minus B, in points.
    """

    what: str
    part: str
    kind: str
    estimate: Estimate


@dataclass(frozen=True)
class Compared:
    """A comparison with its contenders.

    Attributes:
        comparison: the card's.
        a, b: the methods that the rule prefers.
        seeds: seeds that both have.
        images: by part.
        statements: on test images.
    """

    comparison: Comparison
    a: str
    b: str
    seeds: int
    images: Mapping[str, int]
    statements: tuple[Statement, ...]


def compared(report: Report, comparison: Comparison) -> Compared | None:
    """A comparison, as far as its contenders are known and were tested; else None."""
    names = [choice.contender(report.study, family, report.made) for family in (comparison.a, comparison.b)]
    line, shares = report.line, report.study.interpolation
    if line is None or names[0] is None or names[1] is None:
        return None
    a, b = names[0], names[1]
    both = [{run.seed: run for run in report.measured_runs(name, line)} for name in (a, b)]
    seeds = [seed for seed in report.study.seeds if all(seed in one for one in both)]
    if not seeds:
        return None
    statements: list[Statement] = []
    images = {}
    at = [shares.index(report.made[name].share) for name in (a, b)]
    for part in (SEEN, UNSEEN):
        found = [report.models([one[seed] for seed in seeds], shares, line, part) for one in both]
        if found[0] is None or found[1] is None:
            continue
        images[part] = found[0].images
        statements += _statements([found[0], found[1]], part, at)
    return Compared(comparison, a, b, len(seeds), images, tuple(statements))


def _statements(models: list[Models], part: str, at: list[int]) -> list[Statement]:
    """Differences at the operating points, and of the fronts."""
    points = [one.points() for one in models]
    level = float(points[1][at[1], fronts.CLEAN])
    words = [f"{kind} accuracy at the operating points" for kind in KINDS]
    words += [f"robust accuracy at the clean accuracy of B's operating point, {level:.1f} %"]
    span = fronts.common_range(*map(fronts.front, points))
    between = f", {span[0]:.1f} to {span[1]:.1f} %" if span else ""
    words += [f"robust accuracy, mean over the shared clean accuracies{between}"]

    def differences(drawn: Sequence[np.ndarray]) -> list[float]:
        a, b = (fronts.front(one) for one in drawn)
        own = [float(drawn[0][at[0], kind] - drawn[1][at[1], kind]) for kind in range(len(KINDS))]
        equal = fronts.at_equal(a, fronts.CLEAN, level) - fronts.at_equal(b, fronts.CLEAN, level)
        return [*own, equal, _above(a, b)]

    found = resampling.estimates(models, differences)
    kinds = (*KINDS, "robust", "robust")
    return [
        Statement(what, part, kind, estimate)
        for what, kind, estimate in zip(words, kinds, found, strict=True)
        if not math.isnan(estimate.value)
    ]


def _above(a: np.ndarray, b: np.ndarray) -> float:
    """Mean height of front A over front B, over the clean accuracies that they share."""
    span = fronts.common_range(a, b)
    return math.nan if span is None else fronts.height(a, *span) - fronts.height(b, *span)
