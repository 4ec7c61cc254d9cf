"""The kinds of values in a result file: checked before anything is computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from robustbench_vlm.errors import DataError
from robustbench_vlm.results.stop_rule import StopRule
from robustbench_vlm.threat import Norm

Count = Annotated[int, Field(ge=0, lt=10**15, strict=True)]
"""A number of images, model calls or parameters."""

Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Radius = Annotated[str, Field(pattern=r"^\d{1,400}(/[1-9]\d{0,400})?$", max_length=400)]
"""An exact fraction."""


def _stop_rule(text: str) -> str:
    """A rule that can be read, or none."""
    return StopRule.of(text).text if text else text


class Facts(BaseModel):
    """Base of the blocks of a result. Entries that are not listed are allowed: versions differ in them."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class Config(Facts):
    """What decided the outcome, as far as tables read it."""

    model: str
    model_sha256: Sha
    dataset: str
    split: str
    subset_sha256: Sha
    images_sha256: Sha
    names_sha256: Sha
    templates_sha256: Sha
    canvas: str
    canvas_px: Count
    n_requested: Count
    seed: int
    norm: Norm
    eps: Radius
    eps_ladder: list[Radius]
    attack: str
    attack_version: int
    attack_sha256: Sha
    engine: str
    precision: str
    protocol: str = ""
    subset: str = ""
    stop_rule: Annotated[str, AfterValidator(_stop_rule)] = ""


class Outcome(Facts):
    """Counts of verdicts, and flags."""

    n: Annotated[int, Field(ge=1, lt=10**15, strict=True)]
    n_classes: Count
    clean_correct: Count
    robust: dict[str, Count]
    errors: Count
    majority: Annotated[float, Field(ge=0, le=1)]
    exposure: str
    flags: list[str]
    verdicts_sha256: Sha


class Model(Facts):
    """What a table prints about a model."""

    id: str
    defense: str
    arch: str
    parameters: Count
    train_norm: str
    train_eps: str


class Stage(Facts):
    """A stage of the chain."""

    name: str


class Blocks(Facts):
    """The hashed blocks of a result."""

    config: Config
    outcome: Outcome
    model: Model
    stages: Annotated[list[Stage], Field(min_length=1)]


def require(blocks: Mapping[str, Any], where: str, do: str) -> None:
    """Refuse blocks with an entry that is missing or of the wrong kind.

    Args:
        blocks: of a result file.
        where: the file, for the message.
        do: what to do about it, for the message.

    Raises:
        DataError: the message names the entry, what it is, and what is expected.
    """
    try:
        Blocks.model_validate(blocks)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        found = "missing" if first["type"] == "missing" else f"{first['input']!r:.60}"
        expected = first["msg"].removeprefix("Input should be ").lower()
        raise DataError(where, f"{key} is {found}", expected, do) from None
