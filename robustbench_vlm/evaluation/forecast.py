"""What an evaluation will take and what it will tell: time, memory and width of its intervals."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import dataset
from robustbench_vlm.evaluation import estimate, gpus, pilot
from robustbench_vlm.evaluation.estimate import Price, Speed
from robustbench_vlm.evaluation.gpus import Operations
from robustbench_vlm.evaluation.pilot import Pilot, Speeds
from robustbench_vlm.evaluation.planning import Plan
from robustbench_vlm.evaluation.stages import Report
from robustbench_vlm.models.zoo import Loaded
from robustbench_vlm.results.mean_interval import mean_interval

COPIES = 16  # fp32 images that an attack keeps a row: iterates, gradients, noise, the best so far
START = 10.0  # seconds until Ray has started (docs/scale.md)
MORE_WORK = 1.12  # of several workers together, since their blocks are smaller (benchmarks/workers.md)


@dataclass(frozen=True)
class Widths:
    """Half of the 95 % interval of a robust accuracy, in points.

    Attributes:
        least: where no image is robust.
        expected: at the shares that the pilot found; the widest of all models and radii.
        most: where half of the images are robust.
    """

    least: float
    expected: float
    most: float


@dataclass(frozen=True)
class Forecast:
    """What an evaluation takes and tells.

    Attributes:
        images: of all datasets together.
        cells: results that it makes.
        measured: how many of them are there already; they cost nothing.
        here: seconds in this process.
        by_workers: seconds with workers on this machine; None if none were asked for.
        on_gpu: seconds by name of the GPU and precision.
        memory: bytes of this process; on a CUDA device, of that device.
        gpu_memory: bytes on the GPUs of `on_gpu`.
        widths: by name of the dataset; none for a dataset of unknown size.
        mean: of the mean of all datasets; None if the size of one is unknown.
        found: what the pilot found.
    """

    images: int
    cells: int
    measured: int
    here: Price
    by_workers: Price | None
    on_gpu: Mapping[tuple[str, str], Price]
    memory: int
    gpu_memory: int
    widths: Mapping[str, Widths]
    mean: Widths | None
    found: Pilot


def forecast(
    plan: Plan,
    report: Report,
    *,
    workers: int = 0,
    gpu_names: Sequence[str] = (),
    utilisation: float = gpus.UTILISATION,
) -> Forecast:
    """Attack a few images of a plan, and compute what its evaluation takes and tells.

    Args:
        plan: of the evaluation.
        report: called as images of the pilot finish.
        workers: processes that attack on this machine; 0 for no forecast of them.
        gpu_names: of GPUs that need not be here.
        utilisation: share of a GPU's peak rate that model calls reach.

    Raises:
        InputError: a GPU whose rates are not known.
    """
    asked = {name: gpus.named(name).rates() for name in gpu_names}
    speeds, radii = Speeds(), len(plan.settings.ladder)
    found = pilot.run(plan, speeds, report)
    every = {
        (m.card.sha256, card.name): found.of(m, card, radii) for m in plan.models for card in plan.datasets
    }
    survive = pilot.mean_shares(every)
    price, measured = estimate.total(plan, survive, speeds)
    on_gpu = _on_gpus(plan, survive, asked, utilisation)
    gpu_memory = _weights(plan) + _attack_bytes(plan)
    sizes = {card.name: estimate.size(plan, card) for card in plan.datasets}
    models = [{card.name: every[m.card.sha256, card.name] for card in plan.datasets} for m in plan.models]
    return Forecast(
        images=sum(sizes.values()),
        cells=len(plan.models) * len(plan.datasets) * len(plan.settings.chains) * radii,
        measured=measured,
        here=_scaled(price, found.factor),
        by_workers=_by_workers(plan, survive, found.factor, workers) if workers else None,
        on_gpu=on_gpu,
        memory=_process_bytes(plan, found) if plan.settings.device.type == "cpu" else gpu_memory,
        gpu_memory=gpu_memory,
        widths={name: _widths(models, {name: n}) for name, n in sizes.items() if n},
        mean=_widths(models, sizes) if all(sizes.values()) else None,
        found=found,
    )


def _scaled(price: Price, factor: float, start: float = 0.0) -> Price:
    return Price(*(start + factor * seconds for seconds in (price.least, price.typical, price.worst)))


def _by_workers(plan: Plan, survive: estimate.Survive, factor: float, workers: int) -> Price:
    """Seconds with workers that share the threads, or the GPUs, of this machine."""
    on_cpu, threads = plan.settings.device.type == "cpu", torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers) if on_cpu else threads)
    try:
        price, _ = estimate.total(plan, survive, Speeds())
    finally:
        torch.set_num_threads(threads)
    at_once = min(workers, (os.cpu_count() or 1) if on_cpu else max(1, torch.cuda.device_count()))
    more = MORE_WORK if workers > 1 else 1.0
    return _scaled(price, factor * more / at_once, START)


def _on_gpus(
    plan: Plan, survive: estimate.Survive, rates: Mapping[str, Mapping[str, float]], utilisation: float
) -> dict[tuple[str, str], Price]:
    """Seconds by GPU and precision, from peak rates in operations a second by the same names."""
    counted: dict[tuple[str, int], Operations] = {}
    there = replace(plan, settings=replace(plan.settings, device=torch.device("cuda")))

    def seconds(rate: float) -> Price:
        def speed_of(_: Plan, loaded: Loaded, card: DatasetCard) -> Speed:
            key = loaded.card.sha256, estimate.side(card, loaded)
            if key not in counted:
                counted[key] = gpus.operations(loaded.model, key[1])
            return counted[key].speed(rate)

        return estimate.total(there, survive, speed_of)[0]

    return {
        (name, precision): seconds(utilisation * rate)
        for name, by_precision in rates.items()
        for precision, rate in by_precision.items()
    }


def _weights(plan: Plan) -> int:
    """Bytes of all models, which are loaded together."""
    states = (loaded.model.state_dict().values() for loaded in plan.models)
    return sum(tensor.numel() * tensor.element_size() for state in states for tensor in state)


def _attack_bytes(plan: Plan) -> int:
    """Bytes of the largest model call with a gradient in fp32, and of what an attack keeps beside it."""
    largest = 0
    for loaded in plan.models:
        for side in {estimate.side(card, loaded) for card in plan.datasets}:
            row = gpus.saved_bytes(loaded.model, side) + COPIES * 3 * side**2 * 4
            largest = max(largest, row)
    return estimate.most_rows(plan) * largest


def _process_bytes(plan: Plan, found: Pilot) -> int:
    """Bytes of this process in an evaluation.

    Its peak so far has the program, the models and, where there was a pilot, calls of the largest shape.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    sides = [(card, estimate.side(card, loaded)) for card in plan.datasets for loaded in plan.models]
    pixels = max(estimate.size(plan, card) * side**2 * 3 for card, side in sides)
    return peak + (0 if found.images else _attack_bytes(plan)) + min(pixels, dataset.IN_MEMORY)


def _widths(models: Sequence[Mapping[str, tuple[float, ...]]], sizes: Mapping[str, int]) -> Widths:
    """Of the mean of some datasets.

    Args:
        models: for each, the share of robust images by dataset, one a radius.
        sizes: number of images by dataset.
    """
    radii = range(len(next(iter(models[0].values()))))
    expected = max(
        _half_width([(round(shares[name][radius] * n), n) for name, n in sizes.items()])
        for shares in models
        for radius in radii
    )
    none, half = ([(share * n // 2, n) for n in sizes.values()] for share in (0, 1))
    return Widths(_half_width(none), expected, _half_width(half))


def _half_width(counts: Sequence[tuple[int, int]]) -> float:
    """Half of the interval, in points, of the mean of proportions (hits, n)."""
    interval = mean_interval(counts)
    return 100 * (interval.high - interval.low) / 2
