"""From what was typed to what is done: resolve an evaluation, refuse what is missing, price it, do it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import pandas as pd
import torch

from robustbench_vlm import cards, evaluate, leaderboard
from robustbench_vlm.cards import AttackCard, DatasetCard, Suite
from robustbench_vlm.data import dataset, miniature
from robustbench_vlm.data.tiny import write as tiny
from robustbench_vlm.errors import DataError, InputError, nearest
from robustbench_vlm.models import zoo
from robustbench_vlm.models.zeroshot import ZeroShot, render, text_bank
from robustbench_vlm.threat import Norm, Threat, parse_eps

LONG = 3600.0  # seconds of worst case from which the smaller command is printed too
TIMED = 3  # repetitions when one batch is timed
BACKWARD = 1.3  # an image gradient in forward passes, where only the forward was timed

Meter = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Order:
    """An evaluation as it was typed; empty means: as the suite says."""

    models: tuple[str, ...]
    attacks: tuple[str, ...]
    suite: str
    results: Path
    data_root: Path
    datasets: tuple[str, ...] = ()
    eps: str = ""
    norm: str = ""
    n: int | None = None
    live: int | None = None
    keep_images: bool = False
    skip_missing: bool = False


@dataclass(frozen=True)
class Plan:
    """An evaluation with every name resolved."""

    order: Order
    suite: Suite
    datasets: tuple[DatasetCard, ...]
    models: tuple[zoo.Loaded, ...]
    request: evaluate.Request


def plan(order: Order, device: torch.device) -> Plan:
    """Resolve names, radii and models; nothing is attacked yet.

    Raises:
        InputError: an unknown name, norm or radius; a model that cannot be loaded.
    """
    suite = cards.read("suites", order.suite, Suite)
    for name in order.datasets:
        if name not in suite.datasets:
            raise InputError(
                f"--dataset {name}", f"not in suite {suite.name}", do=nearest(name, suite.datasets)
            )
    chosen = [name for name in suite.datasets if not order.datasets or name in order.datasets]
    norm = order.norm or suite.norm
    if norm not in get_args(Norm):
        raise InputError(f"--norm {norm}", "not a norm", do=nearest(norm, get_args(Norm)))
    texts = order.eps.split(",") if order.eps else list(suite.eps)
    ladder = tuple(sorted({parse_eps(text, norm) for text in texts}))
    request = evaluate.Request(
        attacks=tuple(cards.read("attacks", name, AttackCard) for name in order.attacks),
        norm=cast("Norm", norm),
        ladder=ladder,
        n=suite.n if order.n is None else order.n,
        seed=suite.seed,
        results=order.results,
        device=device,
        live=order.live,
        keep_images=order.keep_images,
    )
    for card in request.attacks:
        for stage in card.stage:
            evaluate.plugin(card, stage)  # a mistyped field stops here, before any model is loaded
    datasets = tuple(cards.read("datasets", name, DatasetCard) for name in chosen)
    models = tuple(zoo.load(name, device) for name in order.models)
    return Plan(order, suite, datasets, models, request)


def require_data(plan: Plan) -> Plan:
    """The plan, once every dataset is on disk; with `skip_missing`, without those that are not.

    Raises:
        DataError: datasets are missing; every one is listed with how to get it, and nothing is evaluated.
    """
    root, split = plan.order.data_root, plan.suite.split
    lacking = dataset.missing(plan.datasets, root, split)
    if not lacking:
        return plan
    if not plan.order.skip_missing:
        raise DataError(
            f"suite {plan.suite.name}",
            f"{len(lacking)} of {len(plan.datasets)} datasets are missing below {root}",
            do="or leave them out with --skip-missing\n  " + "\n  ".join(lacking),
        )
    there = tuple(card for card in plan.datasets if not dataset.missing([card], root, split))
    if not there:
        raise DataError(f"suite {plan.suite.name}", f"no dataset at all below {root}", do="check --data-root")
    return replace(plan, datasets=there)


def price(plan: Plan) -> list[str]:
    """What the evaluation costs at most, from one timed batch of each model; lines for the log."""
    request = plan.request
    threats = [str(Threat(request.norm, eps)) for eps in request.ladder]
    count = len(plan.models) * len(plan.datasets) * len(request.attacks) * len(request.ladder)
    images = sum(request.n or card.size.get(plan.suite.split, 0) for card in plan.datasets)
    seconds = 0.0
    for loaded in plan.models:
        for card in request.attacks:
            forward = _seconds_per_image(loaded, plan.datasets[0], card.rows, request.device)
            for data in plan.datasets:
                n = request.n or data.size.get(plan.suite.split, 0)
                forwards, backwards = worst_case(card, data.n_classes)
                seconds += n * len(request.ladder) * forward * (forwards + BACKWARD * backwards)
    lines = [
        f"{count} cells: {len(plan.models)} models x {len(plan.datasets)} datasets ({images} images) x "
        f"{len(request.attacks)} attacks x {', '.join(threats)} (canvas: each dataset's own)",
        f"at most {_duration(seconds)} on {request.device}, if every image survived every attack",
    ]
    if seconds > LONG:
        lines.append(f"for a first look: vlmrob eval --suite {plan.order.suite} --attack aa2 --n 100")
    return lines


def worst_case(card: AttackCard, n_classes: int) -> tuple[int, int]:
    """(forward passes, image gradients) of one image that survives every stage of a chain."""
    costs = [evaluate.plugin(card, stage).cost(n_classes) for stage in card.stage]
    return sum(cost[0] for cost in costs), sum(cost[1] for cost in costs)


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
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def perform(plan: Plan, report: evaluate.Report) -> list[Path]:
    """Evaluate every cell of the plan; returns the cells' files, finished ones included."""
    paths: list[Path] = []
    for loaded in plan.models:
        for card in plan.datasets:
            split = dataset.open_split(card, plan.order.data_root, plan.suite.split)
            chosen = split.subset(plan.request.n, plan.request.seed)
            paths += evaluate.evaluate(evaluate.subject(loaded, card, chosen), plan.request, report)
    return paths


