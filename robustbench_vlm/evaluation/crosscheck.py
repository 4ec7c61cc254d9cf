"""Do the engines agree? The same images through each, verdict by verdict, and what each of them spent."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from robustbench_vlm.backends.backend import Backend, installed_packages
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.engine import attacked_view, canonical
from robustbench_vlm.engine.job import Cost, ImageBlock, Job, Model, Stages
from robustbench_vlm.errors import InputError
from robustbench_vlm.evaluation.cells import Subject
from robustbench_vlm.evaluation.chain import plugin
from robustbench_vlm.models.clip import Classifier
from robustbench_vlm.threat import Threat
from robustbench_vlm.types import Finding

Report = Callable[[str, int, int], None]

RUNS = (
    *("engine", "version", "attacked", "robust", "errors"),
    *("forwards", "gradients", "canonical", "seconds", "ratio"),
)
PAIRS = ("a", "b", "both broken", "only a", "only b", "agreement %", "disagree on")


@dataclass(frozen=True)
class Run:
    """One engine on all images.

    Attributes:
        engine: its name, with the mode of the native one.
        version: as results state it.
        verdicts: by key: `broken`, `robust`, or `error`; images that are wrong when clean are absent.
        cost: model calls of the fixed shape, by kind.
        seconds: of this run on this machine, which depend on what else it does.
    """

    engine: str
    version: str
    verdicts: dict[str, str]
    cost: Cost
    seconds: float

    def count(self, verdict: str) -> int:
        """Images of that verdict."""
        return sum(found == verdict for found in self.verdicts.values())


@dataclass(frozen=True)
class Pair:
    """Two engines, image by image; errors are no verdict, and count as broken by neither.

    Attributes:
        a, b: names of the engines.
        both: images that both broke.
        only_a, only_b: keys of those that one broke and the other did not.
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
    """All engines on the same images.

    Attributes:
        model, dataset, attack: names.
        threat: as text.
        n: images drawn; those that are wrong when clean are not attacked.
        attacked: the others.
        seed: of subset and attacks.
        runs: in the order asked for, the native engine in its mode `fast` first.
        pairs: every two of them.
    """

    model: str
    dataset: str
    attack: str
    threat: str
    n: int
    attacked: int
    seed: int
    runs: tuple[Run, ...]
    pairs: tuple[Pair, ...]

    @property
    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @property
    def costs(self) -> list[list[str]]:
        """Lines of the table of runs, as `RUNS` has them; the ratio is to the seconds of the first."""
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
        """Lines of the table of pairs, as `PAIRS` has them."""
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


def ways(names: Sequence[str], refuse: Callable[[Backend], None]) -> tuple[list[Backend], list[str]]:
    """The native engine in both of its modes, and the packages of these names, or all that are installed.

    Args:
        names: packages that must take part; of others, those that cannot are left out.
        refuse: raises for an engine that cannot do the chain.

    Returns:
        Engines, and a sentence about each that is left out.

    Raises:
        InputError: the native engine, or a package that was named, cannot do the chain or is not installed.
    """
    found, lacking = [Backend()], []
    refuse(found[0])
    others = names or [name for name, (version, _) in installed_packages().items() if version]
    wanted = [Backend(name) for name in dict.fromkeys(others) if name != "native"]
    for backend in [Backend(mode="reference"), *wanted]:
        try:
            refuse(backend)
        except InputError as error:
            if backend.name in names and backend.name != "native":
                raise
            lacking.append(f"{backend.title}: {error}")
            continue
        found.append(backend)
    return found, lacking


def run(
    what: Subject,
    card: AttackCard,
    threat: Threat,
    backends: Sequence[Backend],
    *,
    seed: int,
    device: torch.device,
    report: Report,
) -> Crosscheck:
    """Run a chain on the same images by each engine.

    Args:
        what: model and images.
        card: the chain.
        threat: ball and radius.
        backends: the engines, the one that others are measured by first.
        seed: of the noise.
        device: where to attack.
        report: told as images get their verdict.

    Raises:
        InputError: an engine cannot do the chain; no image is right when clean.
    """
    stages = [(stage.name, plugin(card, stage)) for stage in card.stage]
    with attacked_view.numerics():
        arena = _Arena(what, card, threat, stages, seed, device)
        runs = tuple(arena.run(backend, report) for backend in backends)
    names = (what.loaded.card.name, what.card.name, card.name, str(threat))
    pairs = tuple(_pair(a, b) for a, b in itertools.combinations(runs, 2))
    return Crosscheck(*names, len(what.images), len(arena.right), seed, runs, pairs)


class _Arena:
    """The images that are right when clean, with their model on the device."""

    def __init__(
        self,
        what: Subject,
        card: AttackCard,
        threat: Threat,
        stages: Stages,
        seed: int,
        device: torch.device,
    ) -> None:
        self.card, self.threat, self.stages, self.seed = card, threat, stages, seed
        self.classify = Classifier(what.loaded.model, what.bank).to(device)
        images, labels = what.images.floats(range(len(what.images))).to(device), what.labels.to(device)
        clean = canonical.logits(self.classify, images, card.rows)
        self.right = ((clean.argmax(1) == labels) & clean.isfinite().all(1)).nonzero().flatten().tolist()
        if not self.right:
            found = f"none of {len(images)} images is right when clean"
            raise InputError(f"crosscheck on {what.card.name}", found, "something to attack", "raise --n")
        self.images, self.labels, self.clean = images[self.right], labels[self.right], clean[self.right]
        self.keys = [what.split.keys[i] for i in self.right]

    def run(self, backend: Backend, report: Report) -> Run:
        """One engine on all of them."""
        last = self.stages[-1][0]
        verdicts: dict[str, str] = {}

        def take(finding: Finding) -> None:
            if finding.error or finding.broken or finding.stage == last:
                verdict = "error" if finding.error else "broken" if finding.broken else "robust"
                verdicts[finding.key] = verdict
                report(backend.title, len(verdicts), len(self.keys))

        began = time.perf_counter()
        job = Job(
            stages=self.stages,
            threat=self.threat,
            rows=self.card.rows,
            n_classes=self.clean.shape[1],
            stop=self.card.stop,
            seed=self.seed,
        )
        block = ImageBlock(self.images, self.labels, self.keys, self.clean)
        cost = backend.run_chain(Model(self.classify), job, block, take)
        seconds = time.perf_counter() - began
        return Run(backend.title, backend.label, {key: verdicts[key] for key in self.keys}, cost, seconds)


def _pair(a: Run, b: Run) -> Pair:
    """What two runs agree about."""
    keys = list(a.verdicts)
    broken_a = {key for key in keys if a.verdicts[key] == "broken"}
    broken_b = {key for key in keys if b.verdicts[key] == "broken"}
    return Pair(
        a=a.engine,
        b=b.engine,
        both=len(broken_a & broken_b),
        only_a=tuple(key for key in keys if key in broken_a - broken_b),
        only_b=tuple(key for key in keys if key in broken_b - broken_a),
        agreement=sum(a.verdicts[key] == b.verdicts[key] for key in keys) / len(keys),
    )
