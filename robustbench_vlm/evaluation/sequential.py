"""Evaluate in the frozen order of the images until enough is known: a width, or which model is better.

The order of a subset is that of a keyed hash, so its first images are a random draw. Between two looks every
model gets the same further images of every dataset. Verdicts go to the same ledgers as always: a run that was
killed goes on from its last image, comes to the same looks and stops at the same one. The result that is
written then is that of the first n images, and its stop rule tells it apart from results of a fixed number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from robustbench_vlm.data.dataset import TOLERATED, Split
from robustbench_vlm.errors import InputError
from robustbench_vlm.evaluation import measure, planning
from robustbench_vlm.evaluation.cells import Subject
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.evaluation.executor import THIS_PROCESS, Executor
from robustbench_vlm.evaluation.planning import Plan
from robustbench_vlm.evaluation.stages import Report
from robustbench_vlm.models.zoo import Loaded
from robustbench_vlm.results import e_process, mean_interval, ranks, stats, verdicts
from robustbench_vlm.results.stop_rule import StopRule
from robustbench_vlm.store import fingerprint

GROWTH = 1.5
"""Factor between the looks of `until`: each look widens the interval, so there are few."""

Remark = Callable[[str], None]


@dataclass(frozen=True)
class FrozenOrder:
    """The images of a plan, of which the first n can be attacked for any n.

    Attributes:
        plan: whose data are on disk.
        splits: images of every dataset, as many as may be used.
        report: called as images finish.
        remark: called with a line of log.
        executor: who does the model work.
        banks: text embeddings by model and dataset, encoded once.
    """

    plan: Plan
    splits: tuple[Split, ...]
    report: Report
    remark: Remark
    executor: Executor = THIS_PROCESS
    banks: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, report: Report, remark: Remark, executor: Executor = THIS_PROCESS) -> FrozenOrder:
        """Open the data of a plan."""
        return cls(plan, tuple(planning.open_data(plan)), report, remark, executor)

    def tables(self, loaded: Loaded, chain: Chain, n: int) -> Iterator[list[pd.DataFrame]]:
        """Of each dataset, the verdicts on its first `n` images at every radius."""
        settings, suite = self.plan.settings, self.plan.suite
        for split in self.splits:
            first = split.subset(n, settings.seed, stratified=suite.sample == "stratified")
            bank = self.banks.get((loaded.card.sha256, split.card.name))
            subject = Subject.of(loaded, split.card, first, bank, self.tolerated(n)[split.card.name])
            self.banks[loaded.card.sha256, split.card.name] = subject.bank
            yield measure.tables(subject, chain, settings, self.report, self.remark, self.executor.works)

    def finish(self, loaded: Loaded, chain: Chain, n: int, rule: StopRule) -> list[Path]:
        """Write the results of the first `n` images, and return their files."""
        tags = {**self.plan.settings.tags, "stop_rule": rule.text}
        settings = replace(self.plan.settings, chains=(chain,), n=n, tags=tags)
        alone = replace(self.plan, models=(loaded,), settings=settings, tolerated=self.tolerated(n))
        return planning.perform(alone, self.report, self.remark, self.executor)

    def tolerated(self, n: int) -> dict[str, float]:
        """By dataset, the share of the first `n` images that is as many as may be undecodable of all."""
        counts = {split.card.name: (int(TOLERATED * len(split)), len(split)) for split in self.splits}
        return {name: (bad + 0.5) / min(n, images) for name, (bad, images) in counts.items()}


def until(
    plan: Plan, half_width: float, report: Report, remark: Remark, executor: Executor = THIS_PROCESS
) -> list[Path]:
    """Attack each model with each chain until the interval of its mean robust accuracy is narrow enough.

    The interval at every look is so wide that those of all looks hold together (Bonferroni), so it may be
    looked at. At several radii the widest counts.

    Args:
        plan: whose data are on disk.
        half_width: in points.
        report: called as images finish.
        remark: called with a line of log.
        executor: who does the model work.

    Returns:
        The JSON file of every result.
    """
    order, paths = FrozenOrder.of(plan, report, remark, executor), []
    largest = max(len(split) for split in order.splits)
    goal = f"until {half_width:g} points or {plan.settings.n or 'all'} images"
    for loaded in plan.models:
        for chain in plan.settings.chains:
            looks = widening(chain.rows, largest)
            rule = StopRule(goal, len(looks), chain.rows)
            used = largest
            for n in looks:
                reached = _half_width(list(order.tables(loaded, chain, n)), rule)
                remark(f"{loaded.card.name}, {chain.name}: {_images(n)}: ± {reached:.2f} points")
                if reached <= half_width:
                    used = n
                    break
            else:
                remark(f"{loaded.card.name}, {chain.name}: ± {half_width:g} points needs more images")
            paths += order.finish(loaded, chain, used, rule)
    return paths


def widening(block: int, largest: int) -> list[int]:
    """Numbers of images at which the width is looked at: multiples of `block`, and all images at last."""
    looks = [min(block, largest)]
    while looks[-1] < largest:
        following = -(-int(looks[-1] * GROWTH) // block) * block
        looks.append(min(max(following, looks[-1] + block), largest))
    return looks


def _half_width(tables: list[list[pd.DataFrame]], rule: StopRule) -> float:
    """Half the widest interval of the mean over datasets, over all radii, in points."""
    found = []
    for at_radius in zip(*tables, strict=True):
        counts = [(int(verdicts.standing(table).sum()), len(table)) for table in at_radius]
        hits, n = np.array(counts).T
        low, high = mean_interval.limits(hits, n, rule.confidence)
        found.append(50 * float(high - low))
    return max(found)


@dataclass(frozen=True)
class Race:
    """How a race ended.

    Attributes:
        names: of the M models.
        images: of every dataset, that each of the models was attacked on.
        only: (M, M) integers: images that row i alone of the two got right.
        seen: (M, M) integers: images that both were attacked on.
        p: (M, M) p-values, adjusted by Holm.
        log_e: (M, M) logarithms of the greatest E.
        paths: the JSON file of every result.
    """

    names: tuple[str, ...]
    images: tuple[int, ...]
    only: np.ndarray
    seen: np.ndarray
    p: np.ndarray
    log_e: np.ndarray
    paths: tuple[Path, ...]

    @property
    def better(self) -> np.ndarray:
        """(M, M) bool: whether row i was found to be better than row j."""
        found: np.ndarray = (self.p < stats.LEVEL) & (self.only > self.only.T)
        return found

    @property
    def rank_sets(self) -> list[tuple[int, int]]:
        """Best and worst rank of every model."""
        return ranks.rank_sets(self.better)


def race(plan: Plan, block: int, report: Report, remark: Remark) -> Race:
    """Attack models turn and turn about until it is decided which of each pair is the better one.

    A model of which every pair is decided is attacked no more. The race ends at the latest with the images of
    the smallest dataset, since every dataset counts alike.

    Args:
        plan: of two models or more, one chain and one radius; its data are on disk.
        block: images of every dataset from one look to the next.
        report: called as images finish.
        remark: called with a line of log.

    Raises:
        InputError: fewer than two models, one model twice, or several chains or radii.
    """
    require_race(plan)
    order, (chain,), models = FrozenOrder.of(plan, report, remark), plan.settings.chains, plan.models
    largest = min(len(split) for split in order.splits)
    steps = [*range(block, largest, block), largest]
    entered = fingerprint(sorted(loaded.card.sha256 for loaded in models))[:8]
    rule = StopRule(f"race {entered} of {len(models)} models", len(steps), block)
    only = np.zeros((len(models), len(models)), dtype=np.int64)
    seen, images = only.copy(), [0] * len(models)
    looks: list[np.ndarray] = []
    for n in steps:
        going = _undecided(e_process.adjusted(looks)) if looks else np.arange(len(models))
        if not len(going):
            break
        bits = np.stack([_bits(order, models[i], chain, n) for i in going])
        only, seen = only.copy(), seen.copy()
        only[np.ix_(going, going)] = ranks.only_right(bits)
        seen[np.ix_(going, going)] = bits.shape[1]
        looks.append(only)
        for i in going:
            images[i] = n
        remark(_progress(n, e_process.adjusted(looks), [loaded.card.name for loaded in models]))
    paths = [order.finish(loaded, chain, n, rule) for loaded, n in zip(models, images, strict=True)]
    return Race(
        tuple(loaded.card.name for loaded in models),
        tuple(images),
        only,
        seen,
        e_process.adjusted(looks),
        np.max([e_process.log_e(look, look.T) for look in looks], axis=0),
        tuple(path for found in paths for path in found),
    )


def require_race(plan: Plan) -> None:
    """Refuse a race that cannot be run; see `race`."""
    planning.require_frozen_order("race", plan.request, plan.suite)
    prints = [loaded.card.sha256 for loaded in plan.models]
    if len(set(prints)) < 2 or len(set(prints)) < len(prints):
        found = f"{len(prints)} models, {len(set(prints))} of them different"
        raise InputError("race", found, "two different models or more", "name each model once")
    settings = plan.settings
    if len(settings.chains) != 1 or len(settings.ladder) != 1:
        found = f"{len(settings.chains)} attacks and {len(settings.ladder)} radii"
        raise InputError("race", found, "one of each", "choose with --attack and --eps")


def _bits(order: FrozenOrder, loaded: Loaded, chain: Chain, n: int) -> np.ndarray:
    """(K * n,) bool: whether the model is right on each image after the whole chain."""
    tables = [at_radius[-1] for at_radius in order.tables(loaded, chain, n)]
    return np.concatenate([verdicts.standing(table).to_numpy(bool) for table in tables])


def _undecided(p: np.ndarray) -> np.ndarray:
    """Positions of the models with a pair that is not decided."""
    open_pairs = (p >= stats.LEVEL) & ~np.eye(len(p), dtype=bool)
    return np.flatnonzero(open_pairs.any(axis=1))


def _progress(n: int, p: np.ndarray, names: list[str]) -> str:
    pairs = np.triu_indices(len(p), 1)
    going = [names[i] for i in _undecided(p)]
    ended = f"still attacked: {', '.join(going)}" if going else "the race is over"
    return f"{_images(n)}: {int((p[pairs] < stats.LEVEL).sum())} of {len(pairs[0])} pairs decided; {ended}"


def _images(n: int) -> str:
    return f"{n} images a dataset"
