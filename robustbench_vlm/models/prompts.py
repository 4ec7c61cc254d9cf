"""Learned prompt tokens in both towers of a frozen model: deep prompts, with other tokens for every layer.

In the image tower the prompts stand behind the patches. In the text tower they stand between the start token
and the sentence, so any sentence can be used with them. Layer 1 gets its prompts as additional tokens; in the
next layers, up to `depth`, that layer's prompts replace the outputs at those positions. Prompts are
parameters of the layers that use them, so they are part of a tower's state and of its fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the customary name

from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models.clip import Clip, PromptSizes

SPREAD = 0.02  # deviation of the noise that prompts start from
NAME = "prompt"


def attach(model: Clip, sizes: PromptSizes, init: str = "") -> Clip:
    """The model with learned prompts inside its towers; only the prompts require gradients.

    The towers of `model` are changed in place, so use the returned model and forget `model`. Prompts are
    initialised from a fixed seed, so a run is a function of its recipe.

    Args:
        model: a plain ViT with a class token, and a text tower that reads its end token.
        sizes: tokens a layer of each tower, and how many layers have them.
        init: words whose embeddings the first text tokens start from.

    Raises:
        WeightsError: towers of another kind, or a model that has prompts already.
    """
    where, arch = "prompts", model.facts.arch
    image, text, depth = sizes.image, sizes.text, sizes.depth
    visual: Any = model.visual
    net: Any = getattr(model.language, "net", None)
    if model.facts.prompts is not None:
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
    tokenize = _attach_text(model, sizes, init, noise) if text else model.tokenize
    return model.replaced(tokenize=tokenize, facts=replace(model.facts, prompts=sizes))


def _attach_text(
    model: Clip, sizes: PromptSizes, init: str, noise: torch.Generator
) -> Callable[[list[str]], Tensor]:
    """Add the prompts of the text tower in place; returns a tokenizer that leaves positions free for them."""
    text, depth = sizes.text, sizes.depth
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
    return partial(_shifted, model.tokenize, text)


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


def _shifted(tokenize: Callable[[list[str]], Tensor], free: int, sentences: list[str]) -> Tensor:
    """Token ids (N, L) with `free` zeros after the start token, where the prompts are put in.

    A zero is below the id of every end token, so it does not change which position is read out.
    """
    tokens = tokenize(sentences)
    length = tokens.shape[1] - free
    cut = (tokens[:, length:] != 0).any(1).nonzero()
    if len(cut):
        found = f"{sentences[int(cut[0])]!r} leaves no space for {free} prompt tokens"
        raise WeightsError("prompts", found, f"sentences of at most {length} tokens")
    return torch.cat([tokens[:, :1], tokens.new_zeros(len(tokens), free), tokens[:, 1:length]], 1)


def bank(model: Clip, tokens: Tensor) -> Tensor:
    """Token ids (C, L) -> unit text embeddings (C, D), with gradient to the prompts where that is enabled."""
    return F.normalize(model.language(tokens).float(), dim=-1)


def state(module: nn.Module) -> dict[str, Tensor]:
    """The prompts of one tower, by parameter name."""
    return {name: p for name, p in module.named_parameters() if name.rpartition(".")[2] == NAME}
