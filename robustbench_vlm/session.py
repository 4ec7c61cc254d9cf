"""From what was typed to what is done: resolve an evaluation, refuse what is missing, price it, do it."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import pandas as pd
import torch

from robustbench_vlm import cards, cells, evaluate, leaderboard, regime
from robustbench_vlm.attacks import canonical, engines
from robustbench_vlm.attacks.finder import PLAIN, Sight
from robustbench_vlm.cards import AttackCard, DatasetCard, Protocol, Suite
from robustbench_vlm.data import dataset, miniature
from robustbench_vlm.data.tiny import write as tiny
from robustbench_vlm.errors import DataError, InputError, nearest, some
from robustbench_vlm.models import zoo
from robustbench_vlm.models.zeroshot import ZeroShot
from robustbench_vlm.threat import Norm, Threat, parse_eps

LONG = 3600.0  # seconds of worst case from which the smaller command is printed too
TIMED = 3  # repetitions when one batch is timed
ROWS = 32  # shape of the model calls that label a miniature
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
    engine: str = "native"
    mode: str = "fast"
    sight: Sight = PLAIN
    arch: str = ""  # of the models that are weights files
    protocol: str = ""


@dataclass(frozen=True)
class Plan:
    """An evaluation with every name resolved."""

    order: Order
    suite: Suite
    datasets: tuple[DatasetCard, ...]
    models: tuple[zoo.Loaded, ...]
    request: cells.Request
    protocol: Protocol | None = None


def device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU when there is one.

    Raises:
        InputError: not the name of a device, or none of that name here.
    """
    here = torch.cuda.device_count()
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise InputError(f"--device {name}", "not a device", "auto, cpu, cuda or cuda:N")
    place = torch.device(("cuda" if here else "cpu") if name == "auto" else name)
    if place.type == "cuda" and (place.index or 0) >= here:
        found = f"{here} CUDA devices here" if here else "no CUDA device here"
        raise InputError(f"--device {name}", found, do="use cpu, or see vlmrob doctor")
    return place


def plan(order: Order, device: torch.device) -> Plan:
    """Resolve names, radii and models; nothing is attacked yet.

    Raises:
        InputError: an unknown name, norm or radius; a model that cannot be loaded.
    """
    protocol = cards.read("protocols", order.protocol, Protocol) if order.protocol else None
    order = under(protocol, order) if protocol else order
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
    request = cells.Request(
        attacks=tuple(cards.read("attacks", name, AttackCard) for name in order.attacks),
        norm=cast("Norm", norm),
        ladder=ladder,
        n=suite.n if order.n is None else order.n,
        seed=suite.seed,
        results=order.results,
        device=device,
        live=order.live,
        keep_images=order.keep_images,
        sight=order.sight,
        engine=order.engine,
        mode=order.mode,
        marks=regime.marks(protocol, suite),
    )
    for card in request.attacks:  # a mistyped field or a norm too many stops here, before any model is loaded
        cells.require_norm(card, request.norm)
    datasets = tuple(regime.placed(cards.read("datasets", name, DatasetCard), protocol) for name in chosen)
    refuse(request, datasets)
    models = tuple(regime.sized(zoo.load(name, device, order.arch), protocol) for name in order.models)
    return Plan(order, suite, datasets, models, request, protocol)


def under(protocol: Protocol, order: Order) -> Order:
    """The order with all that a protocol fixes, once nothing that was typed contradicts it.

    Raises:
        InputError: another attack, norm, radius or number of images than the protocol's.
    """
    attacks = tuple(cards.SAME.get(("attacks", name), name) for name in order.attacks)
    radii = [parse_eps(text, protocol.norm) for text in order.eps.split(",")] if order.eps else []
    fixed = [parse_eps(text, protocol.norm) for text in protocol.eps]
    typed = {
        "--attack": (bool(attacks) and attacks != (protocol.attack,), protocol.attack),
        "--norm": (bool(order.norm) and order.norm != protocol.norm, protocol.norm),
        "--eps": (bool(radii) and sorted(set(radii)) != sorted(set(fixed)), ",".join(protocol.eps)),
        "--n": (order.n is not None and order.n != protocol.n, str(protocol.n)),
    }
    for flag, (differs, wanted) in typed.items():
        if differs:
            do = "leave that out, or --protocol"
            raise InputError(flag, f"not what protocol {protocol.name} says", wanted, do)
    return replace(
        order,
        suite=order.suite or protocol.suite,
        attacks=(protocol.attack,),
        norm=protocol.norm,
        eps=",".join(protocol.eps),
        n=protocol.n,
    )


