"""Facts written beside an outcome: about the model, and when, where and with what it was measured."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from typing import Any

import torch

from robustbench_vlm.models.zoo import Loaded
from robustbench_vlm.version import __version__


def of_model(loaded: Loaded) -> dict[str, Any]:
    """Facts about a model that tables print."""
    card = loaded.card
    inner = card.recipe.get("inner") or {}
    return {
        "id": card.name,
        "arch": card.arch,
        "defense": card.defense,
        "parameters": card.parameters,
        "train_eps": inner.get("eps", ""),
        "train_norm": inner.get("norm", ""),
        "trained_on": card.trained_on,
    }


def of_run(device: torch.device, seconds: float, batch_size: int | None) -> dict[str, Any]:
    """When, where and with what a cell was measured; never part of a fingerprint."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "device": name,
        "threads": torch.get_num_threads(),
        "batch_size": "auto" if batch_size is None else batch_size,
        "torch": torch.__version__,
        "vlmrob": __version__,
        "python": platform.python_version(),
    }
