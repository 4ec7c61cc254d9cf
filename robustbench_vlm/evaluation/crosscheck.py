"""Compare backends: the same images through each of them, verdict by verdict, and what each of them spent."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from robustbench_vlm.backends.backend import Backend, installed_packages
from robustbench_vlm.engine import canonical
from robustbench_vlm.engine.isolation import isolated
from robustbench_vlm.engine.job import Cost, ImageBlock, Job, Model
from robustbench_vlm.errors import InputError
from robustbench_vlm.evaluation.cells import EvalSettings, Subject
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.evaluation.stages import Report
from robustbench_vlm.threat import Threat
from robustbench_vlm.types import Finding

RUNS = (
    *("engine", "version", "attacked", "robust", "errors"),
    *("forwards", "gradients", "canonical", "seconds", "ratio"),
)
PAIRS = ("a", "b", "both broken", "only a", "only b", "agreement %", "disagree on")


@dataclass(frozen=True)
class BackendRun:
    """One backend on all images.

    Attributes:
        engine: its name, with the mode of the native one.
        version: as the column `engine` of a result states it.
        verdicts: by key: `broken`, `robust` or `error`; images that are wrong when clean are absent.
        cost: model calls of the fixed shape, by kind.
        seconds: of this run, on this machine with whatever else it was doing.
    """

    engine: str
    version: str
    verdicts: dict[str, str]
    cost: Cost
    seconds: float

    def count(self, verdict: str) -> int:
        """Number of images with a verdict."""
        return sum(found == verdict for found in self.verdicts.values())


@dataclass(frozen=True)
class BackendPair:
    """Two backends, image by image. An image with an error counts as not broken.

    Attributes:
        a, b: their names.
        both: number of images that both broke.
        only_a, only_b: keys of the images that one broke and the other did not.
        agreement: share of images with the same verdict.
    """

    a: str
    b: str
    both: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    agreement: float


@dataclass(frozen=True)
class Crosscheck:
    """All backends on the same images.

    Attributes:
        model, dataset, attack: names.
        threat: as text.
        n: images drawn; those that are wrong when clean are not attacked.
        attacked: the others.
        seed: of subset and attacks.
        runs: in the given order, the native engine in its mode `fast` first.
        pairs: every two of the runs.
    """

    model: str
    dataset: str
    attack: str
    threat: str
    n: int
    attacked: int
    seed: int
    runs: tuple[BackendRun, ...]
    pairs: tuple[BackendPair, ...]

    @property
    def record(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    @property
    def costs(self) -> list[list[str]]:
        """Lines of the table of runs, in the order of `RUNS`; `ratio` is to the seconds of the first."""
        return [
            [
                run.engine,
                run.version,
                f"{self.attacked} of {self.n}",
                str(run.count("robust")),
                str(run.count("error")),
                *(str(calls) for calls in (run.cost.forwards, run.cost.gradients, run.cost.canonical)),
                f"{run.seconds:.2f}",
                f"{run.seconds / self.runs[0].seconds:.2f}",
            ]
            for run in self.runs
        ]

    @property
    def agreements(self) -> list[list[str]]:
        """Lines of the table of pairs, in the order of `PAIRS`."""
        return [
            [
                pair.a,
                pair.b,
                str(pair.both),
                str(len(pair.only_a)),
                str(len(pair.only_b)),
                f"{100 * pair.agreement:.2f}",
                ", ".join([*pair.only_a, *pair.only_b]),
            ]
            for pair in self.pairs
        ]


def available(names: Sequence[str], require: Callable[[Backend], None]) -> tuple[list[Backend], list[str]]:
    """The native engine in both of its modes, and the packages of these names, or all that are installed.

    Args:
        names: packages that must take part; without names, those that can.
        require: raises for a backend that cannot run the chain.

    Returns:
        Backends, the native one in mode `fast` first, and a sentence about each that is left out.

    Raises:
        InputError: the native engine, or a package that was named, cannot run the chain or is not installed.
    """
    found, lacking = [Backend()], []
    require(found[0])
    others = names or [name for name, (version, _) in installed_packages().items() if version]
    wanted = [Backend(name) for name in dict.fromkeys(others) if name != "native"]
    for backend in [Backend(mode="reference"), *wanted]:
        try:
            require(backend)
        except InputError as error:
            if backend.name in names and backend.name != "native":
                raise
            lacking.append(f"{backend.title}: {error}")
            continue
        found.append(backend)
    return found, lacking


def run(
    subject: Subject, chain: Chain, settings: EvalSettings, backends: Sequence[Backend], report: Report
) -> Crosscheck:
    """Run a chain on the same images by each backend, at the smallest radius of the settings.

    Args:
        subject: model and images.
        chain: attacks.
        settings: norm, radii, seed and device.
        backends: the one that the times of the others are divided by first.
        report: called as images finish.

    Raises:
        InputError: a backend cannot run the chain; no image is right when clean.
    """
    threat, seed, device = Threat(settings.norm, settings.ladder[0]), settings.seed, settings.device
    with isolated():
        model = Model(subject.classifier(device))
        images = _right_images(subject, model, chain.rows, device)
        job = replace(chain.job(threat, subject.card.n_classes, seed=seed), tied=subject.tied)
        runs = tuple(_run(backend, model, job, images, report) for backend in backends)
    names = (subject.loaded.card.name, subject.card.name, chain.name, str(threat))
    pairs = tuple(_pair(a, b) for a, b in itertools.combinations(runs, 2))
    return Crosscheck(*names, len(subject.images), len(images.keys), seed, runs, pairs)


def _right_images(subject: Subject, model: Model, rows: int, device: torch.device) -> ImageBlock:
    """The images that the model classifies correctly.

    Raises:
        InputError: there is none.
    """
    images = subject.images.floats(range(len(subject.images))).to(device)
    labels = subject.labels.to(device)
    clean = canonical.logits(model.canonical, images, rows)
    predictions = clean.argmax(1) if subject.tied is None else subject.tied.predictions(clean)
    right = ((predictions == labels) & clean.isfinite().all(1)).nonzero().flatten().tolist()
    if not right:
        found = f"none of {len(images)} images is right when clean"
        raise InputError(f"crosscheck on {subject.card.name}", found, "something to attack", "raise --n")
    return ImageBlock(images, labels, subject.split.keys, clean).take(right)


def _run(backend: Backend, model: Model, job: Job, images: ImageBlock, report: Report) -> BackendRun:
    """One backend on all of the images."""
    last = job.stages[-1][0]
    verdicts: dict[str, str] = {}

    def note(finding: Finding) -> None:
        if finding.error or finding.broken or finding.stage == last:
            verdict = "error" if finding.error else "broken" if finding.broken else "robust"
            verdicts[finding.key] = verdict
            report(backend.title, len(verdicts), len(images.keys))

    began = time.perf_counter()
    cost = backend.run_chain(model, job, images, note)
    seconds = time.perf_counter() - began
    return BackendRun(
        backend.title, backend.label, {key: verdicts[key] for key in images.keys}, cost, seconds
    )


def _pair(a: BackendRun, b: BackendRun) -> BackendPair:
    """On which images two backends agree."""
    keys = list(a.verdicts)
    broken_a = {key for key in keys if a.verdicts[key] == "broken"}
    broken_b = {key for key in keys if b.verdicts[key] == "broken"}
    return BackendPair(
        a=a.engine,
        b=b.engine,
        both=len(broken_a & broken_b),
        only_a=tuple(key for key in keys if key in broken_a - broken_b),
        only_b=tuple(key for key in keys if key in broken_b - broken_a),
        agreement=sum(a.verdicts[key] == b.verdicts[key] for key in keys) / len(keys),
    )
