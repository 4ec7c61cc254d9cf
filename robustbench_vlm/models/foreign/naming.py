"""Names that other programs give to the tensors of a CLIP model -> the names of open_clip.

Every naming scheme is a function of the names alone. A file is read under the first scheme whose names are
exactly those of the architecture, with or without prefixes that all names share. If there is none, the error
names the nearest scheme, and which tensors are missing or left over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_vlm.errors import WeightsError

State = Mapping[str, Tensor]
TECOA = "vision_encoder_state_dict"
CONTAINERS = ("state_dict", "model_state_dict", "model")
SIZES = {
    "input_resolution",
    "context_length",
    "vocab_size",
}  # numbers that the OpenAI package stores as tensors

# The released MMT-ARD code has rank 16 and alpha 16, and writes neither into its files.
LORA_RANK = LORA_ALPHA = 16

# transformers' CLIPModel -> open_clip; what follows a prefix stays as it is
HF_TOWERS = (("vision_model.", "visual."), ("text_model.", ""))
HF_NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
}
HF_PREFIXES = {
    "pre_layrnorm.": "ln_pre.",  # spelled so in transformers
    "post_layernorm.": "ln_post.",
    "final_layer_norm.": "ln_final.",
}
HF_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
HF_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
HF_PROJECTIONS = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}


@dataclass(frozen=True)
class Named:
    """A state under open_clip's names.

    Attributes:
        scheme: how the file named it.
        image: tensors of the image tower.
        text: tensors of the text tower under the names of `openclip.Language`; empty if the file has none.
        logit_scale: s of the cosine logits, if the file has one.
        logit_bias: b that is added to them, if the file has one.
    """

    scheme: str
    image: dict[str, Tensor]
    text: dict[str, Tensor]
    logit_scale: float | None = None
    logit_bias: float | None = None


def tower(state: State) -> Named | None:
    """Names of an image tower alone: RobustVLM, Sim-CLIP, the OpenAI package's `visual`."""
    return Named("image tower", dict(state), {})


def whole(state: State) -> Named | None:
    """Names of a whole model: open_clip and the OpenAI package, whose image towers are called alike."""
    if len({name.startswith("visual.") for name in state}) != 2:
        return None  # no image tower, or nothing else: a tower below one prefix
    return _split("whole model", {k: v for k, v in state.items() if k not in SIZES})


def _split(scheme: str, state: State) -> Named:
    image = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    others = ("visual.", "text_decoder.", "logit_scale", "logit_bias")  # CoCa's decoder classifies nothing
    rest = {f"net.{k}": v for k, v in state.items() if not k.startswith(others)}
    scale, bias = (state.get(name) for name in ("logit_scale", "logit_bias"))
    return Named(
        scheme,
        image,
        rest,
        float(scale.float().exp())
        if scale is not None and scale.numel() == 1
        else None,  # as open_clip: fp32
        float(bias.float()) if bias is not None and bias.numel() == 1 else None,
    )


def lora(state: State) -> Named | None:
    """MMT-ARD's released students: linears `qkv` and `proj` for each attention, with adapters; merged here.

    W + (alpha / rank) B A for the weight of each adapted linear.
    """
    if not any(".attn.qkv." in name for name in state):
        return None
    image: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        merged = value
        stem = name.replace(".base_layer.", ".").removesuffix(".weight")
        down = [v for k, v in state.items() if k.startswith(f"{stem}.lora_A.")]
        up = [v for k, v in state.items() if k.startswith(f"{stem}.lora_B.")]
        if name.endswith(".weight") and (down or up):
            if len(down) != 1 or len(up) != 1 or down[0].shape[0] != LORA_RANK:
                return Named(
                    "MMT-ARD adapters", dict(state), {}
                )  # another rank or number: fits no architecture
            merged = value + (up[0] @ down[0]) * (LORA_ALPHA / LORA_RANK)
        plain = name.replace(".base_layer.", ".")
        plain = re.sub(r"\.attn\.qkv\.(weight|bias)$", r".attn.in_proj_\1", plain)
        image[re.sub(r"\.attn\.proj\.(weight|bias)$", r".attn.out_proj.\1", plain)] = merged
    return Named("MMT-ARD adapters", image, {})


