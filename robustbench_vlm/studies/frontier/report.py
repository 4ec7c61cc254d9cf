"""What is known of a frontier study: its trials, what was chosen, and the verdicts of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from robustbench_vlm.cards.study import Measurement, Study
from robustbench_vlm.studies.frontier import choice
from robustbench_vlm.studies.frontier.choice import Candidate, MethodTrials
from robustbench_vlm.studies.frontier.outcomes import KINDS, Id, Outcome
from robustbench_vlm.studies.frontier.resampling import Models
from robustbench_vlm.studies.frontier.trials import Judging, Trial, fingerprint, trials


@dataclass(frozen=True)
class Report:
    """A study and its outcomes, complete or not.

    Attributes:
        study: the card.
        out: folder of the runs, which need not exist.
        known: outcomes.
    """

    study: Study
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
