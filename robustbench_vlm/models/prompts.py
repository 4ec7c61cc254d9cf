"""Learned prompt tokens in both towers of a frozen model, as deep prompts: a set of its own for every layer.

In the image tower they stand behind the patches, in the text tower between the start token and the sentence,
so any sentence can be used with them. The first layer's are put in, those of the next layers up to `depth`
replace what the layer before made of them. They are parameters of the layers that use them, so a tower's
state holds them, and two models differ in fingerprint as soon as their prompts do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the customary name

from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models.clip import Clip

SPREAD = 0.02  # deviation of the noise that prompts start from
NAME = "prompt"


def attach(model: Clip, image: int, text: int, depth: int, init: str = "") -> None:
    """Add prompts to `model`, in place; they alone require gradients afterwards.

    Initialised from a fixed seed, so a run is a function of its recipe.

    Args:
        model: a plain ViT with a class token, and a text tower that reads its end token.
        image: tokens of the image tower; 0 for none.
        text: tokens of the text tower; 0 for none.
        depth: layers with tokens of their own.
        init: words whose embeddings the first text tokens start from.

    Raises:
        WeightsError: towers of another kind, or prompts there already.
    """
    where, arch = "prompts", model.facts["arch"]
    visual: Any = model.visual
    net: Any = getattr(model.language, "net", None)
    if "prompts" in model.facts:
        raise WeightsError(where, f"this {arch} has prompts already", "a model without")
    if image and (getattr(visual, "pool_type", None) != "tok" or not visual.transformer.batch_first):
        raise WeightsError(where, f"{arch} has no class token beside its patches", "a vision transformer")
    if text and (getattr(net, "text_pool_type", None) != "argmax" or not net.transformer.batch_first):
        found = f"the text tower of {arch} does not read its end token"
        raise WeightsError(where, found, "a CLIP text tower")
    model.visual.requires_grad_(False)
    model.language.requires_grad_(False)
    noise = torch.Generator().manual_seed(0)
    if image:
        for index, block in enumerate(visual.transformer.resblocks[:depth]):
            _own(block, image, visual.ln_post.weight, noise)
            block.register_forward_pre_hook(_append if index == 0 else _behind)
    if text:
        _attach_text(model, text, depth, init, noise)
    model.facts["prompts"] = {"image": image, "text": text, "depth": depth}


def _attach_text(model: Clip, text: int, depth: int, init: str, noise: torch.Generator) -> None:
    net: Any = model.language.net
    width = net.ln_final.weight
    _own(net.token_embedding, text, width, noise)
    words = [int(t) for t in model.tokenize([init])[0] if t]  # start, words, end
    with torch.no_grad():
        for row, token in enumerate(words[1:-1][:text]):
            net.token_embedding.prompt[row] = net.token_embedding.weight[token]
    net.token_embedding.register_forward_hook(_embedded)
    for block in net.transformer.resblocks[1:depth]:
        _own(block, text, width, noise)
        block.register_forward_pre_hook(_within)
    model.tokenize = partial(_shifted, model.tokenize, text)


def _own(layer: nn.Module, tokens: int, like: Tensor, noise: torch.Generator) -> None:
    start = SPREAD * torch.randn(tokens, len(like), generator=noise)
    layer.register_parameter(NAME, nn.Parameter(start.to(like)))


def _rows(layer: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - a layer with `prompt`
    rows: Tensor = layer.prompt.to(x.dtype).expand(len(x), -1, -1)
    return rows


def _append(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (torch.cat([args[0], _rows(layer, args[0])], 1), *args[1:])


def _behind(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    rows = _rows(layer, args[0])
    return (torch.cat([args[0][:, : -rows.shape[1]], rows], 1), *args[1:])


def _within(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (_embedded(layer, (), args[0]), *args[1:])


def _embedded(layer: nn.Module, args: tuple[Any, ...], x: Tensor) -> Tensor:
    del args
    rows = _rows(layer, x)
    return torch.cat([x[:, :1], rows, x[:, 1 + rows.shape[1] :]], 1)


def _shifted(tokenize: Callable[[list[str]], Tensor], places: int, sentences: list[str]) -> Tensor:
    """Token ids (N, L) with `places` empty ones after the start token; 0 is below every end token."""
    tokens = tokenize(sentences)
    kept = tokens.shape[1] - places
    cut = (tokens[:, kept:] != 0).any(1).nonzero()
    if len(cut):
        found = f"{sentences[int(cut[0])]!r} leaves no room for {places} prompt tokens"
        raise WeightsError("prompts", found, f"sentences of at most {kept} tokens")
    return torch.cat([tokens[:, :1], tokens.new_zeros(len(tokens), places), tokens[:, 1:kept]], 1)


def bank(model: Clip, tokens: Tensor) -> Tensor:
    """One unit row per sentence, (C, D), of token ids (C, L); with gradient to the prompts where enabled."""
    return F.normalize(model.language(tokens).float(), dim=-1)


def state(module: nn.Module) -> dict[str, Tensor]:
    """The prompts of one tower by their names in it."""
    return {name: p for name, p in module.named_parameters() if name.rpartition(".")[2] == NAME}
