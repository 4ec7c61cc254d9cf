"""The records of a study: which recipes are trained against each other, over which seeds, judged by what."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from robustbench_vlm.cards.card import Card
from robustbench_vlm.cards.recipe import Probe

ARM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")


class Arm(Card):
    """One way to train.

    Attributes:
        name: name of the arm in tables and folders.
        title: what it is, for the tables.
        recipe: name of the recipe card, or a TOML file.
        set: changes to the recipe, each as `--set` takes them.
    """

    name: str
    title: str
    recipe: str
    set: tuple[str, ...] = ()


class Final(Card):
    """What every trained model is attacked with in the end.

    Attributes:
        attack: name of the chain.
        suite: name of the suite.
        n: images a dataset.
    """

    attack: str
    suite: str
    n: int = Field(ge=1)


class Claim(Card):
    """A number that a paper states, to stand beside ours.

    Attributes:
        measure: what of ours it is compared with: `robust`, points of robust accuracy on the seen set;
            `zeroshot`, points of clean accuracy on the unseen sets; `speed`, ratio of steps to one accuracy.
        value: the number as the paper states it.
        words: what the paper says about it.
        source: table or section of the paper.
    """

    measure: Literal["robust", "zeroshot", "speed"]
    value: float
    words: str
    source: str


class Study(Card):
    """Arms trained from the same start over the same seeds, with the same probe and the same final attack.

    Attributes:
        kind: `arms`, this kind; the other one is `frontier`.
        baseline: name of the arm that all others are paired with, seed by seed.
        seeds: seeds of data order and noise; each becomes the `seed` of every arm's recipe.
        set: changes to every arm's recipe, before the arm's own.
        probe: replaces the recipes' own, so that all curves have the same points.
        final: the attack on every trained model.
        arm: the ways to train.
        curves: whether curves are compared, too: steps to the baseline's final accuracy, and a plot.
        claim: numbers of the paper that the study is about.
    """

    kind: Literal["arms"] = "arms"
    name: str
    title: str
    baseline: str
    seeds: tuple[Annotated[int, Field(ge=0)], ...]
    set: tuple[str, ...] = ()
    probe: Probe
    final: Final
    arm: tuple[Arm, ...]
    curves: bool = False
    claim: tuple[Claim, ...] = ()
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _paired(self) -> Study:
        names = [arm.name for arm in self.arm]
        for name in names:
            if not ARM.fullmatch(name):  # they stand in tables and error lines
                raise ValueError(f"arm {name!r:.60} must be letters, digits and . _ -")
        if len(set(names)) != len(names):
            raise ValueError("arm names must differ")
        if self.baseline not in names:
            raise ValueError(f"baseline {self.baseline!r:.60} is no arm; arms: {', '.join(names)}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds must differ, and there must be one")
        return self
