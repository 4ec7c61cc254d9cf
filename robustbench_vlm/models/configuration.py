"""Configurations of open_clip: read and checked, and what they contribute to the identity of a model.

A configuration in a local folder is untrusted: it may not name anything that would be downloaded or run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transformer import QuickGELU
from torch import nn

from robustbench_vlm import store
from robustbench_vlm.errors import InputError, WeightsError
from robustbench_vlm.store import fingerprint

FILE = "open_clip_config.json"
NOT_FUNCTION = {
    *("timm_model_pretrained", "hf_model_pretrained"),  # which weights to start from: the weights say more
    *("hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"),  # `tokenizer_identity`
}
SIZES = ("context_length", "vocab_size", "width", "heads", "layers")
"""Whole numbers of a text tower."""
TOKENIZER_SETTINGS = {"clean", "strip_sep_token", "additional_special_tokens"}
"""Others name files, draw at random, download, or allow a tokenizer to run code."""


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`model_cfg` and `preprocess_cfg` of a folder in the layout of open_clip.

    Raises:
        WeightsError: no folder, no configuration in it, or one that `require_local` refuses.
    """
    path = folder / FILE
    if not path.is_file():
        found = f"no {FILE}" if folder.is_dir() else "no such folder"
        raise WeightsError(f"local-dir:{folder}", found, f"a folder with {FILE} and weights, as open_clip's")
    try:
        table = store.read_json(path)
    except InputError as error:
        raise WeightsError(f"local-dir:{folder}", str(error)) from None
    parts = table if isinstance(table, dict) else {}
    config, preprocess = parts.get("model_cfg"), parts.get("preprocess_cfg") or {}
    if not isinstance(config, dict) or not isinstance(preprocess, dict):
        raise WeightsError(
            str(path), "no table model_cfg", "model_cfg and preprocess_cfg, as open_clip writes"
        )
    require_local(config, str(path))
    return config, preprocess


