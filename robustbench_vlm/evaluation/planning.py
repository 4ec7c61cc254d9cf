"""From what was typed to what is done: resolve an evaluation, refuse what is missing, price it, do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import pandas as pd
import torch

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.protocol import Protocol
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.data import dataset
from robustbench_vlm.engine.attacked_view import PLAIN, Precision
from robustbench_vlm.engine.job import Job
from robustbench_vlm.errors import DataError, InputError, nearest, some
from robustbench_vlm.evaluation import cells, chain, measure, protocols
from robustbench_vlm.models import zoo
from robustbench_vlm.results import leaderboard, result_file
from robustbench_vlm.threat import Norm, Threat, parse_eps

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
    sight: Precision = PLAIN
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


def plan(order: Order, device: torch.device) -> Plan:
    """Resolve names, radii and models; nothing is attacked yet.

    Raises:
        InputError: an unknown name, norm or radius; a model that cannot be loaded.
    """
    protocol = reader.read("protocols", order.protocol, Protocol) if order.protocol else None
    order = under(protocol, order) if protocol else order
    suite = reader.suite(order.suite)
    for name in order.datasets:
        _require_member(suite, name)
    chosen = [name for name in suite.datasets if not order.datasets or name in order.datasets]
    norm = order.norm or suite.norm
    if norm not in get_args(Norm):
        raise InputError(f"--norm {norm}", "not a norm", do=nearest(norm, get_args(Norm)))
    texts = order.eps.split(",") if order.eps else list(suite.eps)
    ladder = tuple(sorted({parse_eps(text, norm) for text in texts}))
    request = cells.Request(
        attacks=tuple(reader.read("attacks", name, AttackCard) for name in order.attacks),
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
        marks=protocols.marks(protocol, suite),
    )
    for card in request.attacks:  # a mistyped field or a norm too many stops here, before any model is loaded
        chain.require_norm(card, request.norm)
    datasets = tuple(
        protocols.placed(reader.read("datasets", name, DatasetCard), protocol) for name in chosen
    )
    refuse(request, datasets)
    models = tuple(protocols.sized(zoo.load(name, device, order.arch), protocol) for name in order.models)
    return Plan(order, suite, datasets, models, request, protocol)


def _require_member(suite: Suite, dataset: str) -> None:
    """Refuse a dataset that is not in the suite, and say how it can be evaluated."""
    if dataset in suite.datasets:
        return
    found = f"not in suite {suite.name}"
    if dataset not in reader.names("datasets"):
        known = {*suite.datasets, *reader.names("datasets")}
        raise InputError(f"--dataset {dataset}", found, "a known dataset", nearest(dataset, known))
    others = reader.suites_with(dataset)
    do = f"leave --suite out to evaluate {dataset} alone"
    do += f", or type --suite {' or '.join(others[:3])}" if others else ""
    raise InputError(f"--dataset {dataset}", found, some(suite.datasets), do)


def under(protocol: Protocol, order: Order) -> Order:
    """The order with all that a protocol fixes, once nothing that was typed contradicts it.

    Raises:
        InputError: another attack, norm, radius or number of images than the protocol's.
    """
    attacks = tuple(reader.SAME.get(("attacks", name), name) for name in order.attacks)
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
        stages = [(stage.name, chain.plugin(card, stage)) for stage in card.stage]
        for data in datasets:
            side = data.native_px if data.canvas == "native" else None
            job = Job(
                stages=stages,
                threat=Threat(request.norm, request.ladder[-1]),
                rows=card.rows,
                n_classes=data.n_classes,
                active_rows=request.live,
                stop=card.stop,
            )
            request.by.require(job, None if side is None else (side, side))


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
    listed = reader.subset(plan.suite) if plan.suite.subset else ()
    drawn = (
        split.listed(listed, plan.request.n)
        if listed
        else split.subset(plan.request.n, plan.request.seed, stratified=stratified)
        for split in opened
    )
    return [protocols.prompted(split, plan.protocol) for split in drawn]


def perform(plan: Plan, report: measure.Report, remark: Callable[[str], None] = lambda _: None) -> list[Path]:
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
            paths += measure.evaluate(what, plan.request, report)
    return paths


def rows(plan: Plan, paths: Sequence[Path]) -> pd.DataFrame:
    """The leaderboard rows of these cells alone."""
    wanted = {path.resolve() for path in paths}
    found = [r for r in result_file.read(plan.request.results) if r.path.resolve() in wanted]
    return leaderboard.table(found, plan.suite)
