"""The record of a public checkpoint."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from robustbench_vlm.cards.card import Card as Card
from robustbench_vlm.store import file_name
from robustbench_vlm.threat import Norm


class ModelCard(Card):
    """A public checkpoint: where its weights are, and how they are read.

    Attributes:
        defense: how it was made robust; `none` if it was not.
        base: model whose architecture, preprocessing and (without one of its own) text tower it has.
        eps: radius of its training attack; empty if unknown or none.
        norm: norm of that radius.
        loader: how its weights are read: `open_clip`, by `source`; `weights`, the file `file`;
            `transformers`, a folder; `none`, they are not published.
        source: `hf-hub:ORG/NAME`, `ARCH:TAG`, or the address that the weights are downloaded from.
        file: name of the weights file.
        sha256: SHA-256 of that file, checked before it is read; empty for no check.
        licence: licence of the weights.
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

    @model_validator(mode="after")
    def _file_in_its_folder(self) -> ModelCard:
        if self.file and file_name(self.file) != self.file:  # it is looked for in the folder of the model
            raise ValueError(f"file must be the name of a file, without a folder (found {self.file!r:.60})")
        return self
