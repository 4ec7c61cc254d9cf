"""The model work of a cell: the examination, the clean pass, the attacks, and the checks after them.

A cell is measured by code that reads images and writes findings, and never calls a model. The model work is
done by a `CellModel`, in this process (`in_process`) or in others (`workers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from robustbench_vlm.backends.backend import Backend
from robustbench_vlm.engine import attacked_view, batch_shapes, canonical, model_checks
from robustbench_vlm.engine.attack_watch import AttackWatch
from robustbench_vlm.engine.check_record import Check, Examined
from robustbench_vlm.engine.isolation import isolated, restored_buffers
from robustbench_vlm.engine.job import Cost, ImageBlock, Job, Model, Stages
from robustbench_vlm.engine.tied_classes import DistinctClasses
from robustbench_vlm.evaluation.cells import Cell
from robustbench_vlm.models.clip import Classifier
from robustbench_vlm.models.zoo import Loaded
from robustbench_vlm.results import verdicts
from robustbench_vlm.types import Finding

Line = dict[str, Any]
"""A line of a ledger: the finding of one stage on one image."""

Note = Callable[[str, Line, Tensor | None], None]
"""Called with the name of a stage, a line of its ledger, and the (3, H, W) adversarial image if kept."""

Read = Callable[[Sequence[int]], "Block"]
"""Reads images of a cell by their positions."""


@dataclass(frozen=True)
class Block:
    """Images that are attacked, with what is known of their files.

    Attributes:
        images: on the CPU, with clean logits and the stage in which each begins.
        sha256: of each image's file, in hex.
        again: keys of images whose findings are known. They are attacked once more where noise is drawn in
            batches, since a batch is attacked whole.
    """

    images: ImageBlock
    sha256: Sequence[str]
    again: frozenset[str] = frozenset()


@dataclass(frozen=True)
class AttackSetup:
    """What decides the model work of a cell beside the model and the images.

    Attributes:
        bank: (C, D) unit text embeddings of the classes.
        backend: what runs the attacks.
        job: all stages of the chain, the ball, the shapes of calls, the seed and the tied classes.
        needs: what the chain needs of a model, in the keywords of `model_checks.examine`.
        keeps: which adversarial images are kept.
    """

    bank: Tensor
    backend: Backend
    job: Job
    needs: Mapping[str, bool]
    keeps: Literal["none", "broken", "all"]

    @classmethod
    def of(cls, cell: Cell) -> AttackSetup:
        """The setup of a cell."""
        chain, settings, subject = cell.chain, cell.settings, cell.subject
        n_classes = subject.card.n_classes
        job = chain.job(cell.threat, n_classes, seed=settings.seed, batch_size=settings.batch_size)
        keeps = [settings.keeps_image(broken=broken) for broken in (False, True)]
        return cls(
            subject.bank,
            settings.backend,
            replace(job, tied=subject.tied),
            chain.needs(subject.n_distinct),
            "all" if keeps[0] else "broken" if keeps[1] else "none",
        )

    def keeps_image(self, *, broken: bool) -> bool:
        """Whether the adversarial image of a finding is kept."""
        return self.keeps == "all" or (broken and self.keeps == "broken")


class CellModel:
    """The model of one cell on one device.

    Attributes:
        setup: of the cell.
        device: where the model is.
        first: (n, 3, H, W) float32, the first images of the cell.
        classifier: decides every verdict.
    """

    def __init__(self, loaded: Loaded, setup: AttackSetup, first: Tensor, device: torch.device) -> None:
        """Put a model on a device.

        Args:
            loaded: the model.
            setup: of the cell.
            first: (n, 3, H, W) float32, the first images of the cell, as many as a call of the canonical pass
                has rows.
            device: where to attack.
        """
        self.setup, self.device, self._loaded, self.first = setup, device, loaded, first
        self.classifier = self._classifier()

    def _classifier(self, *, bf16: bool = False) -> Classifier:
        return Classifier(self._loaded.model, self.setup.bank, bf16=bf16).to(self.device)

    def examine(self, block: ImageBlock) -> Examined:
        """Check what the chain takes for granted about the model, on some images."""
        tied, labels = self.setup.job.tied, block.labels.to(self.device)
        return model_checks.examine(
            self.classifier if tied is None else DistinctClasses(self.classifier, tied),
            block.images.to(self.device),
            labels if tied is None else tied.labels(labels),
            block.keys,
            rows=batch_shapes.of_checks(len(block.keys), self.setup.job.rows),
            seed=self.setup.job.seed,
            **self.setup.needs,
        )

    def logits(self, images: Tensor) -> Tensor:
        """The canonical pass on (n, 3, H, W) images -> (n, C) float32 on the CPU."""
        return canonical.logits(self.classifier, images.to(self.device), self.setup.job.rows).cpu()

    @cached_property
    def watch(self) -> AttackWatch:
        """The model as attacks see it, and what the attacks bring to light about it."""
        job, precision = self.setup.job, self.setup.backend.precision
        fixed = batch_shapes.of_fixed(job.batch_size)
        sample = canonical.padded(self.first[:fixed].to(self.device), fixed)
        view = attacked_view.build(self.classifier, precision, sample, self._classifier(bf16=True))
        model = Model(self.classifier, view, fixed=precision.fixed)
        called = fixed if precision.fixed else batch_shapes.of_checks(len(self.first), job.rows)
        return AttackWatch(model, job.rows, called)

    def attack(self, stages: Stages, blocks: Iterable[Block], note: Note) -> Cost:
        """Run stages that share rows.

        Args:
            stages: name and attack of each.
            blocks: images; each is opened when those before it run out.
            note: called with every finding.

        Returns:
            The model calls that were made.
        """
        known: dict[str, tuple[Tensor, int, str, bool]] = {}  # of the images under attack, by key

        def opened() -> Iterator[ImageBlock]:
            for block in blocks:
                images = block.images
                labels = images.labels.tolist()
                for key, image, label, sha in zip(
                    images.keys, images.images, labels, block.sha256, strict=True
                ):
                    known[key] = (image.clone(), label, sha, key in block.again)
                clean = None if images.clean is None else images.clean.to(self.device)
                yield replace(
                    images,
                    images=images.images.to(self.device),
                    labels=images.labels.to(self.device),
                    clean=clean,
                )

        def found(finding: Finding) -> None:
            ended = finding.broken or bool(finding.error) or finding.stage == stages[-1][0]
            image, label, sha, again = known.pop(finding.key) if ended else known[finding.key]
            if again:
                return
            self.watch.note(finding, image, label)
            line = verdicts.line(finding, image, sha, label, self.setup.job.threat)
            kept = self.setup.keeps_image(broken=finding.broken)
            note(finding.stage, line, finding.adv if kept else None)

        return self.setup.backend.run(self.watch.watched, self.setup.job.of(stages), opened(), found)

    def checks(self, clean: Tensor) -> tuple[list[Check], Cost]:
        """What the attacks brought to light about the model, and the model calls that it took to see it.

        Args:
            clean: (n, C) canonical logits of the first images before the attacks.
        """
        return self.watch.checks(self.first.to(self.device), clean.to(self.device))


class ModelWork(Protocol):
    """Does the model work of one cell.

    Attributes:
        here: whether it is done in this process, and so ends with what this process interrupts.
    """

    here: ClassVar[bool]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the `run` block of the result says of who did it."""

    def examine(self, block: ImageBlock) -> Examined:
        """As `CellModel.examine`."""

    def logits(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """(n, C) canonical logits of the images at some positions, part by part."""

    def attack(self, stages: Stages, members: Sequence[int], read: Read, note: Note) -> Cost:
        """Run stages that share rows on the images at some positions.

        Args:
            stages: name and attack of each.
            members: positions; where noise is drawn in batches, whole batches of them.
            read: reads some of the members, in order.
            note: called with every finding.

        Returns:
            The model calls that were made.
        """

    def checks(self, clean: Tensor) -> tuple[list[Check], Cost]:
        """As `CellModel.checks`."""


Works = Callable[[Cell], AbstractContextManager[ModelWork]]
"""Begins the model work of a cell, which ends with the context."""


def first_images(cell: Cell) -> Tensor:
    """(n, 3, H, W) the first images of a cell, as many as a call of the canonical pass has rows."""
    return cell.subject.images.floats(range(len(cell.subject.images))[: cell.chain.rows])


@contextmanager
def in_process(cell: Cell) -> Iterator[ModelWork]:
    """The model work of a cell in this process; what calls change in the model is no part of later cells."""
    loaded, settings = cell.subject.loaded, cell.settings
    with isolated(tf32=settings.backend.precision.tf32), restored_buffers(loaded.model):
        yield _InProcess(cell, CellModel(loaded, AttackSetup.of(cell), first_images(cell), settings.device))


@dataclass(frozen=True)
class _InProcess:
    cell: Cell
    model: CellModel
    here: ClassVar[bool] = True

    @property
    def facts(self) -> Mapping[str, Any]:
        return {}

    def examine(self, block: ImageBlock) -> Examined:
        return self.model.examine(block)

    def logits(self, parts: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        images = self.cell.subject.images
        return (self.model.logits(images.floats(part)) for part in parts)

    def attack(self, stages: Stages, members: Sequence[int], read: Read, note: Note) -> Cost:
        parts = self.cell.subject.images.parts(members, self.model.setup.job.rows)
        return self.model.attack(stages, map(read, parts), note)

    def checks(self, clean: Tensor) -> tuple[list[Check], Cost]:
        return self.model.checks(clean)
