"""What travels together into every engine: the model, the job, and the images; and what a run cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustbench_vlm.engine import batch_shapes, canonical, losses
from robustbench_vlm.engine.interface import Attack, Stop
from robustbench_vlm.engine.tied_classes import TiedClasses
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat
from robustbench_vlm.types import Classify, Finding

Stages = Sequence[tuple[str, Attack]]
"""Name and attack of each stage of a chain, in order."""

OnFinding = Callable[[Finding], None]
"""Called once for each image and stage, in the order in which they end."""


@dataclass(frozen=True)
class Model:
    """One classifier, as verdicts see it and as attacks see it.

    Attributes:
        canonical: (B, 3, H, W) float32 in [0, 1] -> logits (B, C), in fp32; decides every verdict. In eval
            mode, parameters best frozen.
        view: the same classifier in lower precision, compiled or replayed, which attacks query and
            differentiate (`attacked_view.build`); None where attacks see `canonical` itself.
        fixed: whether attacks see it in calls of one shape only, for which it was compiled or captured.
        known: what runs found out about the shapes of its calls, by whether there were calls without
            gradient and calls with it.
    """

    canonical: Classify
    view: Classify | None = None
    fixed: bool = False
    known: dict[tuple[bool, bool], batch_shapes.Known] = field(default_factory=dict, compare=False)

    @property
    def attacked(self) -> Classify:
        """What attacks query and differentiate."""
        return self.canonical if self.view is None else self.view

    @property
    def plain(self) -> bool:
        """Whether attacks see the very function that decides."""
        return self.attacked is self.canonical


@dataclass(frozen=True)
class Job:
    """What is to be done with every image: the attacks, the ball, and how they are run.

    Attributes:
        stages: name and attack of each stage; each stage is given the survivors of the one before. The name
            is part of the noise's name.
        threat: norm and radius.
        rows: fixed number of rows of every call of the canonical pass; packages and reference mode also
            attack the images in batches of that many.
        n_classes: number of classes that the model tells apart.
        batch_size: most rows with an image in a call of the attacked view; None for `auto`: as many as there
            are images, up to where more do not make a row cheaper (`batch_shapes`). Where the shapes give the
            same bits, it changes speed and memory and no finding.
        stop: when a trajectory ends; see `interface.Rows`.
        seed: part of the noise's name.
        tied: classes that the model cannot tell apart; None if there are none. The attacked function has one
            logit for each distinct class (`Backend.run`).
    """

    stages: Stages
    threat: Threat
    rows: int
    n_classes: int
    batch_size: int | None = None
    stop: Stop = "first"
    seed: int = 0
    tied: TiedClasses | None = None

    @property
    def full(self) -> int:
        """Rows of a full call of the attacked view, as far as is known before a run."""
        return batch_shapes.of_fixed(self.batch_size)

    def of(self, stages: Stages) -> Job:
        """The same job with other stages."""
        return dataclasses.replace(self, stages=stages)

    def check(self) -> None:
        """Refuse a job that cannot be run.

        Raises:
            InputError: an attack that does not support the norm, or that aims at no class with a loss that
                does; a batch size below 1.
        """
        for name, attack in self.stages:
            loss: losses.Name | None = getattr(attack, "loss", None)
            if loss is not None and losses.targeted(loss) and attack.target_count(2) == 0:
                where = f"stage {name}, loss {loss!r}"
                raise InputError(
                    where, "the attack has no target classes", "an untargeted loss", "use margin"
                )
            if self.threat.norm not in attack.norms:
                where = f"stage {name}, attack {type(attack).__name__.lower()}"
                raise InputError(where, f"norm {self.threat.norm!r}", " or ".join(attack.norms))
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError("batch size", str(self.batch_size), "a number of images, at least 1")


@dataclass(frozen=True)
class ImageBlock:
    """Some of the images of a run, so that the others need not be in memory.

    Attributes:
        images: (N, 3, H, W) float32 in [0, 1], on the model's device.
        labels: (N,) int64.
        keys: N names, distinct in the whole run.
        clean: (N, C) logits of `canonical.logits(model.canonical, images, rows)`; None if not known yet.
        begin: the stage in which each image begins; the first one if None.
    """

    images: Tensor
    labels: Tensor
    keys: Sequence[str]
    clean: Tensor | None = None
    begin: Sequence[int] | None = None

    def take(self, positions: Sequence[int]) -> ImageBlock:
        """The images at some positions."""
        index = torch.tensor(positions, dtype=torch.int64, device=self.images.device)
        return ImageBlock(
            self.images[index],
            self.labels[index],
            [self.keys[i] for i in positions],
            None if self.clean is None else self.clean[index],
            None if self.begin is None else [self.begin[i] for i in positions],
        )


@dataclass(frozen=True)
class PreparedBlock:
    """An `ImageBlock` that agrees with its job and whose clean logits are known; see there."""

    images: Tensor
    labels: Tensor
    keys: Sequence[str]
    clean: Tensor
    begin: Sequence[int]
    calls: int  # of the canonical pass that were made to find `clean`


def prepare(block: ImageBlock, model: Model, job: Job) -> PreparedBlock:
    """Check images against the job, and run the clean pass if its logits are not known.

    Raises:
        InputError: shapes, keys, pixels, labels or clean logits that disagree.
    """
    _check(block, job)
    clean, calls = block.clean, 0
    if clean is None:
        calls = -(-len(block.images) // job.rows)
        clean = canonical.logits(model.canonical, block.images, job.rows) if calls else torch.empty(0, 0)
    elif tuple(clean.shape) != (len(block.images), job.n_classes):
        raise InputError("clean logits", str(tuple(clean.shape)), str((len(block.images), job.n_classes)))
    begin = [0] * len(block.images) if block.begin is None else block.begin
    return PreparedBlock(block.images, block.labels, block.keys, clean, begin, calls)


def _check(block: ImageBlock, job: Job) -> None:
    images, labels, keys = block.images, block.labels, block.keys
    if not len(images) == len(labels) == len(keys) or len(set(keys)) != len(keys):
        found = f"{len(images)} images, {len(labels)} labels, {len(set(keys))} distinct of {len(keys)} keys"
        raise InputError("attack", found, "as many labels and distinct keys as images")
    if not len(images):
        return
    if images.dtype != torch.float32 or not (images.min() >= 0 and images.max() <= 1):
        low, high = float(images.min()), float(images.max())
        raise InputError("images", f"{images.dtype} in [{low:.4g}, {high:.4g}]", "float32 pixels in [0, 1]")
    if int(labels.min()) < 0 or int(labels.max()) >= job.n_classes:
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise InputError("labels", found, f"0 to {job.n_classes - 1}, the classes of the model")


@dataclass(frozen=True)
class Cost:
    """Model calls that a run really made; unlike findings they depend on scheduling.

    Attributes:
        forwards: calls of the attacked view without gradient.
        gradients: calls of the attacked view with an image gradient.
        canonical: calls of the canonical pass, the clean pass included.
        unconfirmed: successes that the canonical pass did not confirm; their rows went on.
        largest: rows of the largest call of the attacked view.
    """

    forwards: int = 0
    gradients: int = 0
    canonical: int = 0
    unconfirmed: int = 0
    largest: int = 0


def total(costs: Iterable[Cost]) -> Cost:
    """The costs of several runs together: sums, and the largest call of all."""
    made = list(costs)
    names = [field.name for field in dataclasses.fields(Cost)]
    summed = {name: sum(getattr(cost, name) for cost in made) for name in names}
    return Cost(**summed | {"largest": max((cost.largest for cost in made), default=0)})
