"""Weights of other programs -> `Clip`: weights files beside a base model, and folders of transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from robustbench_vlm import store
from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models import checkpoint, openclip, preprocess
from robustbench_vlm.models.clip import Clip
from robustbench_vlm.models.foreign import naming, sandbox
from robustbench_vlm.models.preprocess import Preprocess

FIRST_EOS, EOS = 2, 49407  # the end of text by either number of transformers is the largest token id


@dataclass(frozen=True)
class Foreign:
    """A model with weights that another program wrote.

    Attributes:
        model: the model.
        scheme: the naming scheme of the tensors.
        own_text: whether the file has a text tower, too.
        old: features of the file that only old programs write.
    """

    model: Clip
    scheme: str
    own_text: bool
    old: tuple[str, ...] = ()


require_file = sandbox.require_file


def state_of(path: Path, limits: Mapping[str, int] | None = None) -> sandbox.Unpickled:
    """The tensors of a weights file.

    Raises:
        WeightsError: not an ordinary file, damaged, refused.
    """
    if path.suffix == ".safetensors":
        sandbox.require_file(path)
        return sandbox.Unpickled(checkpoint.read_state(path), ())
    return sandbox.read(path, **(limits or {}))


def from_state(found: sandbox.Unpickled, base: Clip, where: str) -> Foreign:
    """The model of a weights file: `base` with its image tower, and its text tower if it has one.

    Args:
        found: the tensors of the file, by `state_of`.
        base: architecture, preprocessing and, if the file has none, text tower; changed in place.
        where: the file, for messages.

    Raises:
        WeightsError: of an unknown naming scheme, of another architecture, or not finite.
    """
    return _fill(base, found.state, where, found.old)


def may_be_whole(found: sandbox.Unpickled) -> bool:
    """Whether a file has a table of tokens, and so probably both towers."""
    return any(name.endswith("token_embedding.weight") for name in found.state)


def _fill(base: Clip, state: Mapping[str, Tensor], where: str, old: tuple[str, ...] = ()) -> Foreign:
    names = set(base.visual.state_dict()), set(base.language.state_dict())
    named = naming.read(state, *names, where)
    checkpoint.fill(base.visual, named.image, where)
    facts = base.facts
    if named.text:
        checkpoint.fill(base.language, named.text, where)
        facts = replace(facts, trained_tokens=None)
    scale = base.logit_scale if named.logit_scale is None else named.logit_scale
    bias = base.logit_bias if named.logit_bias is None else named.logit_bias
    if not math.isfinite(scale) or not math.isfinite(bias):
        raise WeightsError(where, f"logit_scale {scale:.4g} and logit_bias {bias:.4g}", "finite numbers")
    model = base.replaced(logit_scale=scale, logit_bias=bias, facts=facts)
    return Foreign(model.eval(), named.scheme, bool(named.text), old)


# Folders of transformers


def from_transformers(folder: Path) -> Foreign:
    """The CLIPModel of a folder, both towers its own.

    Raises:
        WeightsError: another kind of model, sizes of no open_clip architecture, weights that do not fit.
    """
    where = folder / "config.json"
    config = store.read_json(where)
    if not isinstance(config, dict) or config.get("model_type") != "clip":
        kind = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise WeightsError(str(where), f"a model of kind {kind!r}", "a CLIPModel ('clip')")
    arch, quick = _architecture(config, str(where))
    base = openclip.build(arch, quick_gelu=quick)
    base = base.replaced(preprocess=_preprocess(folder / "preprocessor_config.json", base.preprocess))
    state, old = _folder_state(folder)
    made = _fill(base, state, str(folder), old)
    if not made.own_text:
        raise WeightsError(str(folder), "no text tower in it", "a whole CLIPModel")
    return made


def _folder_state(folder: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        table = store.read_json(index)
        names = sorted(set(table["weight_map"].values())) if isinstance(table, dict) else []
        if not names or any(Path(str(name)).name != name for name in names):
            raise WeightsError(str(index), "no list of files beside it", "file names without folders")
        parts = [state_of(folder / name) for name in names]
    else:
        whole = folder / "model.safetensors"
        parts = [state_of(whole if whole.exists() else folder / "pytorch_model.bin")]
    state = {name: value for part in parts for name, value in part.state.items()}
    return state, tuple(sorted({old for part in parts for old in part.old}))


def _architecture(config: dict[str, Any], where: str) -> tuple[str, bool]:
    """The shortest open_clip name with the sizes of a CLIPConfig, and whether its activation is QuickGELU."""
    image, text = ({**_DEFAULTS, **config.get(f"{part}_config", {})} for part in ("vision", "text"))
    stated = {image.get("hidden_act", "quick_gelu"), text.get("hidden_act", "quick_gelu")}
    acts = sorted(map(str, stated))
    if len(acts) != 1 or acts[0] not in ("quick_gelu", "gelu"):
        raise WeightsError(where, f"activation {' and '.join(acts)}", "gelu or quick_gelu, in both towers")
    if image["layer_norm_eps"] != 1e-5 or text["layer_norm_eps"] != 1e-5:
        raise WeightsError(where, "layer_norm_eps is not 1e-5", "that of open_clip")
    if text.get("eos_token_id", EOS) not in (FIRST_EOS, EOS):
        raise WeightsError(
            where, f"eos_token_id is {text['eos_token_id']}", f"{EOS}, that of CLIP's tokenizer"
        )
    wanted = {
        "embed": config.get("projection_dim", 512),
        **{k: image.get(k, d) for k, d in _IMAGE.items()},
        **{f"text_{k}": text.get(k, d) for k, d in _TEXT.items()},
    }
    fitting = [name for name in openclip.architectures() if _sizes(name) == wanted]
    if not fitting:
        shown = json.dumps(wanted, sort_keys=True)
        raise WeightsError(where, f"no open_clip architecture has these sizes: {shown}")
    return min(fitting, key=lambda name: ("quickgelu" in name, len(name), name)), acts == ["quick_gelu"]


_DEFAULTS = {"layer_norm_eps": 1e-5}
_IMAGE = {  # the fields of a CLIPConfig and their defaults, which its JSON leaves out
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
_TEXT = {
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
}


def _sizes(arch: str) -> dict[str, Any]:
    """The sizes of an open_clip architecture as a CLIPConfig calls them; empty if of another kind."""
    config = openclip.config(arch) or {}
    image, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    plain = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"}
    if set(image) - plain or set(text) - {
        "context_length",
        "vocab_size",
        "width",
        "heads",
        "layers",
        "mlp_ratio",
    }:
        return {}
    if not isinstance(image.get("layers"), int) or "width" not in text:
        return {}
    return {
        "embed": config["embed_dim"],
        "image_size": image["image_size"],
        "patch_size": image["patch_size"],
        "hidden_size": image["width"],
        "num_hidden_layers": image["layers"],
        "num_attention_heads": image["width"] // image.get("head_width", 64),
        "intermediate_size": int(image["width"] * image.get("mlp_ratio", 4.0)),
        "text_max_position_embeddings": text["context_length"],
        "text_vocab_size": text["vocab_size"],
        "text_hidden_size": text["width"],
        "text_num_hidden_layers": text["layers"],
        "text_num_attention_heads": text["heads"],
        "text_intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
    }


def _preprocess(path: Path, own: Preprocess) -> Preprocess:
    """The preprocessing that a folder states; `own` where it states none, as LEAF's folders do."""
    if not path.exists():
        return own
    table = store.read_json(path)
    if not isinstance(table, dict):
        raise WeightsError(str(path), "not a table", "a preprocessor of transformers")
    return preprocess.of_transformers(table, own, str(path))
