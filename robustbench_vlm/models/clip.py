"""The one encoder: pixels in [0, 1] at any resolution -> embeddings; sentences -> unit text embeddings.

Resize and normalisation live here and nowhere else, so a ball drawn outside is a ball in pixel space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the customary name
from torch.nn.modules.batchnorm import _BatchNorm

from robustbench_vlm.errors import WeightsError
from robustbench_vlm.store import fingerprint
from robustbench_vlm.types import Wrapped

TEXT_ROWS = 64  # fixed shape of a text-tower call, so that a bank does not depend on how it is cut


@dataclass(frozen=True)
class Preprocess:
    """What happens to pixels inside the encoder, in order: bicubic resize, then (x - mean) / std.

    Attributes:
        image_size: side of the square input of the tower, pixels.
        mean: per channel, in [0, 1] units.
        std: per channel, in [0, 1] units.
        antialias: kernel of the in-graph resize; `True` is the closest to PIL's.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    antialias: bool = True


class Clip(nn.Module):
    """An image tower with its preprocessing, and the frozen text tower it was trained against.

    Attributes:
        visual: the image tower; the only part that training changes.
        language: token ids (N, L) int64 -> (N, D) text embeddings.
        preprocess: what happens to pixels before the tower.
        logit_scale: s of the cosine logits, a plain number (it is never trained here).
        facts: what a checkpoint card must know to build this model again.
    """

    def __init__(
        self,
        visual: nn.Module,
        language: nn.Module,
        tokenize: Callable[[list[str]], Tensor],
        preprocess: Preprocess,
        logit_scale: float,
        facts: Mapping[str, object],
    ) -> None:
        super().__init__()
        self.visual = visual
        self.language = language.requires_grad_(False)
        self.tokenize = tokenize
        self.preprocess = preprocess
        self.image_size = preprocess.image_size
        self.logit_scale = logit_scale
        self.facts = dict(facts)
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @property
    def rows_apart(self) -> bool:
        """Whether no row of a call depends on the others: false where batch norms are in train mode."""
        return not any(isinstance(m, _BatchNorm) and m.training for m in self.visual.modules())

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [0, 1] -> (B, D) embeddings as the tower gives them, not unit length."""
        embeddings: Tensor = self.visual(self._prepared(images))
        return embeddings

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [0, 1] -> (B, 1 + N, D): the embedding, then the N patches in row order.

        The patches go through the last norm and the projection that the class token goes through, so row 0
        is what `forward` gives.

        Raises:
            WeightsError: a tower that is no transformer with a class token.
        """
        visual: Any = self.visual
        if getattr(visual, "pool_type", None) != "tok" or visual.attn_pool or visual.final_ln_after_pool:
            found = f"{self.facts['arch']} has no class token beside its patches"
            raise WeightsError("patch tokens", found, "a vision transformer such as ViT-B-32")
        kept: list[Tensor] = []
        handle = visual.transformer.register_forward_hook(lambda *call: kept.append(call[-1]))
        try:
            visual(self._prepared(images))
        finally:
            handle.remove()
        rows: Tensor = visual.ln_post(kept[0][:, : len(visual.positional_embedding)])  # prompts come after
        projected: Tensor = rows @ visual.proj
        return projected

    def _prepared(self, images: Tensor) -> Tensor:
        """The input of the tower: resized and normalised."""
        size = self.image_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(
                images,
                size=(size, size),
                mode="bicubic",
                align_corners=False,
                antialias=self.preprocess.antialias,
            )
        return (images - self.mean) / self.std

    @torch.no_grad()
    def text(self, sentences: Sequence[str]) -> Tensor:
        """N sentences -> (N, D) float32, unit length."""
        rows = []
        for start in range(0, len(sentences), TEXT_ROWS):
            chunk = list(sentences[start : start + TEXT_ROWS])
            padded = chunk + [""] * (TEXT_ROWS - len(chunk))
            tokens = self.tokenize(padded).to(self.mean.device)
            rows.append(self.language(tokens).float()[: len(chunk)])
        return F.normalize(torch.cat(rows), dim=-1)

    def untrained_words(self, sentences: Sequence[str]) -> list[str]:
        """Sentences with a token that the text tower never met in training; empty if none is known to."""
        trained = self.facts.get("trained_tokens")
        if not isinstance(trained, frozenset):
            return []
        tokens = self.tokenize(list(sentences)).tolist()
        return [s for s, row in zip(sentences, tokens, strict=True) if not trained.issuperset(row)]

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the image tower, of the text tower, and of the whole model with its preprocessing."""
        image, text = state_sha256(self.visual), state_sha256(self.language)
        whole = {
            "image": image,
            "text": text,
            "preprocess": asdict(self.preprocess),
            "logit_scale": self.logit_scale,
            "arch": self.facts["arch"],
            "quick_gelu": self.facts["quick_gelu"],
        }
        return {"image": image, "text": text, "model": fingerprint(whole)}


class InBf16(Wrapped):
    """An encoder whose image tower runs under bf16 autocast; embeddings come back in fp32."""

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D) float32."""
        with torch.autocast(images.device.type, torch.bfloat16):
            embeddings = self.encoder(images)
        return embeddings.float()

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 1 + N, D) float32."""
        with torch.autocast(images.device.type, torch.bfloat16):
            rows = self.encoder.tokens(images)
        return rows.float()


def state_sha256(module: nn.Module) -> str:
    """SHA-256 over the sorted names, types, shapes and bytes of a module's state."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.reshape(-1)  # counters of batch norms have no dimension, and could not be viewed
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients inside; every module's mode and every flag restored outside.

    The inner maximisation asks for image gradients only; without this, weight gradients would be computed
    in every attack step and, if left in `.grad`, would corrupt the update.
    """
    modes = [(part, part.training) for part in module.modules()]
    flags = [(p, p.requires_grad) for p in module.parameters()]
    module.eval()
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
