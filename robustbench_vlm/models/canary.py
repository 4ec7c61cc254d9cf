"""Outputs of a model on a few fixed inputs, stored in its card and compared whenever the model is loaded.

The hashes in a card show that the weights are the same. The canary shows that the code still computes the
same with them. Each part of the canary uses one more step of the encoder than the part before, so the first
part that differs names the step. It is computed on the CPU in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the customary name

from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models.checkpoint_card import Canary
from robustbench_vlm.models.clip import Clip

SENTENCES = ("a photo of a dog", "three small red squares", "a satellite photo of a river.")
IMAGES = 2
SHOWN = 8  # entries of each embedding that are stored
DIGITS = 6  # decimals of the stored numbers


def pictures(n: int, side: int) -> Tensor:
    """(n, 3, side, side) float32 in [0, 1): a ramp and noise in equal parts, from integers alone."""
    index = torch.arange(n * 3 * side * side, dtype=torch.int64)
    noise = ((index * 2654435761 + 12345) % 2**32 * 40503 // 2**16) % 256
    y, x = (index // side) % side, index % side
    ramp = (x * 3 + y * 5 + index // (side * side) * 61) * 256 // (8 * side) % 256
    return ((noise + ramp).float() / 512).view(n, 3, side, side)


def _rows(embeddings: Tensor) -> tuple[tuple[float, ...], ...]:
    norms = embeddings.norm(dim=-1, keepdim=True)
    shown = torch.cat([norms, (embeddings / norms)[:, :SHOWN]], dim=1)
    return tuple(tuple(round(v, DIGITS) for v in row) for row in shown.tolist())


@torch.no_grad()
def take(model: Clip) -> Canary:
    """The canary of a model on the CPU.

    Raises:
        WeightsError: an embedding is not finite.
    """
    mode = model.training
    model.eval()
    images = pictures(IMAGES, model.image_size)
    pixels, resized = model(images), model(pictures(1, 2 * model.image_size))
    text = model.language(model.tokenize(list(SENTENCES))).float()
    tower = model.visual(images)
    model.train(mode)
    for part, embeddings in (("image", tower), ("image", pixels), ("image", resized), ("text", text)):
        if not torch.isfinite(embeddings).all() or not embeddings.norm(dim=-1).all():
            raise WeightsError(f"model {model.facts.arch}", f"{part} embeddings that are zero or not finite")
    logits = model.logits(pixels, F.normalize(text, dim=-1))
    return Canary(
        tower=_rows(tower),
        pixels=_rows(pixels),
        resized=_rows(resized),
        text=_rows(text),
        logits=tuple(tuple(round(v, DIGITS) for v in row) for row in logits.tolist()),
    )


def moved(stated: Canary, found: Canary) -> list[str]:
    """Names of the parts that differ by more than the stated tolerance, in the order of their fields."""
    return [
        part
        for part in ("tower", "pixels", "resized", "text", "logits")
        if distance(stated, found, part) > stated.tolerance
    ]


def distance(stated: Canary, found: Canary, part: str) -> float:
    """Largest difference in a part: of entries absolute, of norms and logits relative to the largest."""
    a, b = (torch.tensor(getattr(canary, part), dtype=torch.float64) for canary in (stated, found))
    if a.shape != b.shape:
        return float("inf")
    if part == "logits":
        return float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))
    norms = (a[:, 0] - b[:, 0]).abs() / a[:, 0].abs().clamp(min=1e-12)
    return float(torch.cat([norms, (a[:, 1:] - b[:, 1:]).abs().flatten()]).max())


def reason(parts: list[str]) -> str:
    """Which step of the encoder the differing parts point to."""
    if "tower" in parts and "text" in parts:
        return "both towers: their activation (QuickGELU or GELU), or both their weights"
    if "tower" in parts:
        return "the image tower: its weights or its code"
    image = (
        "mean or std of the normalisation" if "pixels" in parts else "the resize kernel (bicubic, antialias)"
    )
    if "text" in parts:
        return "the text tower or the tokenizer" + (
            f", and {image}" if set(parts) & {"pixels", "resized"} else ""
        )
    if set(parts) & {"pixels", "resized"}:
        return image
    return "the logit scale"


def check_canary(model: Clip, stated: Canary, where: str) -> None:
    """Compare a model on the CPU with the canary of its card.

    Raises:
        WeightsError: its outputs on the fixed inputs differ; the message names the step that changed.
    """
    found = take(model)
    parts = moved(stated, found)
    if parts:
        far = ", ".join(f"{part} by {distance(stated, found, part):.2g}" for part in parts)
        raise WeightsError(
            where,
            f"the canary moved ({far}): {reason(parts)}",
            f"at most {stated.tolerance:g} as in its card",
            "use the version of the package that wrote the card, or type: vlmrob canary NAME",
        )
