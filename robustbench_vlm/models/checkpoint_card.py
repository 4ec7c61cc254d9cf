"""The record `card.json` of a checkpoint folder, and its reader.

A card is text: nothing that it names is imported, run or downloaded. `defense` may name `module:Name`, the
class that trained the model, which is shown and never loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from robustbench_vlm import store
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.protocol import Interpolation, ResizeMode
from robustbench_vlm.errors import WeightsError

SCHEMA = "vlmrob-checkpoint/2"
EARLIER = "vlmrob-checkpoint/1"
"""Version 1: `sha256` had the name of the architecture, and not its configuration and tokenizer."""


# Of entries of unit embeddings; of norms and logits relative to their size. Machines, thread counts and
# libraries differ by about 1e-6 in fp32, and weights jittered by 1e-5 of their size move a part by 1e-4 at
# most; the smallest change that the tests make, a std 3 % off, moves one by 6e-4 and others by 2e-3.
CANARY_TOLERANCE = 3e-4


class PreprocessFacts(BaseModel):
    """`Preprocess` as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    antialias: bool
    interpolation: Interpolation = "bicubic"
    resize_mode: ResizeMode = "shortest"


class Parent(BaseModel):
    """A model that this model was made from: its start, or a teacher."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    role: str
    model: str
    sha256: str
    trained_on: tuple[str, ...] | None


class PromptFacts(BaseModel):
    """`models.prompts` as JSON: how many tokens in which tower, and in how many layers."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    image: int
    text: int
    depth: int


class Canary(BaseModel):
    """Outputs of a model on the fixed inputs of `models.canary`.

    Every row is the norm of an embedding, then the first entries of its direction.

    Attributes:
        tower: of images of the tower's own size, given to it without normalisation.
        pixels: of the same images, normalised.
        resized: of an image twice that size.
        text: of the sentences.
        logits: scaled cosines of the normalised images (rows) and the sentences.
        tolerance: largest difference that counts as equal.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    tower: tuple[tuple[float, ...], ...]
    pixels: tuple[tuple[float, ...], ...]
    resized: tuple[tuple[float, ...], ...]
    text: tuple[tuple[float, ...], ...]
    logits: tuple[tuple[float, ...], ...]
    tolerance: float = CANARY_TOLERANCE


class CheckpointCard(BaseModel):
    """The record in `card.json`.

    Attributes:
        text_from: model id whose text tower belongs to this image tower; empty if stored in this folder.
        trained_on: datasets seen by this model and all its parents, with `"unknown"` among them if some saw
            more than is listed; `None` if nothing is known.
        prompts: learned tokens inside the towers; those of the text tower are in `prompts.safetensors`.
        config: the configuration of open_clip; empty where `arch` is a name that open_clip has.
        logit_bias: added to the logits; 0 for all but sigmoid models.
        sha256: fingerprint of the whole model (`models.identity`).
        canary: outputs on fixed inputs; `None` in cards that are older than the canary.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: str = SCHEMA
    name: str
    arch: str
    quick_gelu: bool
    preprocess: PreprocessFacts
    logit_scale: float
    logit_bias: float = 0.0
    config: dict[str, Any] = {}
    text_from: str
    prompts: PromptFacts | None = None
    image_sha256: str
    text_sha256: str
    sha256: str
    defense: str
    trained_on: tuple[str, ...] | None
    parents: tuple[Parent, ...] = ()
    parameters: int
    recipe: dict[str, Any] = {}
    training: dict[str, Any] = {}
    canary: Canary | None = None


def read_card(folder: Path) -> CheckpointCard:
    """The card of a checkpoint folder.

    Raises:
        WeightsError: no card, or a card of another schema.
        CardError: unknown or missing keys.
    """
    path = folder / "card.json"
    if not path.is_file():
        raise WeightsError(f"model {folder}", "no card.json", "a folder that vlmrob wrote, or ARCH:TAG")
    table = store.read_json(path)
    if not isinstance(table, dict) or table.get("schema_version") not in (EARLIER, SCHEMA):
        raise WeightsError(str(path), "not a checkpoint card of this schema", f"{SCHEMA} or {EARLIER}")
    return reader.parse(table, CheckpointCard, str(path))  # type: ignore[type-var]
