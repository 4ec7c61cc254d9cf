"""What the runs of a study found out: curves, final accuracies, and differences between paired seeds.

The seed is the unit: a mean and its interval are over seeds, and a difference is that of two runs with the
same seed, which saw the same images in the same order. All accuracies are points (percent).

Accuracies have a part and a kind. Parts are `val`, the last validation probe; `seen` and `unseen`, the mean
over the test datasets that were or were not met in training. Kinds are `clean` and `robust`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from robustbench_vlm import store
from robustbench_vlm.cards.study import Study
from robustbench_vlm.errors import DataError, InputError
from robustbench_vlm.results import result_file, stats, verdicts
from robustbench_vlm.results.result_file import Result
from robustbench_vlm.results.stats import Mean
from robustbench_vlm.studies import clock
from robustbench_vlm.studies.runner import StudyRun

SEEN, UNSEEN, VAL = "seen", "unseen", "val"
KINDS = ("clean", "robust")
MEASURES = {"robust": (SEEN, "robust"), "zeroshot": (UNSEEN, "clean")}
"""What a claim of a paper is compared with: part of the test, kind of accuracy."""


@dataclass(frozen=True)
class Curve:
    """The validation probes of one run: training steps and accuracies in points, all of one length."""

    steps: tuple[int, ...]
    clean: tuple[float, ...]
    robust: tuple[float, ...]

    def of(self, kind: str) -> tuple[float, ...]:
        """The clean or the robust accuracies."""
        return self.clean if kind == "clean" else self.robust


@dataclass(frozen=True)
class FinishedRun:
    """What one run left on disk.

    Attributes:
        run: arm, seed, recipe and folder.
        curve: of the validation probe.
        step_seconds: mean time of a training step, probes excluded.
        timed: number of steps that the mean is over.
        clock: `processor`, of a process of one thread; `wall`, on an accelerator.
        verdicts: by dataset, columns `key`, `clean` and `robust` (bool: right), ordered by key.
        exposure: by dataset: `seen`, `unseen` or `unknown`; `unknown` too where runs of the study differ.
    """

    run: StudyRun
    curve: Curve
    step_seconds: float
    timed: int
    clock: str
    verdicts: Mapping[str, pd.DataFrame]
    exposure: Mapping[str, str]

    def datasets(self, part: str) -> list[str]:
        """Names of the datasets of a part, `seen` or `unseen`."""
        return [name for name, exposure in self.exposure.items() if exposure == part]

    def accuracy(self, part: str, kind: str) -> float:
        """Points: of the last probe for `val`, else the unweighted mean over the datasets of the part."""
        if part == VAL:
            return self.curve.of(kind)[-1]
        shares = [float(self.verdicts[name][kind].mean()) for name in self.datasets(part)]
        return 100 * math.fsum(shares) / len(shares)


@dataclass(frozen=True)
class Findings:
    """All runs of a study.

    Attributes:
        study: the card.
        finished: by arm and seed; every arm has every seed.
        seeds: in the study's order.
    """

    study: Study
    finished: Mapping[tuple[str, int], FinishedRun]
    seeds: tuple[int, ...]

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """`val`, then `seen` and `unseen` where the suite has such datasets."""
        first = self.of(self.study.baseline)[0]
        return (VAL, *(part for part in (SEEN, UNSEEN) if first.datasets(part)))

    def of(self, arm: str) -> list[FinishedRun]:
        """The runs of one arm, in the order of the seeds."""
        return [self.finished[arm, seed] for seed in self.seeds]

    def pairs(self, arm: str) -> Iterator[tuple[FinishedRun, FinishedRun]]:
        """(run, run of the baseline) of each seed."""
        return zip(self.of(arm), self.of(self.study.baseline), strict=True)

    def mean(self, arm: str, part: str, kind: str) -> Mean:
        """Points over seeds."""
        return stats.t_mean([run.accuracy(part, kind) for run in self.of(arm)])

    def difference(self, arm: str, part: str, kind: str) -> Mean:
        """Points above the baseline of the same seed."""
        values = [a.accuracy(part, kind) - b.accuracy(part, kind) for a, b in self.pairs(arm)]
        return stats.t_mean(values)

    def p_values(self, arm: str, part: str, kind: str) -> list[float]:
        """P of the exact McNemar test of each seed, on the images of all datasets of the part together.

        Raises:
            DataError: two runs that were not evaluated on the same images.
        """
        found = []
        for a, b in self.pairs(arm):
            names = a.datasets(part)
            of_a, of_b = (pd.concat([run.verdicts[name] for name in names]) for run in (a, b))
            if of_a.key.tolist() != of_b.key.tolist():
                do = "run the study again with one data folder"
                raise DataError(
                    str(a.run.folder), "evaluated on other images", f"those of {b.run.folder}", do
                )
            found.append(stats.mcnemar(of_a[kind].tolist(), of_b[kind].tolist()).p)
        return found

    def reach(self, arm: str) -> list[float | None]:
        """Steps until an arm first has the last robust accuracy of the baseline's run, for each seed.

        Accuracy between two probes is taken to be linear, and the same rule is applied to the baseline's own
        curve. A step count is at least 1; None where the arm never gets there.
        """
        found = []
        for a, b in self.pairs(arm):
            at = stats.first_reach(a.curve.steps, a.curve.robust, b.curve.robust[-1])
            found.append(None if at is None else max(at, 1.0))
        return found

    def speedups(self, arm: str, *, timed: bool) -> list[float | None]:
        """The baseline's steps to its own last robust accuracy over the arm's steps to it, for each seed.

        Args:
            arm: name of the arm.
            timed: compare seconds of training instead of steps.
        """
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
    """The median, with `missing` for what was never reached: infinitely many steps, or a ratio of 0."""
    return statistics.median([missing if value is None else value for value in values])


def read(study: Study, runs: Sequence[StudyRun]) -> Findings:
    """What the finished runs of a study left on disk.

    Raises:
        InputError: a run is not finished.
        DataError: a log that cannot be read, or verdicts that a result was not counted from.
    """
    finished = {(run.arm, run.seed): _finished(study, run) for run in runs}
    said = [run.exposure for run in finished.values()]
    common = {
        name: exposure if all(one[name] == exposure for one in said) else "unknown"
        for name, exposure in said[0].items()
    }
    alike = {key: replace(run, exposure=common) for key, run in finished.items()}
    return Findings(study, alike, tuple(dict.fromkeys(run.seed for run in runs)))


def _finished(study: Study, run: StudyRun) -> FinishedRun:
    listed = run.cells(study.final)
    if not listed.exists():
        raise InputError(str(run.folder), "not finished", do=f"run vlmrob study {study.name} again")
    results = _final_results(run, {run.folder / str(path) for path in store.read_json(listed)})
    right = {}
    for result in results:
        table = result.verdicts()
        table = table.assign(clean=table.clean_correct, robust=verdicts.standing(table))
        right[result.dataset] = table[["key", "clean", "robust"]].sort_values("key", ignore_index=True)
    exposure = {result.dataset: str(result.outcome["exposure"]) for result in results}
    lines = list(store.records(run.folder / "model" / "log.jsonl"))
    seconds, timed, clock = _clock(run, lines)
    return FinishedRun(run, _curve(run, lines), seconds, timed, clock, right, exposure)


def _final_results(run: StudyRun, paths: set[Path]) -> list[Result]:
    """The results of the final attack, which must be one contest: one radius, one chain, one draw."""
    results = [result for result in result_file.read(run.folder / "results") if result.path in paths]
    contests = list(dict.fromkeys(result.contest for result in results))
    if len(contests) > 1:
        found = f"results of {' and '.join(contest.title for contest in contests)}"
        do = "give the study's suite one radius"
        raise DataError(str(run.folder), found, "one attack at one radius", do)
    return results


def _curve(run: StudyRun, lines: Sequence[Mapping[str, object]]) -> Curve:
    probes = {int(str(line["step"])): line["probe"] for line in lines if "probe" in line}
    accuracies: dict[str, tuple[float, ...]] = {}
    for kind in KINDS:
        try:
            accuracies[kind] = tuple(100 * float(probe[kind]) for probe in probes.values())  # type: ignore[index]
        except (KeyError, TypeError):
            where = str(run.folder / "model" / "log.jsonl")
            raise DataError(where, f"a probe without {kind!r}", "clean and robust accuracy") from None
    return Curve(tuple(probes), accuracies["clean"], accuracies["robust"])


def _clock(run: StudyRun, lines: Sequence[Mapping[str, object]]) -> tuple[float, int, str]:
    """(mean seconds of a step, steps timed, kind of clock)."""
    timed = clock.step_seconds(run.folder)
    if timed is not None:
        return *timed, "processor"
    rates = [float(str(line["images_per_second"])) for line in lines if "images_per_second" in line]
    batch = run.recipe.optim.batch_size
    return math.fsum(batch / rate for rate in rates) / len(rates), len(rates), "wall"
