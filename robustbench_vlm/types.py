"""Types that every part of the package uses. Shapes: B batch, C classes, D embedding, H and W image.

Outside an encoder, pixels are float32 in [0, 1] at the resolution of the ball; resizing and normalisation
happen inside it. Torch is imported for annotations only, so that the command line starts fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Classify = Callable[["Tensor"], "Tensor"]
"""A classifier: (B, 3, H, W) float32 in [0, 1] -> logits (B, C) float32. Never an `Encoder`."""

Objective = Callable[["Tensor"], "Tensor"]
"""What an attack maximises: adversarial images (B, 3, H, W) -> one value a sample (B,)."""


TEMPLATES = ("a photo of a {c}.",)
"""The sentence of a class where no other is given; `{c}` is the class name."""


@dataclass(frozen=True)
class Batch:
    """Images with labels and keys.

    Attributes:
        images: (B, 3, H, W) float32 in [0, 1], unnormalised.
        labels: (B,) int64.
        keys: the identity of each image, `dataset/split/member`; it never changes.
        sha256: of the encoded bytes of each image, in hex; empty if not computed.
    """

    images: Tensor
    labels: Tensor
    keys: tuple[str, ...]
    sha256: tuple[str, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; from pinned memory, the copy does not hold up the caller."""
        images, labels = (t.to(device, non_blocking=t.is_pinned()) for t in (self.images, self.labels))
        return Batch(images, labels, self.keys, self.sha256)

    def pinned(self) -> Batch:
        """The same batch in pinned memory, from which a GPU copies while it computes."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.keys, self.sha256)


@runtime_checkable
class Encoder(Protocol):
    """An image tower with its preprocessing, and the text tower it was trained against.

    It maps pixels to embeddings, not to logits. `isinstance(model, Encoder)` tells it from a classifier.
    """

    @property
    def image_size(self) -> int:
        """Side of the tower's square input."""
        ...

    @property
    def logit_scale(self) -> float:
        """The factor s of the zero-shot logits s * cos(image, class)."""
        ...

    @property
    def rows_apart(self) -> bool:
        """Whether each row of a call is computed alone: false while batch norms are in train mode."""
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
    """An encoder that passes every call on to another one; subclasses change how it is called.

    Attributes:
        encoder: the other one.
    """

    encoder: Encoder

    @property
    def image_size(self) -> int:
        """Side of the tower's square input."""
        return self.encoder.image_size

    @property
    def logit_scale(self) -> float:
        """The factor of the zero-shot logits."""
        return self.encoder.logit_scale

    @property
    def rows_apart(self) -> bool:
        """Whether each row of a call is computed alone."""
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
class Finding:
    """The result of one attack on one image.

    Attributes:
        key: the image.
        broken: whether an image inside the ball with another prediction was found and verified.
        adv: (3, H, W) on the CPU: that image, or the last iterate when `broken` is false.
        target: class index that the successful (or last) trajectory aimed at, -1 if untargeted.
        restart: index of that trajectory's restart.
        iteration: model evaluation of that trajectory at which it first succeeded, 0-based; -1 if none.
        forwards: forward passes spent on this image over all trajectories, in canonical order.
        backwards: image gradients spent on this image over all trajectories, in canonical order.
        prediction: class of `adv` in the canonical pass.
        margin: true logit minus largest other logit of `adv` in the canonical pass.
        zero_gradients: evaluations whose image gradient was exactly zero.
        progress: largest rise of the objective above its first value, over all trajectories. With 0, no step
            found anything better than its start; `None` if it was not measured.
        stage: name of the attack in its chain.
        error: why there is no verdict, such as a gradient that is not finite; empty otherwise.
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
