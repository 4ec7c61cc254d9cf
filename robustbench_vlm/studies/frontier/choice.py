"""The rule of a frontier study: which trial and interpolation stand for a method, from validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from robustbench_vlm.cards.frontier import Frontier, Measurement, Method, Rule
from robustbench_vlm.studies.frontier.outcomes import Id, Outcome
from robustbench_vlm.studies.frontier.trials import Judging, Trial, trials


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


def tried(study: Frontier, out: Path, known: Mapping[Id, Outcome]) -> list[MethodTrials]:
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


def choices(study: Frontier, tried_: Sequence[MethodTrials]) -> dict[str, Candidate]:
    """What was chosen for every method whose trials are complete, by method."""
    found = {}
    for one in tried_:
        if one.complete(len(study.interpolation)):
            best = chosen(study.rule, one.candidates)
            if best is not None:
                found[one.method.name] = best
    return found


def contender(study: Frontier, family: Sequence[str], made: Mapping[str, Candidate]) -> str | None:
    """The member of a family that the rule prefers; None while a member's trials are incomplete."""
    if any(name not in made for name in family):
        return None
    return max(family, key=lambda name: value(study.rule, made[name]))


def contenders(study: Frontier, made: Mapping[str, Candidate]) -> set[str]:
    """The methods that comparisons are between, as far as they are known."""
    families = [family for pair in study.comparison for family in (pair.a, pair.b)]
    return {name for family in families if (name := contender(study, family, made)) is not None}


def judgings_of_chosen(study: Frontier, out: Path, made: Mapping[str, Candidate]) -> list[Judging]:
    """Everything that is measured of the chosen trials: all of the test, and validation with further seeds.

    Test images are looked at for these alone.
    """
    found = []
    compared = contenders(study, made)
    for name, best in made.items():
        method = next(method for method in study.method if method.name == name)
        for seed in seeds(study, name, made):
            trial = trials(study, method, out, seed)[best.trial.number - 1]
            validation = [Judging(trial, share, study.validation) for share in study.interpolation]
            found += validation + [
                Judging(trial, share, test)
                for test in study.test
                if test.of != "compared" or name in compared
                for share in shares(study, test, best)
            ]
    return found


def seeds(study: Frontier, method: str, made: Mapping[str, Candidate]) -> tuple[int, ...]:
    """The seeds of a method's chosen trial."""
    return study.seeds if method in contenders(study, made) else study.seeds[: study.repeats]


def shares(study: Frontier, test: Measurement, best: Candidate) -> tuple[float, ...]:
    """The interpolations at which a measurement is taken of a chosen trial."""
    return study.interpolation if test.of == "line" else (best.share,)
