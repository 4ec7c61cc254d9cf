"""The nouns everything is about. Letters: B batch, C classes, D embedding, H W image, S engine slots.

Pixels are float32 in [0, 1] at the resolution of the ball everywhere outside an encoder; resizing and
normalisation live inside it. Torch is imported for annotations only, so the door opens fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

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
