"""What an evaluation costs at most, from one small timed call of each model."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import dataset
from robustbench_vlm.errors import InputError
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.evaluation.planning import Plan
from robustbench_vlm.models import zoo
from robustbench_vlm.results import result_file
from robustbench_vlm.results.contest import Contest
from robustbench_vlm.threat import Threat

LONG = 3600.0  # seconds of worst case from which a smaller command is printed too
TIMED = 2  # repetitions of the timed call
TIMING = 0.5  # seconds that one timed call may take; it gets as many rows as that allows

# Each of these is above what was measured over ten evaluations, from the tiny model to ViT-B-32.
CHECKS = (96, 24)  # forward passes and image gradients of the checks of one model with one chain
PER_CALL = 0.004  # seconds beside the model in every call: bookkeeping of the attack
PER_CELL = 2.0  # seconds of a cell beside its calls: reading images, text bank, files
MARGIN = 1.5  # calls of the attack are slower than the timed one, which repeats the same images


@dataclass(frozen=True)
class _Speed:
    """Seconds of one image of a model: in a forward pass, and in a forward pass with an image gradient."""

    forward: float
    gradient: float

    def of(self, calls: float, gradients: float, rows: int) -> float:
        """Seconds of some calls of `rows` rows, of which some are followed by the gradient."""
        backward = max(self.gradient - self.forward, 0.0)
        return rows * (calls * self.forward + gradients * backward) + calls * PER_CALL


def price(plan: Plan) -> list[str]:
    """Lines that say what an evaluation costs at most, checks of the models included."""
    settings, sizes = plan.settings, [_size(plan, card) for card in plan.datasets]
    threats = [str(Threat(settings.norm, eps)) for eps in settings.ladder]
    count = len(plan.models) * len(plan.datasets) * len(settings.chains) * len(settings.ladder)
    lines = [
        f"{_count(count, 'cell')}: {_count(len(plan.models), 'model')} x "
        f"{_count(len(plan.datasets), 'dataset')} ({_count(sum(sizes), 'image')}) x "
        f"{_count(len(settings.chains), 'attack')} x {', '.join(threats)}"
    ]
    seconds, measured = 0.0, 0
    for loaded in plan.models:
        todo = [part for part in _parts(plan, loaded) if part.missing]
        measured += count // len(plan.models) - sum(part.missing for part in todo)
        if todo:
            speed = _time(loaded, todo[0].card, settings.device)
            seconds += sum(worst_case(part, speed) for part in todo)
    if measured:
        lines.append(f"{measured} of {_count(count, 'cell')} measured already, in {settings.results}")
    if measured < count:
        lines.append(
            f"at most {_duration(seconds)} on {settings.device} at its present speed, checks included, "
            "if every image survived every attack"
        )
    for name, chain in zip(plan.request.attacks, settings.chains, strict=True):
        if (known := reader.SAME.get(("attacks", name), name)) != name:
            lines.append(f"attack {name} is {known} here: {chain.card.title}")
    root, split = plan.request.data_root, plan.suite.split
    lacking = [card.name for card in plan.datasets if dataset.missing([card], root, split)]
    if lacking:
        lines.append(f"not below {root} yet: {', '.join(lacking)}")
    if seconds > LONG:
        words = [word for loaded in plan.models for word in ("--model", loaded.id)]
        words += ["--arch", plan.request.arch] if plan.request.arch else []
        words += ["--suite", plan.request.suite, "--data-root", str(plan.request.data_root)]
        look = f"{shlex.join(words)}{reader.as_typed()} --attack aa2 --n 100"
        lines.append(f"for a first look: vlmrob eval {look}")
    return lines


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
        known = set()
        for path in sorted(folder.glob("*.json")):
            try:
                known.add(result_file.read_one(path).contest)
            except InputError:  # a damaged result is measured again, or refused by name when its turn comes
                continue
        for chain in plan.settings.chains:
            missing = sum(contest not in known for contest in _contests(plan, chain))
            yield _Part(card, chain, _size(plan, card), missing)


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


def _size(plan: Plan, card: DatasetCard) -> int:
    """Number of images that are drawn from a dataset, as far as its card knows."""
    there, n = card.size.get(plan.suite.split, 0), plan.settings.n
    return min(n, there) if n and there else n or there


def worst_case(part: _Part, speed: _Speed) -> float:
    """Seconds of the missing cells of a part if every image survived every stage.

    A call always has `rows` rows. Images that are attacked together take turns in them, so the calls are at
    most those of all images divided by the rows, and those of one image, which is last.
    """
    rows, (forwards, gradients) = part.chain.rows, part.chain.cost(part.card.n_classes)
    turns = part.n / rows + 1
    clean = math.ceil(part.n / rows)
    attack = speed.of(turns * forwards + 2 * clean, turns * gradients, rows)
    checks = speed.of(*CHECKS, rows)
    return MARGIN * (checks + part.missing * attack) + part.missing * PER_CELL


def _time(loaded: zoo.Loaded, card: DatasetCard, device: torch.device) -> _Speed:
    """Time one small call of a model, without and with the image gradient."""
    side = card.native_px if card.canvas == "native" else loaded.model.image_size
    once = _seconds(loaded, 1, side, device)  # the first call of all also loads kernels
    rows = int(min(64, max(1, TIMING / max(once.gradient, 1e-6))))
    timed = [_seconds(loaded, rows, side, device) for _ in range(TIMED)]
    return _Speed(min(t.forward for t in timed), min(t.gradient for t in timed))


def _seconds(loaded: zoo.Loaded, rows: int, side: int, device: torch.device) -> _Speed:
    """Seconds of an image in one call of so many rows; reading a number waits for the device."""
    batch = torch.zeros(rows, 3, side, side, device=device)
    started = time.perf_counter()
    with torch.no_grad():
        float(loaded.model(batch).sum())
    forward = time.perf_counter()
    wanted = batch.requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loaded.model(wanted).sum(), wanted)
    float(gradient.sum())
    return _Speed((forward - started) / rows, (time.perf_counter() - forward) / rows)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
