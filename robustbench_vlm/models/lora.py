"""Low-rank adapters on an image tower, through peft; merged back before anything is saved or evaluated.

peft adapts a fused `nn.MultiheadAttention` by adding the adapter's product to its weights around each
forward. Version 0.21 adds that of the output projection twice (huggingface/peft#3774), so its effect is
doubled and its gradient is not. Therefore each fused attention is first written as two plain linear layers,
`qkv` and `proj`, as in the released code of MMT-ARD. peft adapts linear layers exactly, with dropout, and
leaves the frozen weights untouched.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the customary name

from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models.clip import Clip


class Attention(nn.Module):
    """Self-attention with the weights of an `nn.MultiheadAttention`, as two linear layers.

    Attributes:
        qkv: D -> 3 D, queries, keys and values.
        proj: D -> D, after the heads are joined.
    """

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        width = fused.embed_dim
        self.heads, self.batch_first = fused.num_heads, fused.batch_first
        self.qkv, self.proj = nn.Linear(1, 1, device="meta"), nn.Linear(1, 1, device="meta")  # filled below
        for linear, weight, bias in (
            (self.qkv, fused.in_proj_weight, fused.in_proj_bias),
            (self.proj, fused.out_proj.weight, fused.out_proj.bias),
        ):
            linear.in_features, linear.out_features = width, weight.shape[0]
            linear.weight, linear.bias = weight, bias

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Output of the fused module for equal `query`, `key`, `value` (B, L, D); (L, B, D) by its flag."""
        del key, value, need_weights
        x = query if self.batch_first else query.transpose(0, 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        joined = F.scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2).flatten(2)
        result: Tensor = self.proj(joined)
        return (result if self.batch_first else result.transpose(0, 1)), None

    def fused(self) -> nn.MultiheadAttention:
        """An `nn.MultiheadAttention` with these weights."""
        width, biased = self.qkv.in_features, self.qkv.bias is not None
        whole = nn.MultiheadAttention(
            width, self.heads, bias=biased, batch_first=self.batch_first, device="meta"
        )
        for owner, prefix, linear in ((whole, "in_proj_", self.qkv), (whole.out_proj, "", self.proj)):
            setattr(owner, f"{prefix}weight", linear.weight)
            setattr(owner, f"{prefix}bias", linear.bias)
        return whole.train(self.training)


@dataclass(frozen=True)
class Adapters:
    """Adapters inside the image tower of one `Clip`.

    Attributes:
        tuner: peft's wrapper of the image tower.
    """

    tuner: Any

    def merged(self, model: Clip) -> Clip:
        """`model` with a copy of its image tower, of the plain form, that the adapters are added to."""
        visual: nn.Module = LoraModel.merge_and_unload(copy.deepcopy(self.tuner))
        _replace(visual, {n: m.fused() for n, m in visual.named_modules() if isinstance(m, Attention)})
        return model.replaced(visual=visual.requires_grad_(False))


def attach(model: Clip, r: int, alpha: int, targets: tuple[str, ...], dropout: float = 0.0) -> Adapters:
    """Add rank-`r` adapters with scale alpha / r to every module of the image tower named in `targets`.

    Only the adapters require gradients afterwards. They are initialised from a fixed seed, so a run is a
    function of its recipe.

    Args:
        model: changed in place, its image tower only.
        r: rank.
        alpha: scale times r.
        targets: last parts of module names: an attention (`attn`: both its projections) or a linear layer.
        dropout: share of an adapter's inputs that are zeroed while the tower is in train mode.

    Raises:
        WeightsError: no module of such a name, one of another kind, or one that the tower never runs.
    """
    named = {n: m for n, m in model.visual.named_modules() if n.split(".")[-1] in targets}
    where, arch = f"lora.targets = {list(targets)}", model.facts.arch
    advice = "leave [lora] out to train the whole tower"
    if not named:
        found = f"the image tower of {arch} has no such module"
        raise WeightsError(where, found, "names of attention or linear modules", advice)
    for name, module in named.items():
        if not isinstance(module, nn.MultiheadAttention | nn.Linear):
            found = f"{name} of {arch} is a {type(module).__name__}"
            raise WeightsError(where, found, "names of attention or linear modules", advice)
    attention = {n: Attention(m) for n, m in named.items() if isinstance(m, nn.MultiheadAttention)}
    wanted = [n for n in named if n not in attention]
    wanted += [f"{n}.{part}" for n in attention for part in ("qkv", "proj")]
    _replace(model.visual, attention)
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, bias="none", target_modules=wanted)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        tuner = LoraModel(model.visual, config, "default")
    model.visual.train(model.visual.training)  # the new modules too
    _require_used(model, where, advice)
    return Adapters(tuner)


def _replace(root: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        setattr(root.get_submodule(parent), last, module)


def _require_used(model: Clip, where: str, advice: str) -> None:
    """Refuse adapters that no gradient reaches.

    The attention pool of a ResNet reads the weights of its linear layers and never runs them.
    """
    trained = {n: p for n, p in model.visual.named_parameters() if p.requires_grad}
    image = torch.zeros(1, 3, model.image_size, model.image_size, device=model.device)
    with torch.enable_grad():
        total = model(image).sum()
    reached: tuple[Tensor | None, ...] = (None,) * len(trained)
    if total.requires_grad:
        reached = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    for name, gradient in zip(trained, reached, strict=True):
        if gradient is None:
            found = f"{name.split('.lora_')[0]} is never run as a layer by {model.facts.arch}"
            raise WeightsError(where, found, "modules that the tower runs", advice)
