"""What an evaluation costs: its model calls (`calls`), each of them timed on a few rows."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import dataset
from robustbench_vlm.engine import batch_shapes
from robustbench_vlm.errors import InputError
from robustbench_vlm.evaluation import calls, typed_options
from robustbench_vlm.evaluation.calls import Calls
from robustbench_vlm.evaluation.cells import EvalSettings
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.evaluation.planning import Plan
from robustbench_vlm.models import text_bank, zoo
from robustbench_vlm.models.clip import Clip
from robustbench_vlm.results import result_file
from robustbench_vlm.results.contest import Contest
from robustbench_vlm.store import fingerprint
from robustbench_vlm.threat import Threat

LONG = 3600.0  # seconds of worst case from which a smaller command is printed too
REPEATS = 2  # of each timed call, of which the faster one counts
TIMING = 0.5  # seconds that one timed call may take; it gets as many rows as that allows
MOST_ROWS = 64  # of a timed call

# Chosen by eight evaluations of tiny models in benchmarks/prices.md; RN50 was measured afterwards.
PER_CALL = 0.004  # seconds beside the model in every call: bookkeeping of the attack
PER_IMAGE = 0.005  # seconds of an image beside its calls: it is read, hashed, and written to ledgers
PER_CELL = 0.3  # seconds of a cell beside its calls: opening data, verdicts, files
WORST = 1.2  # calls of an attack may be slower than the timed ones, which repeat one image
SURVIVE = 0.5  # share of the images that meet every stage in the typical case

Survive = Callable[[zoo.Loaded, DatasetCard], float]
"""The share of a dataset's images on which a model survives every stage."""


@dataclass(frozen=True)
class Line:
    """Seconds of a call by its rows: a fixed part, and a part for each row."""

    fixed: float
    row: float

    @classmethod
    def through(cls, one: float, many: float, rows: int) -> Line:
        """The line through the seconds of a call of one row and of one of `rows` rows."""
        if rows < 2:
            return cls(0.0, one)
        slope = max(many - one, 0.0) / (rows - 1)
        return cls(max(one - slope, 0.0), slope)

    def at(self, rows: int) -> float:
        """Seconds of a call of so many rows."""
        return self.fixed + rows * self.row


@dataclass(frozen=True)
class Speed:
    """Seconds of the calls of a model.

    Attributes:
        forward: without gradient.
        gradient: with an image gradient, the forward pass included.
        text: of one call of the text tower; 0 where it is not known or no text bank is to be made.
    """

    forward: Line
    gradient: Line
    text: float = 0.0

    def of(self, made: Calls) -> float:
        """Seconds of some calls."""
        forward = self.forward.at(made.rows)
        backward = max(self.gradient.at(made.rows) - forward, 0.0)
        return made.forwards * (forward + PER_CALL) + made.gradients * backward


@dataclass(frozen=True)
class Price:
    """Seconds of an evaluation from the moment at which its models are loaded.

    Attributes:
        least: if every image is broken at once.
        typical: if as many images survive every attack as are expected to; half, unless told otherwise.
        worst: if all do, and some checks of the model are made with finer parts.
    """

    least: float = 0.0
    typical: float = 0.0
    worst: float = 0.0

    def __add__(self, other: Price) -> Price:
        """Of one evaluation after the other."""
        return Price(self.least + other.least, self.typical + other.typical, self.worst + other.worst)


def price(plan: Plan) -> list[str]:
    """Lines that say what an evaluation costs, checks of the models included."""
    settings, sizes = plan.settings, [size(plan, card) for card in plan.datasets]
    threats = [str(Threat(settings.norm, eps)) for eps in settings.ladder]
    count = len(plan.models) * len(plan.datasets) * len(settings.chains) * len(settings.ladder)
    lines = [
        f"{_count(count, 'cell')}: {_count(len(plan.models), 'model')} x "
        f"{_count(len(plan.datasets), 'dataset')} ({_count(sum(sizes), 'image')}) x "
        f"{_count(len(settings.chains), 'attack')} x {', '.join(threats)}"
    ]
    cost, measured = total(plan)
    if measured:
        lines.append(f"{measured} of {_count(count, 'cell')} measured already, in {settings.results}")
    if measured < count:
        lines.append(_sentence(cost, settings))
    for name in dict.fromkeys(plan.request.attacks):
        if (known := reader.SAME.get(("attacks", name), name)) != name:
            lines.append(f"attack {name} is {known} here: {Chain.named(name).card.title}")
    root, split = plan.request.data_root, plan.suite.split
    lacking = [card.name for card in plan.datasets if dataset.missing([card], root, split)]
    if lacking:
        lines.append(f"not below {root} yet: {', '.join(lacking)}")
    if cost.worst > LONG:
        words = [word for loaded in plan.models for word in ("--model", loaded.id)]
        look = f"{shlex.join(words + typed_options.of(plan))}{reader.as_typed()} --attack aa2 --n 100"
        lines.append(f"for a first look: vlmrob eval {look}")
    return lines


