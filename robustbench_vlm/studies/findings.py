"""What the runs of a study found out: curves, final accuracies, and differences between paired seeds.

The seed is the unit: a mean and its interval are over seeds, a difference is that of two runs with the same
seed, which saw the same images in the same order. All accuracies are points (percent).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from robustbench_vlm import store
from robustbench_vlm.cards.study import Study
from robustbench_vlm.errors import DataError, InputError
from robustbench_vlm.results import result_file, stats, verdicts
from robustbench_vlm.results.stats import Mean
from robustbench_vlm.studies.runner import Run

SEEN, UNSEEN, VAL = "seen", "unseen", "val"
WHATS = ("clean", "robust")


@dataclass(frozen=True)
class Curve:
    """The probes of one run: steps and accuracies in points, all of one length."""

    steps: tuple[int, ...]
    clean: tuple[float, ...]
    robust: tuple[float, ...]

    def of(self, what: str) -> tuple[float, ...]:
        """The accuracies called `what`."""
        return self.clean if what == "clean" else self.robust


@dataclass(frozen=True)
class Outcome:
    """One finished run.

    Attributes:
        step_seconds: mean time of a training step, probes left out.
        timed: steps that the mean is over.
        clock: `processor`, of a process of one thread; `wall`, on an accelerator.
        right: by dataset, columns `key`, `clean` and `robust` (bool), ordered by key.
        exposure: of each dataset: `seen`, `unseen` or `unknown`.
    """

    run: Run
    curve: Curve
    step_seconds: float
    timed: int
    clock: str
    right: Mapping[str, pd.DataFrame]
    exposure: Mapping[str, str]

    def datasets(self, place: str) -> list[str]:
        """Names of the datasets of that exposure."""
        return [name for name, exposure in self.exposure.items() if exposure == place]

    def accuracy(self, place: str, what: str) -> float:
        """Points: of the last probe for `val`, else the unweighted mean over datasets of that exposure."""
        if place == VAL:
            return self.curve.of(what)[-1]
        shares = [float(self.right[name][what].mean()) for name in self.datasets(place)]
        return 100 * math.fsum(shares) / len(shares)


@dataclass(frozen=True)
class Findings:
    """All runs of a study.

    Attributes:
        outcomes: by arm and seed; every arm has every seed.
        seeds: in the study's order.
    """

    study: Study
    outcomes: Mapping[tuple[str, int], Outcome]
    seeds: tuple[int, ...]

    @cached_property
    def places(self) -> tuple[str, ...]:
        """`val`, and of `seen` and `unseen` those that the suite has datasets of."""
        first = self.of(self.study.baseline)[0]
        return (VAL, *(place for place in (SEEN, UNSEEN) if first.datasets(place)))

    def of(self, arm: str) -> list[Outcome]:
        """The runs of one arm, in the order of the seeds."""
        return [self.outcomes[arm, seed] for seed in self.seeds]

    def pairs(self, arm: str) -> Iterator[tuple[Outcome, Outcome]]:
        """(run, run of the baseline) of each seed."""
        return zip(self.of(arm), self.of(self.study.baseline), strict=True)

    def mean(self, arm: str, place: str, what: str) -> Mean:
        """Points over seeds."""
        return stats.t_mean([run.accuracy(place, what) for run in self.of(arm)])

    def difference(self, arm: str, place: str, what: str) -> Mean:
        """Points above the baseline of the same seed."""
        values = [a.accuracy(place, what) - b.accuracy(place, what) for a, b in self.pairs(arm)]
        return stats.t_mean(values)

    def p_values(self, arm: str, place: str, what: str) -> list[float]:
        """Of the exact McNemar test of each seed, on the images of all datasets of `place` together.

        Raises:
            DataError: two runs that were not judged on the same images.
        """
        found = []
        for a, b in self.pairs(arm):
            names = a.datasets(place)
            left, right = (pd.concat([run.right[name] for name in names]) for run in (a, b))
            if left.key.tolist() != right.key.tolist():
                raise DataError(str(a.run.folder), "judged on other images", f"those of {b.run.folder}")
            found.append(stats.mcnemar(left[what].tolist(), right[what].tolist()).p)
        return found

    def reach(self, arm: str) -> list[float | None]:
        """Of each seed: steps to the last robust accuracy of the baseline's run, at least 1; None: never.

        Accuracy between two probes is taken to be linear; the first crossing counts, for the baseline too.
        """
        found = []
        for a, b in self.pairs(arm):
            at = stats.first_reach(a.curve.steps, a.curve.robust, b.curve.robust[-1])
            found.append(None if at is None else max(at, 1.0))
        return found

    def speedups(self, arm: str, *, timed: bool) -> list[float | None]:
        """Of each seed: the baseline's steps to its own last robust accuracy over the arm's; or its time."""
        found: list[float | None] = []
        own = self.reach(self.study.baseline)
        for at, reference, (a, b) in zip(self.reach(arm), own, self.pairs(arm), strict=True):
            assert reference is not None  # its last probe is the target
            ratio = b.step_seconds / a.step_seconds if timed else 1.0
            found.append(None if at is None else ratio * reference / at)
        return found

    def cost(self, arm: str) -> Mean:
        """Time of a step over that of the baseline with the same seed."""
        return stats.t_mean([a.step_seconds / b.step_seconds for a, b in self.pairs(arm)])


def geometric(ratios: Sequence[float | None]) -> Mean | None:
    """Geometric mean of ratios with the t interval of their logarithms; None if a ratio is missing.

    A run that never reached its target has no ratio, and a mean over the others would flatter.
    """
    if any(ratio is None for ratio in ratios):
        return None
    mean = stats.t_mean([math.log(ratio) for ratio in ratios if ratio is not None])
    return Mean(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high))


def median(values: Sequence[float | None], missing: float) -> float:
    """The median with `missing` in the place of what was never reached: infinitely many steps, ratio 0."""
    return statistics.median([missing if value is None else value for value in values])


def read(study: Study, runs: Sequence[Run]) -> Findings:
    """What the finished runs of a study left on disk.

    Raises:
        InputError: a run is not finished.
        DataError: a log, or a verdict table that its cell was not counted from.
    """
    outcomes = {(run.arm, run.seed): _outcome(study, run) for run in runs}
    return Findings(study, outcomes, tuple(dict.fromkeys(run.seed for run in runs)))


def _outcome(study: Study, run: Run) -> Outcome:
    listed = run.cells(study.final)
    if not listed.exists():
        raise InputError(str(run.folder), "not finished", do=f"run vlmrob study {study.name} again")
    wanted = {run.folder / str(path) for path in store.read_json(listed)}
    right, exposure = {}, {}
    for cell in result_file.read(run.folder / "results"):
        if cell.path in wanted:
            table = cell.verdicts()
            table = table.assign(clean=table.clean_correct, robust=verdicts.standing(table))
            name = str(cell.config["dataset"])
            right[name] = table[["key", "clean", "robust"]].sort_values("key", ignore_index=True)
            exposure[name] = str(cell.outcome["exposure"])
    lines = list(store.records(run.folder / "model" / "log.jsonl"))
    seconds, timed, clock = _clock(run, lines)
    return Outcome(run, _curve(run, lines), seconds, timed, clock, right, exposure)


def _curve(run: Run, lines: Sequence[Mapping[str, object]]) -> Curve:
    probes = {int(str(line["step"])): line["probe"] for line in lines if "probe" in line}
    accuracies: dict[str, tuple[float, ...]] = {}
    for what in WHATS:
        try:
            accuracies[what] = tuple(100 * float(probe[what]) for probe in probes.values())  # type: ignore[index]
        except (KeyError, TypeError):
            where = str(run.folder / "model" / "log.jsonl")
            raise DataError(where, f"a probe without {what!r}", "clean and robust accuracy") from None
    return Curve(tuple(probes), accuracies["clean"], accuracies["robust"])


def _clock(run: Run, lines: Sequence[Mapping[str, object]]) -> tuple[float, int, str]:
    """(mean seconds of a step, steps timed, kind of clock)."""
    known = {line["step"]: float(line["cpu"]) for line in store.records(run.folder / "clock.jsonl")}
    if known:  # a step that was done again counts once
        return math.fsum(known.values()) / len(known), len(known), "processor"
    rates = [float(str(line["images_per_second"])) for line in lines if "images_per_second" in line]
    batch = run.recipe.optim.batch_size
    return math.fsum(batch / rate for rate in rates) / len(rates), len(rates), "wall"