def refuse(request: cells.Request, datasets: Sequence[DatasetCard]) -> None:
    """Refuse what cannot be carried out as it was asked for.

    Raises:
        InputError: an engine, a mode or a precision that does not go with the rest.
    """
    request.sight.require(request.device)
    for card in request.attacks:
        stages = [(stage.name, cells.plugin(card, stage)) for stage in card.stage]
        for data in datasets:
            side = data.native_px if data.canvas == "native" else None
            engines.refuse(
                request.by,
                stages,
                Threat(request.norm, request.ladder[-1]),
                n_classes=data.n_classes,
                stop=card.stop,
                live=request.live,
                shape=None if side is None else (side, side),
            )


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
            "all of them",
            "get them as follows, or leave them out with --skip-missing\n  " + "\n  ".join(lacking),
        )
    there = tuple(card for card in plan.datasets if not dataset.missing([card], root, split))
    if not there:
        raise DataError(f"suite {plan.suite.name}", f"no dataset at all below {root}", do="check --data-root")
    return replace(plan, datasets=there)


def open_data(plan: Plan) -> list[dataset.Split]:
    """The images that every dataset is judged by; all are opened before the first is attacked.

    Raises:
        DataError: shards, class names or labels that are not as the card says.
    """
    opened = (dataset.open_split(card, plan.order.data_root, plan.suite.split) for card in plan.datasets)
    stratified = plan.suite.sample == "stratified"
    listed = cards.subset(plan.suite) if plan.suite.subset else ()
    drawn = (
        split.listed(listed, plan.request.n)
        if listed
        else split.subset(plan.request.n, plan.request.seed, stratified=stratified)
        for split in opened
    )
    return [regime.prompted(split, plan.protocol) for split in drawn]


def price(plan: Plan) -> list[str]:
    """What the evaluation costs at most, from one timed batch of each model; lines for the log."""
    request = plan.request
    threats = [str(Threat(request.norm, eps)) for eps in request.ladder]
    count = len(plan.models) * len(plan.datasets) * len(request.attacks) * len(request.ladder)
    sizes = [_size(plan, card) for card in plan.datasets]
    seconds = 0.0
    for loaded in plan.models:
        for card in request.attacks:
            forward = _seconds_per_image(loaded, plan.datasets[0], card.rows, request.device)
            for data, n in zip(plan.datasets, sizes, strict=True):
                forwards, backwards = worst_case(card, data.n_classes)
                seconds += n * len(request.ladder) * forward * (forwards + BACKWARD * backwards)
    lines = [
        f"{_count(count, 'cell')}: {_count(len(plan.models), 'model')} x "
        f"{_count(len(plan.datasets), 'dataset')} ({_count(sum(sizes), 'image')}) x "
        f"{_count(len(request.attacks), 'attack')} x {', '.join(threats)}",
        f"at most {_duration(seconds)} on {request.device}, if every image survived every attack",
    ]
    for name, card in zip(plan.order.attacks, request.attacks, strict=True):
        if (known := cards.SAME.get(("attacks", name), name)) != name:
            lines.append(f"attack {name} is {known} here: {card.title}")
    root, split = plan.order.data_root, plan.suite.split
    lacking = [card.name for card in plan.datasets if dataset.missing([card], root, split)]
    if lacking:
        lines.append(f"not below {root} yet: {', '.join(lacking)}")
    if seconds > LONG:
        models = " ".join(f"--model {loaded.id}" for loaded in plan.models)
        models += f" --arch {plan.order.arch}" if plan.order.arch else ""
        where = f"--suite {plan.order.suite} --data-root {plan.order.data_root}{cards.as_typed()}"
        lines.append(f"for a first look: vlmrob eval {models} {where} --attack aa2 --n 100")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _size(plan: Plan, card: DatasetCard) -> int:
    """Images of a dataset that are drawn, as far as its card knows."""
    there, n = card.size.get(plan.suite.split, 0), plan.request.n
    return min(n, there) if n and there else n or there