def total(
    plan: Plan,
    survive: Survive = lambda *_: SURVIVE,
    speed_of: Callable[[Plan, zoo.Loaded, DatasetCard], Speed] | None = None,
) -> tuple[Price, int]:
    """The price of what is not measured yet, and how many cells are.

    Args:
        plan: of the evaluation.
        survive: share of the images that meet every stage in the typical case.
        speed_of: seconds of the calls of a model on the canvas of a dataset; `measured_speed` by default.
    """
    price, measured = Price(), 0
    speed_of = speed_of or measured_speed
    for loaded in plan.models:
        parts = list(_parts(plan, loaded))
        measured += sum(len(plan.settings.ladder) - part.missing for part in parts)
        todo = [part for part in parts if part.missing]
        banks = {part.card.name: text_bank.calls(loaded.model, _sentences(part.card)) for part in todo}
        if todo:
            speed = speed_of(plan, loaded, todo[0].card)
            if not speed.text and any(banks.values()):
                speed = replace(speed, text=_seconds_of_text(loaded))
            for part in todo:
                price += _price_of(part, speed, plan.settings, survive(loaded, part.card))
            seconds = speed.text * sum(banks.values())
            price += Price(seconds, seconds, seconds)
    return price, measured


def measured_speed(plan: Plan, loaded: zoo.Loaded, card: DatasetCard) -> Speed:
    """Time the calls of a model on the canvas of a dataset."""
    return timed(loaded.model, side(card, loaded), plan.settings.device)


def side(card: DatasetCard, loaded: zoo.Loaded) -> int:
    """H and W of the images of a dataset as the model is given them."""
    return card.native_px if card.canvas == "native" else loaded.model.image_size


def most_rows(plan: Plan) -> int:
    """Rows of the largest model call of an evaluation."""
    found = [1]
    for card in plan.datasets:
        for chain in plan.settings.chains:
            before, cell = _calls_of(_Part(card, chain, size(plan, card), 1), plan.settings, 1.0, worst=True)
            found += [made.rows for made in (before, *cell)]
    return max(found)


def _sentence(price: Price, settings: EvalSettings) -> str:
    """The price in words."""
    where = f"on {settings.device} at its present speed, checks included and start-up not"
    least, typical, worst = map(duration, (price.least, price.typical, price.worst))
    if all(chain.stop != "first" for chain in settings.chains):
        return f"about {typical if typical == worst else f'{typical} to {worst}'} {where}"
    return (
        f"about {typical} {where}, if half of the images survive every attack; {least} if every image is "
        f"broken at once, {worst} if none is"
    )


@dataclass(frozen=True)
class _Part:
    """The cells of one model, dataset and chain.

    Attributes:
        card: of the dataset.
        chain: of attacks.
        n: number of images.
        missing: number of radii that have no result yet.
    """

    card: DatasetCard
    chain: Chain
    n: int
    missing: int


def _parts(plan: Plan, loaded: zoo.Loaded) -> Iterator[_Part]:
    """All parts of a plan that are about one model."""
    for card in plan.datasets:
        folder = result_file.folder_of(plan.settings.results, loaded.card.name, loaded.card.sha256, card.name)
        known, stated = set(), _stated(plan, card)
        for path in sorted(folder.glob("*.json")):
            try:
                result = result_file.read_one(path)
            except InputError:  # a damaged result is measured again, or refused by name when its turn comes
                continue
            if stated.items() <= result.config.items():
                known.add(result.contest)
        for chain in plan.settings.chains:
            missing = sum(contest not in known for contest in _contests(plan, chain))
            yield _Part(card, chain, size(plan, card), missing)


def _stated(plan: Plan, card: DatasetCard) -> dict[str, Any]:
    """What a result of a dataset has in its configuration, as far as the card alone decides it."""
    names = {} if not card.names else {"names_sha256": fingerprint(list(card.names))}
    sentences = names | {"templates_sha256": fingerprint(list(card.templates))}
    return {"dataset_version": card.version, **({} if plan.protocol else sentences)}


