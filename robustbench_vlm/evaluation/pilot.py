"""A pilot run: a few images of each dataset are attacked by the first stage of a chain, before an evaluation.

What an evaluation costs depends most on the share of images that survive, which nobody knows before the
attack. The pilot measures that share on few images, and how its own seconds compare with its price.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import dataset
from robustbench_vlm.evaluation import estimate, planning
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.evaluation.estimate import Speed
from robustbench_vlm.evaluation.planning import Plan
from robustbench_vlm.evaluation.stages import Report
from robustbench_vlm.models import text_bank
from robustbench_vlm.models.zoo import Loaded
from robustbench_vlm.results import result_file

BUDGET = 30.0  # seconds that the pilot may take by its price
IMAGES = (32, 16, 8)  # of each dataset: as many as the budget allows


@dataclass(frozen=True)
class Pilot:
    """What a few attacked images told.

    Attributes:
        shares: of the images that survive, one share a radius, by fingerprint of the model and name of the
            dataset.
        images: attacked of each of these datasets; 0 if there was no time for any.
        factor: seconds of the pilot over its price.
        seconds: that it took.
    """

    shares: Mapping[tuple[str, str], tuple[float, ...]] = field(default_factory=dict)
    images: int = 0
    factor: float = 1.0
    seconds: float = 0.0

    def of(self, loaded: Loaded, card: DatasetCard, radii: int) -> tuple[float, ...]:
        """Share of the images that survive, one a radius.

        A pair that was not attacked has the mean of the model's other datasets, or half where there are none.
        """
        model = loaded.card.sha256
        if (model, card.name) in self.shares:
            return self.shares[model, card.name]
        others = [shares for (other, _), shares in self.shares.items() if other == model]
        if not others:
            return (estimate.SURVIVE,) * radii
        return tuple(sum(column) / len(others) for column in zip(*others, strict=True))


class Speeds:
    """Speeds of the models of a plan; each model is timed once a canvas."""

    def __init__(self) -> None:
        """No speed is known yet."""
        self._known: dict[tuple[str, int], Speed] = {}

    def __call__(self, plan: Plan, loaded: Loaded, card: DatasetCard) -> Speed:
        """See `estimate.measured_speed`."""
        key = loaded.card.sha256, estimate.side(card, loaded)
        if key not in self._known:
            self._known[key] = estimate.measured_speed(plan, loaded, card)
        return self._known[key]


def run(plan: Plan, speeds: Speeds, report: Report) -> Pilot:
    """Attack a few images of the datasets that are on disk; results are thrown away.

    Class sentences are encoded before the clock starts, and stay in the cache for the evaluation.

    Args:
        plan: of the evaluation.
        speeds: of its models.
        report: called as images finish.
    """
    with TemporaryDirectory() as folder:
        chosen = _affordable(plan, Path(folder), speeds)
        if chosen is None:
            return Pilot()
        for split in planning.open_data(chosen):
            for loaded in chosen.models:
                text_bank.text_bank(loaded.model, text_bank.render(split.card.names, split.card.templates))
        started = time.perf_counter()
        paths = planning.perform(chosen, report)
        seconds = time.perf_counter() - started
        shares: dict[tuple[str, str], tuple[float, ...]] = {}
        for path in paths:  # radii ascend
            found = result_file.read_one(path)
            pair, counts = (found.model[1], found.dataset), found.outcome
            robust = counts["robust"][found.stages[-1]] / counts["n"]
            shares[pair] = (*shares.get(pair, ()), robust)
        unmeasured = _at(chosen, Path(folder) / "empty")
        price, _ = estimate.total(unmeasured, mean_shares(shares), speeds)
    return Pilot(shares, chosen.settings.n, seconds / price.typical, seconds)


def mean_shares(shares: Mapping[tuple[str, str], tuple[float, ...]]) -> estimate.Survive:
    """The share of survivors of a pair as `estimate.total` wants it: the mean over radii."""

    def survive(loaded: Loaded, card: DatasetCard) -> float:
        found = shares[loaded.card.sha256, card.name]
        return sum(found) / len(found)

    return survive


def _affordable(plan: Plan, results: Path, speeds: Speeds) -> Plan | None:
    """The largest pilot within the budget; None if the smallest is over it, or no dataset is on disk."""
    for smaller in _candidates(plan, results):
        if estimate.total(smaller, speed_of=speeds)[0].typical <= BUDGET:
            return smaller
    return None


def _candidates(plan: Plan, results: Path) -> Iterator[Plan]:
    """Pilots from the largest to the smallest: fewer images of each dataset, then fewer datasets."""
    root, split = plan.request.data_root, plan.suite.split
    there = tuple(card for card in plan.datasets if not dataset.missing([card], root, split))
    card = plan.settings.chains[0].card
    first = Chain.of(card.model_copy(update={"stage": card.stage[:1]}))
    settings = replace(plan.settings, chains=(first,), save_images=False, suite=None)
    small = _at(replace(plan, settings=settings), results)
    numbers = [min(n, settings.n or n) for n in IMAGES]
    if there:
        for n in numbers:
            yield replace(small, datasets=there, settings=replace(small.settings, n=n))
    every = 2  # suites list like beside like, so every other dataset stands for all
    while every < 2 * len(there):
        yield replace(small, datasets=there[::every], settings=replace(small.settings, n=numbers[-1]))
        every *= 2


def _at(plan: Plan, results: Path) -> Plan:
    """The plan with another folder of results."""
    return replace(plan, settings=replace(plan.settings, results=results))
