"""Contrastive pretraining of the tiny CLIP on rendered scenes and their captions.

The student's image tower and the text tower are trained together; a larger image tower is then trained
against that frozen text tower (locked text), so all checkpoints share one text tower. Scenes are rendered
on the fly, and none is shown twice. Bits repeat on one machine with one torch version and thread count.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.nn import functional

from robustbench_vlm.cards.recipe import Optim
from robustbench_vlm.data.tiny.scenes import stream
from robustbench_vlm.data.tiny.words import sentences
from robustbench_vlm.training.step import learning_rate

Progress = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, running mean of the loss)."""

TEXT = (
    "transformer.",
    "token_embedding.",
    "ln_final.",
    "positional_embedding",
    "text_projection",
    "logit_scale",
)
"""Prefixes of the parameters that make up an open_clip text tower."""

LARGEST_SCALE = math.log(100.0)


@dataclass(frozen=True)
class Pretraining:
    """Settings of a pretraining run: AdamW, linear warm-up, half a cosine to zero."""

    config: str = "vlmrob-tiny"
    steps: int = 4000
    batch_size: int = 256
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 200
    grad_clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Pretrained:
    """The trained parameters, all float32 on the CPU.

    Attributes:
        image: parameters of the image tower, named as in `open_clip.CLIP.visual`.
        text: parameters of the text tower and `logit_scale`, named as in `open_clip.CLIP`; the rows of
            `token_embedding.weight` are those of `token_ids` only.
        token_ids: (U,) int64, ascending: every token that occurs in captions.
    """

    image: dict[str, Tensor]
    text: dict[str, Tensor]
    token_ids: Tensor


@cache
def vocabulary() -> tuple[int, ...]:
    """Ids of every token that captions use, ascending, with padding, start and end tokens."""
    rows = open_clip.SimpleTokenizer(context_length=77)(list(sentences()))
    return tuple(sorted({int(token) for token in rows.unique()}))


def configuration(name: str) -> dict[str, Any]:
    """The open_clip model configuration called `name`."""
    text = resources.files("robustbench_vlm.models").joinpath("configs", f"{name}.json").read_text()
    config: dict[str, Any] = json.loads(text)
    return config


def _model(settings: Pretraining, text: dict[str, Tensor] | None) -> CLIP:
    """A new model whose token table has the rows of `vocabulary()` only."""
    config = configuration(settings.config)
    config["text_cfg"]["vocab_size"] = len(vocabulary())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = CLIP(**config)
    if text is not None:
        missing, unexpected = model.load_state_dict(text, strict=False)
        assert not unexpected
        assert all(name.startswith("visual.") for name in missing)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("visual."))
    return model


def _encode(model: CLIP, tokens: Tensor, length: Tensor) -> Tensor:
    """Unit embeddings (U, D) of compact token rows (U, T); `length` (U,) counts tokens, end token included.

    A causal tower does not attend to tokens after the end token, so only as many columns as the longest
    caption has are computed.
    """
    longest = int(length.max())
    x = model.token_embedding(tokens[:, :longest]) + model.positional_embedding[:longest]
    x = model.transformer(x, attn_mask=model.attn_mask[:longest, :longest])
    x = model.ln_final(x)[torch.arange(len(x)), length - 1] @ model.text_projection
    return functional.normalize(x, dim=-1)


def _batches(settings: Pretraining, context: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Batches: images (B, 3, H, W) in [0, 1], tokens and lengths of captions, each image's caption."""
    tokenizer = open_clip.SimpleTokenizer(context_length=context)
    compact = torch.zeros(max(vocabulary()) + 1, dtype=torch.long)
    compact[list(vocabulary())] = torch.arange(len(vocabulary()))
    known: dict[str, Tensor] = {}
    for step in range(settings.steps):
        pixels, captions = stream(f"{settings.seed}/pretrain/{settings.config}/{step}", settings.batch_size)
        distinct = list(dict.fromkeys(captions))
        new = [caption for caption in distinct if caption not in known]
        if new:
            known |= dict(zip(new, tokenizer(new), strict=True))
        rows = torch.stack([known[caption] for caption in distinct])
        row_of = {caption: row for row, caption in enumerate(distinct)}
        target = torch.tensor([row_of[caption] for caption in captions])
        images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255)
        yield images, compact[rows], (rows != 0).sum(1), target


def _loss(image: Tensor, text: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    """Symmetric contrastive loss; a caption that several images share is the positive of each of them.

    Args:
        image: (B, D) unit rows.
        text: (U, D) unit rows, distinct captions.
        scale: logit scale, a scalar.
        target: (B,) the caption of each image.
    """
    logits = scale * image @ text.T
    back = logits.T.log_softmax(-1)
    share = functional.one_hot(target, len(text)).T.float()
    reverse = -(share * back).sum() / len(image)
    return (functional.cross_entropy(logits, target) + reverse) / 2


def normalisation() -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, 3, 1, 1) of pixel normalisation: the default of open_clip."""
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)


def pretrain(
    settings: Pretraining, text: dict[str, Tensor] | None = None, progress: Progress | None = None
) -> Pretrained:
    """Train image and text tower together; with `text`, the image tower against that frozen text tower.

    Args:
        settings: architecture, length and learning rate.
        text: `Pretrained.text` of an earlier run with the same text configuration.
        progress: called after every step.
    """
    model = _model(settings, text)
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), eps=1e-8)
    mean, std = normalisation()
    average = 0.0
    schedule = Optim(
        lr=settings.lr, steps=settings.steps, warmup=settings.warmup, batch_size=settings.batch_size
    )
    for step, (images, tokens, length, target) in enumerate(_batches(settings, model.context_length)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule)
        embedded = functional.normalize(model.visual((images - mean) / std), dim=-1)
        with torch.set_grad_enabled(text is None):
            words = _encode(model, tokens, length)
        loss = _loss(embedded, words, model.logit_scale.exp(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, settings.grad_clip)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=LARGEST_SCALE)
        average += (loss.item() - average) * (0.02 if step else 1.0)
        if progress is not None:
            progress(step + 1, settings.steps, average)
    return _export(model)


def _export(model: CLIP) -> Pretrained:
    state = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    return Pretrained(
        image={n.removeprefix("visual."): v for n, v in state.items() if n.startswith("visual.")},
        text={n: v for n, v in state.items() if n.startswith(TEXT)},
        token_ids=torch.tensor(vocabulary()),
    )