def _contests(plan: Plan, chain: Chain) -> Iterator[Contest]:
    """The contest of each radius; a result of the same contest is taken for the one that is asked for."""
    settings = plan.settings
    for rung, eps in enumerate(settings.ladder):
        yield Contest(
            chain.name,
            chain.sha256,
            settings.norm,
            eps,
            settings.ladder[: rung + 1],
            settings.n,
            settings.seed,
            plan.suite.split,
            **settings.numerics,
            **settings.tags,
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size(plan: Plan, card: DatasetCard) -> int:
    """Number of images that are drawn from a dataset, as far as its card knows."""
    there, n = card.size.get(plan.suite.split, 0), plan.settings.n
    return min(n, there) if n and there else n or there


def _price_of(part: _Part, speed: Speed, settings: EvalSettings, survive: float) -> Price:
    """Of the missing cells of a part, in the typical case with a share of survivors."""
    shares = (0.0, survive, 1.0) if part.chain.stop == "first" else (1.0, 1.0, 1.0)
    least, typical = (_seconds_of(part, speed, settings, share, worst=False) for share in shares[:2])
    return Price(least, typical, WORST * _seconds_of(part, speed, settings, shares[2], worst=True))


def _seconds_of(part: _Part, speed: Speed, settings: EvalSettings, share: float, *, worst: bool) -> float:
    """Seconds of the missing cells of a part if a share of the images meets every stage in full."""
    before, cell = _calls_of(part, settings, share, worst=worst)
    seconds = sum(map(speed.of, cell)) + PER_CELL + PER_IMAGE * part.n
    return speed.of(before) + part.missing * seconds


def _calls_of(part: _Part, settings: EvalSettings, share: float, *, worst: bool) -> tuple[Calls, list[Calls]]:
    """Calls that are made once for all radii of a part, and those of each radius."""
    chain, n_classes, rows = part.chain, part.card.n_classes, part.chain.rows
    on_cpu = settings.device.type == "cpu"
    schedule = calls.Schedule.of(settings.backend, rows, settings.batch_size, on_cpu=on_cpu)
    attacked = math.ceil(share * part.n)
    cell = calls.of_cell(chain, n_classes, schedule, part.n, attacked, worst=worst)
    gradients = sum(made.gradients for made in cell)
    called = batch_shapes.of_checks(part.n, rows)
    cell += calls.after(rows, called, gradients, part.n, len(chain.stages), worst=worst)
    white_box = chain.needs(n_classes)["white_box"]
    return calls.before(called, part.n, white_box=white_box, worst=worst), cell


def _sentences(card: DatasetCard) -> list[list[str]]:
    return text_bank.render(card.names, card.templates)


def timed(model: Clip, side: int, device: torch.device) -> Speed:
    """Time calls of a model of one row and of a few rows, without and with the image gradient.

    Args:
        model: on the device.
        side: H and W of the images.
        device: of the model.
    """
    _seconds(model, 1, side, device)  # the first call of all also loads kernels
    one = _fastest(model, 1, side, device)
    rows = int(min(MOST_ROWS, max(1, TIMING / max(one[1], 1e-6))))
    many = _fastest(model, rows, side, device) if rows > 1 else one
    forward, gradient = (Line.through(a, b, rows) for a, b in zip(one, many, strict=True))
    return Speed(forward, gradient)


def _fastest(model: Clip, rows: int, side: int, device: torch.device) -> tuple[float, float]:
    """Least seconds of several calls, without and with the image gradient."""
    found = [_seconds(model, rows, side, device) for _ in range(REPEATS)]
    return min(forward for forward, _ in found), min(gradient for _, gradient in found)


def _seconds(model: Clip, rows: int, side: int, device: torch.device) -> tuple[float, float]:
    """Seconds of one call without and one with the image gradient; reading a number waits for the device."""
    batch = torch.full((rows, 3, side, side), 0.5, device=device)
    started = time.perf_counter()
    with torch.no_grad():
        float(model(batch).sum())
    forward = time.perf_counter()
    wanted = batch.requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(model(wanted).sum(), wanted)
    float(gradient.sum())
    return forward - started, time.perf_counter() - forward


def _seconds_of_text(loaded: zoo.Loaded) -> float:
    """Seconds of one call of the text tower."""
    started = time.perf_counter()
    float(loaded.model.text([""]).sum())
    return time.perf_counter() - started


def duration(seconds: float) -> str:
    """Seconds in words: whole seconds below two minutes, minutes below two hours, then hours."""
    if seconds < 120:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
