"""The record of a chain of attacks."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from robustbench_vlm.cards.card import Card as Card

MOST_ROWS = 8192
"""Images of one model call, whatever device it is: 8192 images of 224 pixels are 5 GB before any layer."""


class Stage(BaseModel):
    """One attack of a chain: a plug-in and its fields, every number written out.

    Attributes:
        name: name of the stage, which becomes the column `robust_<name>`.
        attack: name of the attack, or `module:Class`; its own fields are further keys of this table.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    attack: str

    @property
    def fields(self) -> dict[str, Any]:
        """The plug-in's own fields."""
        return dict(self.model_extra or {})


class AttackCard(Card):
    """A chain of attacks; each is given the images that survived the ones before.

    Attributes:
        rows: images in every call of the canonical pass, which decides; smaller batches are padded to it.
            Logits depend on it in their last bits, so it is part of the fingerprint. Attacks see the model in
            calls of other sizes (`--batch-size`).
        stop: when a trajectory ends: `first`, at the first misclassified iterate; `last`, after all steps,
            judged by its last iterate; `best`, after all steps, judged by the best misclassified one.
        plain_pgd: whether the chain is projected gradient descent and nothing else. A stronger chain should
            break every image that such a chain breaks; the leaderboard counts those that it does not.
        stage: the attacks, in the order in which they run.
    """

    name: str
    title: str
    version: int = 1
    rows: int = Field(default=16, ge=1, le=MOST_ROWS)
    stop: Literal["first", "last", "best"] = "first"
    plain_pgd: bool = False
    stage: tuple[Stage, ...]

    @model_validator(mode="after")
    def _stages(self) -> AttackCard:
        names = [stage.name for stage in self.stage]
        if not names or len(set(names)) != len(names):
            raise ValueError("a chain needs at least one stage, and stage names must differ")
        return self