def require_local(config: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration that is no model's, or that names something to download or to run.

    Raises:
        WeightsError: the message names the key.
    """
    vision, text = config.get("vision_cfg"), config.get("text_cfg")
    if (
        not isinstance(vision, dict)
        or not isinstance(text, dict)
        or not isinstance(config.get("embed_dim"), int)
    ):
        found = "model_cfg without embed_dim, vision_cfg and text_cfg"
        raise WeightsError(where, found, "these three, as open_clip writes")
    sides = vision.get("image_size", 224)
    sides = sides if isinstance(sides, list | tuple) and len(sides) == 2 else [sides]
    given = [("embed_dim", config["embed_dim"]), *(("vision_cfg.image_size", side) for side in sides)]
    given += [(f"text_cfg.{key}", text[key]) for key in SIZES if key in text]
    for key, value in given:
        if type(value) is not int or value < 1:
            raise WeightsError(where, f"{key} is {value!r:.60}", "a whole number of at least 1")
    if text.get("hf_model_name"):
        found = f"text_cfg.hf_model_name is {text['hf_model_name']!r:.60}, which would be downloaded"
        raise WeightsError(where, found, "a text tower of open_clip", "name the model by ARCH:TAG or hf-hub:")
    timm = vision.get("timm_model_name")
    if timm is not None and (not isinstance(timm, str) or ":" in timm or "/" in timm):
        found = f"vision_cfg.timm_model_name is {timm!r:.60}, which names a file or a download"
        raise WeightsError(where, found, "the plain name of an architecture of timm")
    settings = text.get("tokenizer_kwargs") or {}
    if not isinstance(settings, dict) or settings.keys() - TOKENIZER_SETTINGS:
        found = f"text_cfg.tokenizer_kwargs is {settings!r:.60}"
        raise WeightsError(where, found, f"only {', '.join(sorted(TOKENIZER_SETTINGS))}")


def tokenizer(text: Mapping[str, Any], folders: tuple[Path, ...], where: str) -> Any:  # noqa: ANN401 - open_clip's
    """The tokenizer of a text tower; nothing is downloaded.

    Args:
        text: `text_cfg`; with `hf_tokenizer_name`, a tokenizer of transformers.
        folders: where the files of such a tokenizer may be, before the cache of huggingface_hub.
        where: of messages.

    Raises:
        WeightsError: its files are not on this machine; the message says what to put where.
    """
    length, settings = text.get("context_length", 77), dict(text.get("tokenizer_kwargs") or {})
    name = text.get("hf_tokenizer_name")
    if not name:
        return SimpleTokenizer(context_length=length, **settings)
    beside = [folder for folder in folders if (folder / "tokenizer_config.json").is_file()]
    source = str(beside[0]) if beside else str(name)
    try:
        return HFTokenizer(
            source,
            context_length=length,
            tokenizer_mode=text.get("tokenizer_mode"),
            local_files_only=True,
            trust_remote_code=False,
            **settings,
        )
    except ImportError as error:
        raise WeightsError(
            where, f"its tokenizer needs {error.name}", do=f"pip install {error.name}"
        ) from None
    except Exception as error:  # transformers raises errors of many classes
        files = "tokenizer.json and tokenizer_config.json"
        if beside:
            raise WeightsError(where, f"its tokenizer in {source} cannot be read", files) from error
        into = f" --local-dir {folders[0]}" if folders else ""
        do = f"hf download {name} tokenizer.json tokenizer_config.json special_tokens_map.json{into}"
        found = f"its tokenizer {name} is not on this machine"
        raise WeightsError(
            where, found, f"{files} {'in its folder' if into else 'in the cache'}", do
        ) from error


def image_facts(config: Mapping[str, Any], visual: nn.Module) -> dict[str, Any]:
    """What decides the function of an image tower beside its weights."""
    return {"config": _stated(config["vision_cfg"], CLIPVisionCfg), **_shared(config, visual)}


def text_facts(config: Mapping[str, Any], language: nn.Module, tokenizer: str) -> dict[str, Any]:
    """What decides the function of a text tower beside its weights; `tokenizer` is its identity."""
    facts = {"config": _stated(config["text_cfg"], CLIPTextCfg), **_shared(config, language)}
    for part in language.modules():
        other: Any = getattr(part, "config", None)
        if hasattr(other, "to_diff_dict"):  # a tower of transformers, which has a configuration of its own
            own = other.to_diff_dict()
            facts["transformers"] = {k: v for k, v in own.items() if not k.startswith(("_", "transformers_"))}
            break
    return {**facts, "tokenizer": tokenizer}


def _shared(config: Mapping[str, Any], tower: nn.Module) -> dict[str, Any]:
    quick = any(isinstance(part, QuickGELU) for part in tower.modules())
    return {"embed_dim": config["embed_dim"], "quick_gelu": quick}


def _stated(table: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The settings that differ from the defaults of open_clip, so that stating a default changes nothing."""
    usual = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
    plain = json.loads(json.dumps(dict(table)))
    size = plain.get("image_size")
    if isinstance(size, list) and len(set(size)) == 1:
        plain["image_size"] = size[0]
    return {k: v for k, v in plain.items() if k not in NOT_FUNCTION and (k not in usual or v != usual[k])}


@lru_cache(maxsize=8)
def tokenizer_identity(tokenizer: object) -> str:
    """The identity of a tokenizer of open_clip: its vocabulary and rules, from its content.

    Any other callable is known by the name of its class alone.
    """
    facts: dict[str, Any] = {"kind": type(tokenizer).__name__}
    for name in ("context_length", "strip_sep_token", "tokenizer_mode", "clean_fn", "reduction_fn"):
        value = getattr(tokenizer, name, None)
        facts[name] = getattr(value, "__name__", value)
    if isinstance(tokenizer, SimpleTokenizer):
        facts["vocabulary"] = fingerprint(tokenizer.encoder)
        facts["merges"] = fingerprint([" ".join(pair) for pair in tokenizer.bpe_ranks])
    elif isinstance(tokenizer, HFTokenizer):
        backend = getattr(tokenizer.tokenizer, "backend_tokenizer", None)
        whole = json.loads(backend.to_str()) if backend is not None else tokenizer.tokenizer.get_vocab()
        if backend is not None:
            whole |= {"truncation": None, "padding": None}  # set anew by every call
        facts["vocabulary"] = fingerprint(whole)
        special = tokenizer.tokenizer.special_tokens_map
        facts["special"] = {name: str(token) for name, token in special.items()}
    return fingerprint(facts)
