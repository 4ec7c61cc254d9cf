"""The nouns everything is about. Letters: B batch, C classes, D embedding, H W image, S engine slots.

Pixels are float32 in [0, 1] at the resolution of the ball everywhere outside an encoder; resizing and
normalisation live inside it. Torch is imported for annotations only, so the door opens fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from robustbench_vlm.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Classify = Callable[["Tensor"], "Tensor"]
"""(B, 3, H, W) float32 in [0, 1] -> logits (B, C) float32."""

Objective = Callable[["Tensor"], "Tensor"]
"""Adversarial images (B, 3, H, W) -> what the adversary maximises, per sample (B,)."""


TEMPLATES = ("a photo of a {c}.",)
"""The sentence of a class where no other is given; `{c}` is the class name."""


@dataclass(frozen=True)
class Batch:
    """Images with their names.

    Attributes:
        images: (B, 3, H, W) float32 in [0, 1], unnormalised.
        labels: (B,) int64.
        keys: the identity of each image for ever, `dataset/split/member`.
        sha256: of the encoded bytes of each image, in hex; empty where nobody asked.
    """

    images: Tensor
    labels: Tensor
    keys: tuple[str, ...]
    sha256: tuple[str, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return Batch(self.images.to(device), self.labels.to(device), self.keys, self.sha256)


class Encoder(Protocol):
    """An image tower that owns its preprocessing, with the text tower it was trained against."""

    @property
    def image_size(self) -> int:
        """Side of the tower's square input."""
        ...

    @property
    def logit_scale(self) -> float:
        """S of the cosine logits."""
        ...

    @property
    def rows_apart(self) -> bool:
        """Whether no row of a call depends on the others: false where batch norms are in train mode."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D) embeddings as the tower gives them, not unit length."""
        ...

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 1 + N, D): the embedding, then the N patches in the same space.

        Raises:
            InputError: a tower without patch tokens.
        """
        ...

    def text(self, sentences: Sequence[str]) -> Tensor:
        """N sentences -> (N, D) float32, unit length, without gradient."""
        ...


@dataclass(frozen=True)
class Wrapped:
    """An encoder seen through something that changes how it is called and nothing that it is."""

    encoder: Encoder

    @property
    def image_size(self) -> int:
        """The encoder's."""
        return self.encoder.image_size

    @property
    def logit_scale(self) -> float:
        """The encoder's."""
        return self.encoder.logit_scale

    @property
    def rows_apart(self) -> bool:
        """The encoder's."""
        return self.encoder.rows_apart

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D)."""
        return self.encoder(images)

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 1 + N, D)."""
        return self.encoder.tokens(images)

    def text(self, sentences: Sequence[str]) -> Tensor:
        """N sentences -> (N, D) float32, unit length."""
        return self.encoder.text(sentences)


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

    def __post_init__(self) -> None:
        counts = {role: len(bank) for role, bank in self.text.items()}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{role} {count}" for role, count in sorted(counts.items()))
            raise InputError("text banks", f"different numbers of classes: {found}", "one class list for all")

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
        progress: share of the run's steps that are done, in [0, 1): what "from epoch 60 of 200" becomes.
    """

    batch: Batch
    adv: Tensor
    targets: Mapping[str, Tensor]
    carry: Mapping[str, Tensor]
    progress: float = 0.0


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


@dataclass(frozen=True)
class Passes:
    """Image-tower passes of one training step; the student's own in the attack go without saying.

    Attributes:
        student: student forwards with gradient in the outer loss, each followed by one full backward.
        teachers: forwards of each teacher outside the attack.
        attacked: teachers that every attack step runs and differentiates, too.
        learners: teachers whose outer forward is followed by a full backward.
    """

    student: int
    teachers: Mapping[str, int] = field(default_factory=dict)
    attacked: tuple[str, ...] = ()
    learners: tuple[str, ...] = ()


class Defense(Protocol):
    """A way to train: a frozen dataclass whose fields are its hyper-parameters.

    Three members are optional: `require` (see `Choosy`), `passes` (see `Priced`), and a class variable
    `learners`, a tuple of roles whose prompts are trained along with the student's (`[prompts]` of a recipe).
    """

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


@runtime_checkable
class Choosy(Protocol):
    """A defense that cannot use every model."""

    def require(self, roles: Roles) -> None:
        """Asked once, before the first step and before any file is written.

        Raises:
            InputError: a model that the losses cannot be computed with.
        """
        ...


@runtime_checkable
class Priced(Protocol):
    """A defense that says what a step of it costs; a test counts the passes."""

    def passes(self) -> Passes:
        """Passes of one step with these hyper-parameters."""
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