def transformers(state: State) -> Named | None:
    """Names of transformers' CLIPModel (LEAF), both towers or its image tower with the projection."""
    if not any(name.startswith(("vision_model.", "text_model.")) for name in state):
        return None
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in HF_PROJECTIONS:
            found[HF_PROJECTIONS[name]] = value.T.contiguous()
        elif not name.endswith("embeddings.position_ids"):  # a constant that old versions stored
            found |= _of_transformers(name, value, state)
    return _split("transformers CLIPModel", found)


def _of_transformers(name: str, value: Tensor, state: State) -> dict[str, Tensor]:
    """One tensor under its new name; the three projections of an attention are joined into one tensor."""
    for theirs, ours in HF_TOWERS:
        if not name.startswith(theirs):
            continue
        inner = name.removeprefix(theirs)
        if inner in HF_NAMES:
            return {ours + HF_NAMES[inner]: value}
        for prefix, new in HF_PREFIXES.items():
            if inner.startswith(prefix):
                return {ours + new + inner.removeprefix(prefix): value}
        if not (layer := HF_LAYER.fullmatch(inner)):
            break
        block, part, kind = layer.groups()
        prefix = f"{ours}transformer.resblocks.{block}."
        if part in HF_BLOCK:
            return {f"{prefix}{HF_BLOCK[part]}.{kind}": value}
        if part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            stem = f"{theirs}encoder.layers.{block}.self_attn"
            parts = [state.get(f"{stem}.{p}_proj.{kind}") for p in "qkv"]
            if all(p is not None for p in parts):
                return {f"{prefix}attn.in_proj_{kind}": torch.cat([p for p in parts if p is not None])}
    return {name: value}


SCHEMES: tuple[Callable[[State], Named | None], ...] = (whole, transformers, lora, tower)
KNOWN = (
    "image tower, whole model, transformers CLIPModel, MMT-ARD adapters, "
    f"any of them below {TECOA} (the TeCoA family) or {', '.join(CONTAINERS)}"
)


def read(state: State, image: set[str], text: set[str], where: str) -> Named:
    """The state under open_clip's names, for an architecture with the names `image` and `text`.

    Raises:
        WeightsError: no scheme fits exactly; or a learned visual prompt belongs to the weights.
    """
    best: tuple[int, Named, list[str], list[str]] | None = None
    for level in _levels(_unpacked(state, where)):
        for scheme in SCHEMES:
            named = scheme(level)
            if named is None:
                continue
            missing = sorted(image - named.image.keys()) + (
                sorted(text - named.text.keys()) if named.text else []
            )
            extra = sorted(named.image.keys() - image) + sorted(named.text.keys() - text)
            if not missing and not extra:
                return named
            if best is None or len(missing) + len(extra) < best[0]:
                best = (len(missing) + len(extra), named, missing, extra)
    if best is None or not set(best[1].image) & image:
        shown = ", ".join(repr(name) for name in list(state)[:3])
        raise WeightsError(where, f"tensors of no known naming scheme ({shown} ...)", KNOWN)
    _, named, missing, extra = best
    parts = [
        f"{len(names)} {word} (first {names[0]!r})"
        for names, word in ((missing, "missing"), (extra, "left over"))
        if names
    ]
    raise WeightsError(
        where,
        f"read as {named.scheme}: tensors {', '.join(parts)}",
        f"the architecture of --arch; schemes: {KNOWN}",
    )


def _unpacked(state: State, where: str) -> State:
    """The weights inside everything that a training script saved."""
    for box in (TECOA, *CONTAINERS):
        inside = {k.removeprefix(f"{box}."): v for k, v in state.items() if k.startswith(f"{box}.")}
        if not inside:
            continue
        outside = [k for k, v in state.items() if not k.startswith(f"{box}.") and v.numel()]
        outside = [k for k in outside if not k.startswith(("optimizer", "scheduler", "epoch", "best_acc"))]
        if outside and (box == TECOA or len(inside) < len(state)):
            found = f"{outside[0]!r} stands beside {box}: a learned prompt or another part of the model"
            raise WeightsError(where, found, "an image tower that is used without it")
        return inside
    return state


def _levels(state: State) -> Iterator[State]:
    """The state, then again without the first part of its names, as long as all names share that part."""
    while state:
        yield state
        first = {name.partition(".")[0] for name in state}
        if len(first) != 1 or not all("." in name for name in state):
            return
        state = {name.partition(".")[2]: value for name, value in state.items()}