def rows(plan: Plan, paths: Sequence[Path]) -> pd.DataFrame:
    """The leaderboard rows of these cells alone."""
    wanted = {path.resolve() for path in paths}
    cells = [cell for cell in leaderboard.read(plan.request.results) if cell.path.resolve() in wanted]
    return leaderboard.table(cells, plan.suite)


def make_tiny(root: Path, report: Meter, only: Sequence[str] | None = None) -> list[Path]:
    """Render the datasets of the tiny world that are not below `root` yet; returns the folders made."""
    names = list(only) if only is not None else [n for n in cards.names("datasets") if n.startswith("tiny-")]
    made: list[Path] = []
    for name in names:
        card = cards.read("datasets", name, DatasetCard)
        if any(dataset.missing([card], root, split) for split in card.size):
            made += tiny.make(root, [name], report)
    return made


def make_miniature(suite: str, root: Path, per_class: int, n: int, label_with: str) -> None:
    """Write a miniature of every dataset of a suite, labelled by a model's own predictions when one is named.

    A small or random model is wrong on nearly every generated image of a thousand classes, and an image that
    is wrong from the start is never attacked; labels of its own choosing leave it something to lose.
    """
    chosen = cards.read("suites", suite, Suite)
    loaded = zoo.load(label_with) if label_with else None
    for name in chosen.datasets:
        card = cards.read("datasets", name, DatasetCard)
        if loaded is None:
            miniature.make(card, root, per_class=per_class, n=n)
        else:
            miniature.make(card, root, n=n, labels=predictions(loaded, card, n))


@torch.no_grad()
def predictions(loaded: zoo.Loaded, card: DatasetCard, n: int) -> dict[str, int]:
    """Member name -> predicted class of the `n` images that a miniature of `card` consists of."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        miniature.make(card, Path(folder), n=n)
        split = dataset.open_split(card, Path(folder), "test")
        what = evaluate.subject(loaded, card, split)
        classify = ZeroShot(loaded.model, text_bank(loaded.model, render(card.names, card.templates)))
        found: Any = classify(what.images).argmax(1).tolist()
        return {key.rsplit("/", 1)[-1]: int(label) for key, label in zip(split.keys, found, strict=True)}