def worst_case(card: AttackCard, n_classes: int) -> tuple[int, int]:
    """(forward passes, image gradients) of one image that survives every stage of a chain."""
    costs = [cells.plugin(card, stage).cost(n_classes) for stage in card.stage]
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
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def perform(
    plan: Plan, report: evaluate.Report, remark: Callable[[str], None] = lambda _: None
) -> list[Path]:
    """Evaluate every cell of the plan; returns the cells' files, finished ones included."""
    paths: list[Path] = []
    splits = open_data(plan)
    for split in splits:
        for note in split.notes:
            remark(f"note: {split.card.name}: {note}")
    for loaded in plan.models:
        for card, split in zip(plan.datasets, splits, strict=True):
            what = cells.subject(loaded, split.card, split)
            for line in what.split.bad:
                remark(f"note: {card.name}: left out: {line}")
            if what.untrained:
                words = f"class names with words that {loaded.card.name} never met: {some(what.untrained)}"
                remark(f"note: {card.name}: {words}")
            paths += evaluate.evaluate(what, plan.request, report)
    return paths


def rows(plan: Plan, paths: Sequence[Path]) -> pd.DataFrame:
    """The leaderboard rows of these cells alone."""
    wanted = {path.resolve() for path in paths}
    found = [cell for cell in leaderboard.read(plan.request.results) if cell.path.resolve() in wanted]
    return leaderboard.table(found, plan.suite)


def make_tiny(root: Path, report: Meter, only: Sequence[str] | None = None) -> list[Path]:
    """Render the datasets of the tiny world that are not below `root` yet; returns the folders made."""
    names = list(only) if only is not None else [n for n in cards.names("datasets") if n.startswith("tiny-")]
    made: list[Path] = []
    for name in names:
        card = cards.read("datasets", name, DatasetCard)
        if any(dataset.missing([card], root, split) for split in card.size):
            made += tiny.make(root, [name], report)
    return made


def make_miniature(
    suite: str, root: Path, n: int, label_with: str, report: Meter, per_class: int | None = None
) -> None:
    """Write a miniature of every dataset of a suite, labelled by a model's own predictions when one is named.

    A small or random model is wrong on nearly every generated image of a thousand classes, and an image that
    is wrong from the start is never attacked; labels of its own choosing leave it something to lose.
    """
    chosen = cards.read("suites", suite, Suite)
    loaded = zoo.load(label_with) if label_with else None
    for done, name in enumerate(chosen.datasets):
        report(f"miniatures of {suite}", done, len(chosen.datasets))
        card = cards.read("datasets", name, DatasetCard)
        count = per_class * card.n_classes if per_class else n
        labels = predictions(loaded, card, chosen.split, count) if loaded else None
        miniature.make(card, root, n=count, split=chosen.split, labels=labels)


def predictions(loaded: zoo.Loaded, card: DatasetCard, split: str, n: int) -> dict[str, int]:
    """Member name -> predicted class of the `n` images that a miniature of `card` consists of."""
    with tempfile.TemporaryDirectory() as folder:
        miniature.make(card, Path(folder), n=n, split=split)
        opened = dataset.open_split(card, Path(folder), split)
        what = cells.subject(loaded, opened.card, opened)
        classify = ZeroShot(loaded.model, what.bank)
        found: list[int] = []
        for part in what.images.parts(range(len(what.images)), ROWS):
            found += canonical.logits(classify, what.images.floats(part), ROWS).argmax(1).tolist()
        pairs = zip(what.split.keys, found, strict=True)
        return {key.rsplit("/", 1)[-1]: label for key, label in pairs}
