"""The record of a public checkpoint."""

from __future__ import annotations

from typing import Literal

from robustbench_vlm.cards.card import Card as Card
from robustbench_vlm.threat import Norm


class ModelCard(Card):
    """A public checkpoint: where its weights are, and how they are read.

    Attributes:
        base: model whose architecture, preprocessing and (without one of its own) text tower it has.
        loader: `open_clip`, by source; `weights`, a file; `transformers`, a folder; `none`, not published.
        file: name of the weights file.
        trained_on: datasets seen; with `"unknown"` when parents saw more than is listed.
    """

    name: str
    title: str
    defense: str
    base: str
    eps: str = ""
    norm: Norm = "linf"
    loader: Literal["open_clip", "weights", "transformers", "none"]
    source: str
    file: str = ""
    sha256: str = ""
    licence: str
    trained_on: tuple[str, ...]
    notes: tuple[str, ...] = ()
