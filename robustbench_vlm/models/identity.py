"""The identity of a model: the function that it computes, and nothing of where it lies or what it is called.

A fingerprint is taken of the weights of both towers, of every setting of their configuration, of the
tokenizer, the preprocessing, the learned prompts, the logit scale and the logit bias. Results, ledgers, text
banks, stored teacher outputs and parents are all named by it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from robustbench_vlm.store import fingerprint

VERSION = 2
"""Version 1 had the name of the architecture where this has its configuration and tokenizer."""


def of_model(facts: Mapping[str, Any]) -> str:
    """The fingerprint of a whole model, from everything that decides its logits."""
    return fingerprint({"version": VERSION, **facts})


def of_text(weights: str, facts: Mapping[str, Any], prompts: Mapping[str, int]) -> str:
    """The fingerprint of a text encoder: SHA-256 of its weights, its facts, and the sizes of its prompts."""
    learned = {name: prompts[name] for name in ("text", "depth") if prompts.get("text")}
    return fingerprint({"version": VERSION, "weights": weights, "prompts": learned, **facts})


def state_sha256(module: nn.Module) -> str:
    """SHA-256 over the sorted names, types, shapes and bytes of a module's state."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.reshape(-1)  # counters of batch norms have no dimension, and could not be viewed
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
