"""The rule of a frontier study: which trial and interpolation stand for a method, from validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from robustbench_vlm.cards.study import Measurement, Method, Rule, Study
from robustbench_vlm.studies.frontier import fronts
from robustbench_vlm.studies.frontier.outcomes import Id, Outcome
from robustbench_vlm.studies.frontier.trials import Judging, Trial, trials

ALL = ("line", "chosen")
"""The tests that every method takes; the others are for the methods that are compared."""

Choices = Mapping[str, "Candidate | None"]
"""See `choices`."""


@dataclass(frozen=True)
class Candidate:
    """A trial at one interpolation, with its accuracies on validation images, in points."""

    trial: Trial
    share: float
    clean: float
    robust: float


@dataclass(frozen=True)
class MethodTrials:
    """The trials of a method, and what is known about them.

    Attributes:
        method: the card's.
        trials: in the order of the grid, with the first seed.
        candidates: of those that were judged, at every interpolation; trial by trial.
    """

    method: Method
    trials: tuple[Trial, ...]
    candidates: tuple[Candidate, ...]

    def complete(self, shares: int) -> bool:
        """Whether every trial was judged at every interpolation, so that one may be chosen."""
        return len(self.candidates) == len(self.trials) * shares


def tried(study: Study, out: Path, known: Mapping[Id, Outcome]) -> list[MethodTrials]:
    """The trials of every method of a study.

    Raises:
        CardError: see `trials.trials`.
    """
    found = []
    for method in study.method:
        own = tuple(trials(study, method, out, study.seeds[0]))
        candidates = []
        for trial in own:
            for share in study.interpolation:
                outcome = known.get(Judging(trial, share, study.validation).id)
                if outcome is not None:
                    clean, robust = outcome.mean("clean"), outcome.mean("robust")
                    candidates.append(Candidate(trial, share, clean, robust))
        found.append(MethodTrials(method, own, tuple(candidates)))
    return found


def value(rule: Rule, candidate: Candidate) -> float:
    """What the rule compares, in points; minus infinity for what is below its floor."""
    if rule.highest == "mean":
        return (candidate.clean + candidate.robust) / 2
    wanted, other = candidate.clean, candidate.robust
    if rule.highest == "robust":
        wanted, other = other, wanted
    assert rule.floor is not None
    return wanted if other >= rule.floor else float("-inf")


def chosen(rule: Rule, candidates: Sequence[Candidate]) -> Candidate | None:
    """The first candidate with the highest value; None if none reaches the floor of the rule."""
    best = max(candidates, key=lambda one: value(rule, one), default=None)
    return None if best is None or value(rule, best) == float("-inf") else best


def choices(study: Study, tried_: Sequence[MethodTrials]) -> dict[str, Candidate | None]:
    """What was chosen for every method whose trials are complete; None where nothing reaches the floor."""
    return {
        one.method.name: chosen(study.rule, one.candidates)
        for one in tried_
        if one.complete(len(study.interpolation))
    }


def contender(study: Study, family: Sequence[str], made: Choices) -> str | None:
    """The member of a family that the rule prefers.

    None while a member's trials are incomplete, or where no member has a choice.
    """
    if any(name not in made for name in family):
        return None
    best = {name: candidate for name in family if (candidate := made[name]) is not None}
    return max(best, key=lambda name: value(study.rule, best[name]), default=None)


def contenders(study: Study, made: Choices) -> set[str]:
    """The methods that comparisons are between, as far as they are known."""
    families = [family for pair in study.comparison for family in (pair.a, pair.b)]
    return {name for family in families if (name := contender(study, family, made)) is not None}


def on_front(one: MethodTrials) -> list[int]:
    """The numbers of the candidates on a method's front on validation images, by rising clean accuracy."""
    if not one.candidates:
        return []
    accuracies = np.array([(candidate.clean, candidate.robust) for candidate in one.candidates])
    return [int(index) for index in fronts.on_front(accuracies)]


def measured(measurement: Measurement, one: MethodTrials, best: Candidate) -> list[Candidate]:
    """What a measurement is taken of: see `Measurement.of`.

    Args:
        measurement: a test.
        one: a method's trials, complete.
        best: the chosen candidate of the method.
    """
    if measurement.of == "front":
        return [one.candidates[index] for index in on_front(one)]
    if measurement.of == "line":
        return [candidate for candidate in one.candidates if candidate.trial == best.trial]
    return [best]


def judgings_of_chosen(study: Study, out: Path, tried_: Sequence[MethodTrials]) -> list[Judging]:
    """Everything that is measured of what was chosen: all tests, and validation with further seeds.

    Test images are looked at for these alone.
    """
    found: dict[Id, Judging] = {}
    made = choices(study, tried_)
    compared = contenders(study, made)
    for one in tried_:
        best = made.get(one.method.name)
        if best is None:
            continue
        tests = [test for test in study.test if test.of in ALL or one.method.name in compared]
        points = [(test, point) for test in tests for point in measured(test, one, best)]
        for count, seed in enumerate(seeds(study, one.method.name, made), 1):
            own = trials(study, one.method, out, seed)
            chosen_trial = own[best.trial.number - 1]
            wanted = [Judging(chosen_trial, share, study.validation) for share in study.interpolation]
            wanted += [
                Judging(own[point.trial.number - 1], point.share, test)
                for test, point in points
                if count <= (test.repeats or count)
            ]
            for judging in wanted:
                found.setdefault(judging.id, judging)  # two tests may have a point in common
    return list(found.values())


def seeds(study: Study, method: str, made: Choices) -> tuple[int, ...]:
    """The seeds of a method's chosen trial."""
    return study.seeds if method in contenders(study, made) else study.seeds[: study.repeats]
