"""What an evaluation costs at most, from one timed batch of each model."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import dataset
from robustbench_vlm.evaluation.planning import Plan
from robustbench_vlm.models import zoo
from robustbench_vlm.threat import Threat

LONG = 3600.0  # seconds of worst case from which a smaller command is printed too
TIMED = 3  # repetitions when one batch is timed
BACKWARD = 1.3  # an image gradient in forward passes, where only the forward was timed


def price(plan: Plan) -> list[str]:
    """Lines that say what an evaluation costs at most, from one timed batch of each model."""
    settings, sizes = plan.settings, [_size(plan, card) for card in plan.datasets]
    threats = [str(Threat(settings.norm, eps)) for eps in settings.ladder]
    count = len(plan.models) * len(plan.datasets) * len(settings.chains) * len(settings.ladder)
    seconds = worst_case(plan, sizes)
    lines = [
        f"{_count(count, 'cell')}: {_count(len(plan.models), 'model')} x "
        f"{_count(len(plan.datasets), 'dataset')} ({_count(sum(sizes), 'image')}) x "
        f"{_count(len(settings.chains), 'attack')} x {', '.join(threats)}",
        f"at most {_duration(seconds)} on {settings.device}, if every image survived every attack",
    ]
    for name, chain in zip(plan.request.attacks, settings.chains, strict=True):
        if (known := reader.SAME.get(("attacks", name), name)) != name:
            lines.append(f"attack {name} is {known} here: {chain.card.title}")
    root, split = plan.request.data_root, plan.suite.split
    lacking = [card.name for card in plan.datasets if dataset.missing([card], root, split)]
    if lacking:
        lines.append(f"not below {root} yet: {', '.join(lacking)}")
    if seconds > LONG:
        models = " ".join(f"--model {loaded.id}" for loaded in plan.models)
        models += f" --arch {plan.request.arch}" if plan.request.arch else ""
        where = f"--suite {plan.request.suite} --data-root {plan.request.data_root}{reader.as_typed()}"
        lines.append(f"for a first look: vlmrob eval {models} {where} --attack aa2 --n 100")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _size(plan: Plan, card: DatasetCard) -> int:
    """Number of images that are drawn from a dataset, as far as its card knows."""
    there, n = card.size.get(plan.suite.split, 0), plan.settings.n
    return min(n, there) if n and there else n or there


def worst_case(plan: Plan, sizes: Sequence[int]) -> float:
    """Seconds if every image survived every stage at every radius.

    Args:
        plan: whose models are timed.
        sizes: images of each dataset.
    """
    settings, seconds = plan.settings, 0.0
    for loaded in plan.models:
        for chain in settings.chains:
            forward = _seconds_per_image(loaded, plan.datasets[0], chain.rows, settings.device)
            for card, n in zip(plan.datasets, sizes, strict=True):
                forwards, gradients = chain.cost(card.n_classes)
                seconds += n * len(settings.ladder) * forward * (forwards + BACKWARD * gradients)
    return seconds


def _seconds_per_image(loaded: zoo.Loaded, card: DatasetCard, rows: int, device: torch.device) -> float:
    side = card.native_px if card.canvas == "native" else loaded.model.image_size
    batch = torch.zeros(rows, 3, side, side, device=device)
    best = float("inf")
    with torch.no_grad():
        for _ in range(TIMED):
            started = time.perf_counter()
            float(loaded.model(batch).sum())  # reading a number waits for the device
            best = min(best, time.perf_counter() - started)
    return best / rows


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
