"""Public checkpoints by name: where their weights are expected, and how to download missing ones."""

from __future__ import annotations

import os
from pathlib import Path

from robustbench_vlm import store
from robustbench_vlm.cards.model import ModelCard
from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models.model_ids import HUB
from robustbench_vlm.store import cache_folder


def folder(card: ModelCard) -> Path:
    """Folder of the weights of a public checkpoint, below `$VLMROB_MODELS` or `models` of the cache."""
    root = os.environ.get("VLMROB_MODELS")
    return (Path(root) if root else cache_folder() / "models") / store.file_name(card.name)


def here(card: ModelCard) -> bool:
    """Whether its weights are in its folder."""
    path = folder(card)
    if card.loader == "weights":
        return (path / card.file).exists()
    name = "config.json" if card.loader == "transformers" else "open_clip_config.json"
    return (path / "card.json").exists() or (path / name).exists()


def require(card: ModelCard) -> Path:
    """The folder of a checkpoint, whose weights are there and have the hash of its card.

    Raises:
        WeightsError: the weights are missing (the message says what to download), were never published, or
        have
            another hash.
    """
    if card.loader == "none":
        raise WeightsError(f"model {card.name}", f"its weights are not published ({card.source})")
    if not here(card):
        raise WeightsError(f"model {card.name}", "its weights are not on this machine", do=fetch(card))
    path = folder(card) / card.file
    if card.sha256 and (found := store.file_sha256(path)) != card.sha256:
        raise WeightsError(
            str(path), f"SHA-256 {found[:12]}", f"{card.sha256[:12]} as in its card", fetch(card)
        )
    return folder(card)


def fetch(card: ModelCard) -> str:
    """What to type to download the weights to their folder."""
    path = folder(card)
    if card.source.startswith(HUB):
        return f"hf download {card.source.removeprefix(HUB)} --local-dir {path}"
    return f"download {card.source} to {path / card.file}"
