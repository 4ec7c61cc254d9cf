"""Plan and perform an evaluation: resolve what was typed, refuse what cannot be done, open data, measure."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast, get_args

import pandas as pd
import torch

from robustbench_vlm.backends.backend import Backend
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.protocol import Protocol
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.data import dataset
from robustbench_vlm.data.dataset import TOLERATED, Split
from robustbench_vlm.errors import DataError, InputError, nearest, some
from robustbench_vlm.evaluation import measure, protocols, subjects
from robustbench_vlm.evaluation.cells import EvalSettings
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.evaluation.executor import (
    THIS_PROCESS,
    Executor,
    JointProgress,
    require_workers,
    run_concurrently,
)
from robustbench_vlm.evaluation.stages import Report
from robustbench_vlm.models import zoo
from robustbench_vlm.models.zoo import Loaded
from robustbench_vlm.results import leaderboard, result_file
from robustbench_vlm.threat import Norm, Threat, parse_eps


@dataclass(frozen=True)
class EvalRequest:
    """An evaluation as it was typed, with names instead of what they name.

    Attributes:
        models: names, folders, weights files or `ARCH:TAG`.
        attacks: names of chains.
        suite: name of the suite, or a TOML file; empty: the protocol's.
        results: folder of result files and ledgers.
        data_root: folder of the datasets.
        datasets: only these of the suite; empty: all.
        eps: radii, separated by commas; empty: the suite's.
        norm: of the ball; empty: the suite's.
        n: images of every dataset, 0 for all; None: the suite's number.
        batch_size: most images in a call of the attacked model; see `EvalSettings`.
        save_images: write the adversarial images too.
        save_evidence: write a bundle of evidence a result, too.
        skip_missing: leave out datasets that are not on disk.
        backend: what runs the attacks.
        arch: of the models that are weights files.
        protocol: name of a protocol, which fixes attack, norm, radii and number of images; empty: none.
        until: half-width of the interval of the mean robust accuracy, in points, at which a model is done;
            None: all images.
        workers: who attacks: a number of workers, or `ray` for those of a cluster; empty: this process.
    """

    models: tuple[str, ...]
    attacks: tuple[str, ...]
    suite: str
    results: Path
    data_root: Path
    datasets: tuple[str, ...] = ()
    eps: str = ""
    norm: str = ""
    n: int | None = None
    batch_size: int | None = None
    save_images: bool = False
    save_evidence: bool = False
    skip_missing: bool = False
    backend: Backend = field(default_factory=Backend)
    arch: str = ""
    protocol: str = ""
    until: float | None = None
    workers: str = ""


@dataclass(frozen=True)
class Plan:
    """An evaluation with every name resolved.

    Attributes:
        request: as typed; under a protocol, with what the protocol fixes.
        suite: datasets, split and draw.
        datasets: the chosen ones, on the canvas of the protocol.
        models: loaded, with the resize of the protocol.
        settings: of the evaluation.
        protocol: if one was asked for.
        tolerated: by dataset, the share of images that may be undecodable; where none is, `TOLERATED`.
    """

    request: EvalRequest
    suite: Suite
    datasets: tuple[DatasetCard, ...]
    models: tuple[Loaded, ...]
    settings: EvalSettings
    protocol: Protocol | None = None
    tolerated: Mapping[str, float] = field(default_factory=dict)


def plan(request: EvalRequest, device: torch.device) -> Plan:
    """Resolve names, radii and models; nothing is attacked yet, and models are loaded last.

    Raises:
        InputError: an unknown name, norm or radius; things that do not go together; a model that cannot be
            loaded.
    """
    require_workers(request.workers)
    protocol = reader.read("protocols", request.protocol, Protocol) if request.protocol else None
    request = under_protocol(request, protocol) if protocol else request
    suite = reader.suite(request.suite)
    wanted = [reader.shown("datasets", name) for name in request.datasets]
    for name in wanted:
        _require_member(suite, name)
    settings = _settings(request, suite, protocol, device)
    if request.until is not None:
        require_frozen_order("--until", request, suite)
    chosen = [name for name in suite.datasets if not wanted or name in wanted]
    cards = (reader.read("datasets", name, DatasetCard) for name in chosen)
    datasets = tuple(protocols.with_protocol_canvas(card, protocol) for card in cards)
    require_supported(settings, datasets)
    loaded = (zoo.load(name, device, request.arch) for name in request.models)
    each = {(model.card.name, model.card.sha256): model for model in loaded}  # by name and by folder, once
    models = tuple(protocols.with_protocol_resize(model, protocol) for model in each.values())
    return Plan(request, suite, datasets, models, settings, protocol)


def _settings(
    request: EvalRequest, suite: Suite, protocol: Protocol | None, device: torch.device
) -> EvalSettings:
    """The settings of a request, where it says nothing those of the suite."""
    norm = request.norm or suite.norm
    if norm not in get_args(Norm):
        raise InputError(f"--norm {norm}", "not a norm", do=nearest(norm, get_args(Norm)))
    texts = request.eps.split(",") if request.eps else list(suite.eps)
    chains = [Chain.named(name) for name in request.attacks]
    settings = EvalSettings(
        chains=tuple({chain.sha256: chain for chain in chains}.values()),
        norm=cast("Norm", norm),
        ladder=tuple(sorted({parse_eps(text, norm) for text in texts})),
        n=suite.n if request.n is None else request.n,
        seed=suite.seed,
        results=request.results,
        device=device,
        backend=request.backend,
        batch_size=request.batch_size,
        save_images=request.save_images,
        suite=suite if request.save_evidence else None,
        tags=protocols.tags(protocol, suite),
    )
    for chain in settings.chains:
        chain.require_norm(settings.norm)
    return settings


def _require_member(suite: Suite, name: str) -> None:
    """Refuse a dataset that is not in the suite, and say how it can be evaluated."""
    if name in suite.datasets:
        return
    found = f"not in suite {suite.name}"
    if not reader.has("datasets", name):
        known = {*suite.datasets, *reader.names("datasets")}
        raise InputError(f"--dataset {name}", found, "a known dataset", nearest(name, known))
    others = reader.suites_with(name)
    do = f"leave --suite out to evaluate {name} alone"
    do += f", or type --suite {' or '.join(others[:3])}" if others else ""
    raise InputError(f"--dataset {name}", found, some(suite.datasets), do)


def under_protocol(request: EvalRequest, protocol: Protocol) -> EvalRequest:
    """The request with everything that a protocol fixes.

    Raises:
        InputError: another attack, norm, radius or number of images was typed than the protocol's.
    """
    attacks = tuple(reader.shown("attacks", name) for name in request.attacks)
    radii = {parse_eps(text, protocol.norm) for text in request.eps.split(",")} if request.eps else set()
    fixed = {parse_eps(text, protocol.norm) for text in protocol.eps}
    typed = {
        "--attack": (bool(attacks) and attacks != (protocol.attack,), protocol.attack),
        "--norm": (bool(request.norm) and request.norm != protocol.norm, protocol.norm),
        "--eps": (bool(radii) and radii != fixed, ",".join(protocol.eps)),
        "--n": (request.n is not None and request.n != protocol.n, str(protocol.n)),
    }
    for flag, (differs, wanted) in typed.items():
        if differs:
            do = "leave that out, or --protocol"
            raise InputError(flag, f"not what protocol {protocol.name} says", wanted, do)
    return replace(
        request,
        suite=request.suite or protocol.suite,
        attacks=(protocol.attack,),
        norm=protocol.norm,
        eps=",".join(protocol.eps),
        n=protocol.n,
    )


def require_frozen_order(where: str, request: EvalRequest, suite: Suite) -> None:
    """Refuse what does not go with images that are attacked one after the other until enough are known.

    Args:
        where: what was typed, for the message.
        request: of the evaluation.
        suite: of the evaluation.

    Raises:
        InputError: the images are not drawn at random, their number is fixed, or their verdicts depend on
            what is attacked beside them.
    """
    if request.until is not None and not 0 < request.until < 50:
        raise InputError(f"{where} {request.until:g}", "no half-width in points", "a number between 0 and 50")
    if request.protocol:
        found = f"protocol {request.protocol} fixes the number of images"
        raise InputError(where, found, do=f"leave out {where} or --protocol")
    if suite.subset:
        found = f"suite {suite.name} lists its images, and the first of a list are no random ones"
        raise InputError(where, found, "a suite that draws its images", "name another suite")
    if not request.backend.keyed:
        found = f"{request.backend.title} draws noise in batches, so verdicts would depend on the stop"
        raise InputError(where, found, "--engine native --mode fast", f"leave out {where} or the other one")


def require_supported(settings: EvalSettings, datasets: Sequence[DatasetCard]) -> None:
    """Refuse what the backend or the device cannot do; costs nothing, so it comes before loading models.

    Raises:
        InputError: an engine, a mode or a precision that does not go with the rest.
    """
    settings.backend.precision.require(settings.device)
    threat = Threat(settings.norm, settings.ladder[-1])
    for chain in settings.chains:
        for card in datasets:
            side = card.native_px if card.canvas == "native" else None
            job = chain.job(threat, card.n_classes, batch_size=settings.batch_size)
            settings.backend.require(job, None if side is None else (side, side))


def require_data(plan: Plan) -> Plan:
    """The plan, if every dataset is on disk; with `skip_missing`, the plan without those that are not.

    Raises:
        DataError: datasets are missing; each is listed with how to get it, and nothing is evaluated.
    """
    root, split = plan.request.data_root, plan.suite.split
    lacking = dataset.missing(plan.datasets, root, split)
    if not lacking:
        return plan
    if not plan.request.skip_missing:
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


def open_data(plan: Plan) -> list[Split]:
    """The images of every dataset; all are opened before the first is attacked.

    Raises:
        DataError: shards, class names or labels that are not as the card says.
    """
    opened = (dataset.open_split(card, plan.request.data_root, plan.suite.split) for card in plan.datasets)
    stratified = plan.suite.sample == "stratified"
    listed = reader.subset(plan.suite) if plan.suite.subset else ()
    drawn = (
        split.listed(listed, plan.settings.n)
        if listed
        else split.subset(plan.settings.n, plan.settings.seed, stratified=stratified)
        for split in opened
    )
    return [protocols.with_protocol_sentences(split, plan.protocol) for split in drawn]


def perform(
    plan: Plan,
    report: Report,
    remark: Callable[[str], None] = lambda _: None,
    executor: Executor = THIS_PROCESS,
) -> list[Path]:
    """Measure every cell of the plan that is not finished.

    Args:
        plan: whose data are on disk; see `require_data`.
        report: called as images finish.
        remark: called with a line of log.
        executor: who does the model work.

    Returns:
        The JSON file of every cell.
    """
    settings, splits = plan.settings, open_data(plan)
    cells = len(settings.chains) * len(settings.ladder)
    count = len(plan.models) * len(splits) * cells
    for split in splits:
        for note in split.notes:
            remark(f"note: {split.card.name}: {note}")
    joint = JointProgress(report, f"{count} cell{'s' if count != 1 else ''} on {executor.name}")
    opening = threading.Lock()  # subjects are opened one after the other: it takes memory and the text tower

    def task(number: int, loaded: Loaded, split: Split) -> Callable[[], list[Path]]:
        found: list[Path] = []

        def numbered(what: str, done: int, total: int) -> None:
            first = f"cell {number * cells + len(found) + 1} of {count}: " if count > 1 else ""
            report(f"{first}{what}", done, total)

        def measured() -> list[Path]:
            with opening:
                share = plan.tolerated.get(split.card.name, TOLERATED)
                subject = subjects.opened(loaded, split, remark, share)
            shown = numbered if executor.at_once == 1 else joint
            for path in measure.evaluate(subject, settings, shown, remark, executor.works):
                found.append(path)
            return found

        return measured

    pairs = [(loaded, split) for loaded in plan.models for split in splits]
    tasks = [task(number, loaded, split) for number, (loaded, split) in enumerate(pairs)]
    order = list(range(len(pairs)))
    if executor.at_once > 1:  # a long one that begins last would end alone
        order.sort(key=lambda i: _passes(settings, *pairs[i]), reverse=True)
    found = dict(zip(order, run_concurrently([tasks[i] for i in order], executor.at_once), strict=True))
    return [path for i in range(len(pairs)) for path in found[i]]


def _passes(settings: EvalSettings, loaded: Loaded, split: Split) -> int:
    """What a pair of model and dataset costs at most, as the pool counts it: passes times parameters."""
    costs = [chain.cost(split.card.n_classes) for chain in settings.chains]
    passes = sum(forwards + 2 * gradients for forwards, gradients in costs)
    return passes * len(split) * len(settings.ladder) * loaded.card.parameters


def rows(plan: Plan, paths: Sequence[Path]) -> pd.DataFrame:
    """The leaderboard rows of some cells alone."""
    return leaderboard.table([result_file.read_one(path) for path in paths], plan.suite)
