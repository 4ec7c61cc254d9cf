"""Class names and templates -> text bank -> a classifier of pixels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the customary name

from robustbench_vlm.models.clip import Clip, state_sha256
from robustbench_vlm.store import fingerprint, write


def render(names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """The sentences of each class: every template with `{c}` replaced by the name."""
    return [[template.replace("{c}", name) for template in templates] for name in names]


def untrained(model: Clip, names: Sequence[str], template: str) -> list[str]:
    """Class names whose sentence has a word that the text tower never met in training."""
    sentences = [template.replace("{c}", name) for name in names]
    found = set(model.untrained_words(sentences))
    return [name for name, sentence in zip(names, sentences, strict=True) if sentence in found]


def cache_folder() -> Path:
    """Where text banks are kept between runs: `$VLMROB_CACHE`, else `$XDG_CACHE_HOME/vlmrob`."""
    if "VLMROB_CACHE" in os.environ:
        return Path(os.environ["VLMROB_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vlmrob"


def text_bank(model: Clip, sentences: Sequence[Sequence[str]]) -> Tensor:
    """One unit row per class: normalise each sentence's embedding, average, normalise again.

    The ensemble rule of CLIP zero-shot classification. The bank is kept on disk under the hash of the
    text tower and the sentences, since encoding 80,000 ImageNet prompts costs as much as an attack.

    Returns:
        (C, D) float32 on the model's device.
    """
    key = fingerprint({"text": state_sha256(model.language), "sentences": [list(s) for s in sentences]})
    path = cache_folder() / "text" / f"{key}.safetensors"
    try:
        bank: Tensor = load_file(path)["bank"]
    except (OSError, SafetensorError, KeyError):  # not there yet, or not whole: encode and write it
        flat = [sentence for group in sentences for sentence in group]
        embeddings = model.text(flat).cpu()
        sizes = [len(group) for group in sentences]
        bank = torch.stack([F.normalize(part.mean(0), dim=0) for part in torch.split(embeddings, sizes)])
        with suppress(OSError):  # a folder that cannot be written costs time, never the run
            write(path, save({"bank": bank.contiguous()}))
    return bank.to(model.mean.device)


class ZeroShot(nn.Module):
    """Pixels (B, 3, H, W) in [0, 1] -> logits s * cos(image, class) of shape (B, C); frozen, eval mode.

    With `bf16` the image tower runs under autocast; the cosines stay in fp32, since logits of about 25 lie
    0.125 apart in bf16, more than many margins.
    """

    def __init__(self, model: Clip, bank: Tensor, *, bf16: bool = False) -> None:
        super().__init__()
        self.bf16 = bf16
        self.model = model.eval().requires_grad_(False)
        self.register_buffer("bank", bank)
        self.bank: Tensor
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Cosine logits; ties and order follow the class list."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            embeddings = self.model(images)
        unit = F.normalize(embeddings.float(), dim=-1)
        logits: Tensor = self.model.logit_scale * unit @ self.bank.T
        return logits
