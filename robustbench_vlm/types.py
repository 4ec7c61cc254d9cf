"""The nouns everything is about. Letters: B batch, C classes, D embedding, H W image, S engine slots.

Pixels are float32 in [0, 1] at the resolution of the ball everywhere outside an encoder; resizing and
normalisation live inside it. Torch is imported for annotations only, so the door opens fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Classify = Callable[["Tensor"], "Tensor"]
"""(B, 3, H, W) float32 in [0, 1] -> logits (B, C) float32."""

Objective = Callable[["Tensor"], "Tensor"]
"""Adversarial images (B, 3, H, W) -> what the adversary maximises, per sample (B,)."""


@dataclass(frozen=True)
class Batch:
    """Images with their names.

    Attributes:
        images: (B, 3, H, W) float32 in [0, 1], unnormalised.
        labels: (B,) int64.
        keys: the identity of each image for ever, `dataset/split/member`.
    """

    images: Tensor
    labels: Tensor
    keys: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return Batch(self.images.to(device), self.labels.to(device), self.keys)


class Encoder(Protocol):
    """An image tower that owns its preprocessing, with the text tower it was trained against."""

    image_size: int
    logit_scale: float

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D) embeddings as the tower gives them, not unit length."""
        ...

    def text(self, sentences: Sequence[str]) -> Tensor:
        """N sentences -> (N, D) float32, unit length, without gradient."""
        ...


@dataclass(frozen=True)
class Roles:
    """Who takes part in a training step.

    Attributes:
        student: the encoder being trained.
        teachers: frozen encoders by role (`robust`, `clean`, `anchor`).
        text: text bank (C, D_role) of each role, the student's under `student`; unit rows.
    """

    student: Encoder
    teachers: Mapping[str, Encoder]
    text: Mapping[str, Tensor]

    def encoder(self, role: str) -> Encoder:
        """The student, or the teacher of that role."""
        return self.student if role == "student" else self.teachers[role]

    def cosines(self, role: str, embeddings: Tensor) -> Tensor:
        """Cosines (B, C) of (B, D) embeddings with the text bank of `role`."""
        unit = embeddings / embeddings.norm(dim=-1, keepdim=True)
        cosines: Tensor = unit @ self.text[role].T
        return cosines

    def logits(self, role: str, images: Tensor) -> Tensor:
        """Z = s e W: zero-shot logits (B, C) of `role` on images (B, 3, H, W), with its own s and text."""
        encoder = self.encoder(role)
        return encoder.logit_scale * self.cosines(role, encoder(images))


@dataclass(frozen=True)
class Step:
    """What the outer loss of one step is given.

    Attributes:
        batch: the clean images.
        adv: (B, 3, H, W) in [0, 1], the adversarial images of the inner maximisation (detached).
        targets: what `Defense.targets` returned for this batch.
        carry: running state that the defense returned in its last `Terms` (empty at the first step).
    """

    batch: Batch
    adv: Tensor
    targets: Mapping[str, Tensor]
    carry: Mapping[str, Tensor]


@dataclass(frozen=True)
class Terms:
    """What the outer loss of one step gives back.

    Attributes:
        total: scalar with gradient, what the student minimises.
        parts: detached scalars for the log.
        carry: running state for the next step; saved in checkpoints.
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    carry: Mapping[str, Tensor] = field(default_factory=dict)


class Defense(Protocol):
    """A way to train: a frozen dataclass whose fields are its hyper-parameters."""

    teachers: ClassVar[tuple[str, ...]]
    """Roles that a recipe must fill, each of which changes the loss."""

    needs_text: ClassVar[bool]
    """Whether the loss uses labels and class sentences."""

    adversarial: ClassVar[bool]
    """Whether there is an inner maximisation; a recipe has `[inner]` exactly then."""

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """What the frozen models say about the clean batch; called once, without gradient."""
        ...

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """What the adversary maximises, per sample; not called unless `adversarial`."""
        ...

    def outer(self, roles: Roles, step: Step) -> Terms:
        """What the student minimises."""
        ...


@dataclass(frozen=True)
class Finding:
    """What one attack found out about one image.

    Attributes:
        key: the image.
        broken: an admissible image with another prediction was found and verified.
        adv: (3, H, W) that image on the CPU, or the last iterate when `broken` is false.
        target: class index that the successful (or last) trajectory aimed at, -1 if untargeted.
        restart: index of that trajectory's restart.
        iteration: model evaluation of that trajectory at which success was first seen, 0-based; -1 if none.
        forwards: forward passes spent on this image, over all trajectories, in canonical order.
        backwards: image gradients spent on this image, likewise.
        prediction: class of `adv` in the canonical pass.
        margin: true logit minus largest other logit of `adv` in the canonical pass.
        zero_gradients: evaluations whose image gradient was exactly zero.
        progress: by how much the objective rose above its first value, the most over all trajectories; 0 says
            that no step ever found anything better than its start, None that nobody looked.
        stage: name of the attack in its chain.
        error: why there is no verdict (a non-finite gradient); empty otherwise.
    """

    key: str
    broken: bool
    adv: Tensor
    target: int
    restart: int
    iteration: int
    forwards: int
    backwards: int
    prediction: int
    margin: float
    zero_gradients: int = 0
    error: str = ""
    progress: float | None = None
    stage: str = ""


Config = Mapping[str, Any]
"""A resolved configuration: plain TOML/JSON values only."""
