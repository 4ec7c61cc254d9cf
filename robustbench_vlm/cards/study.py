"""The records of a study: methods with hyperparameters, a rule that chooses, and comparisons."""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from robustbench_vlm.cards.card import Card
from robustbench_vlm.cards.recipe import Probe

Value = Annotated[str, BeforeValidator(str)]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")
"""What methods and teachers of a study are called: their names stand in tables and error lines."""


class Method(Card):
    """A way to train, with the hyperparameters that are tried.

    Attributes:
        name: name of the method in tables and folders.
        title: what it is, for the tables.
        recipe: name of the recipe card, or a TOML file.
        set: changes to the recipe that all of its trials share, each as `--set` takes them.
        grid: keys of the recipe and the values that are tried; every combination is one trial.
    """

    name: str
    title: str
    recipe: str
    set: tuple[str, ...] = ()
    grid: dict[str, tuple[Value, ...]] = Field(default_factory=dict)

    @property
    def trials(self) -> tuple[tuple[str, ...], ...]:
        """The changes of every trial; the last hyperparameter of the grid varies fastest."""
        keys = list(self.grid)
        combinations = itertools.product(*self.grid.values())
        return tuple(
            tuple(f"{key}={value}" for key, value in zip(keys, values, strict=True))
            for values in combinations
        )

    @model_validator(mode="after")
    def _tried(self) -> Method:
        empty = [key for key, values in self.grid.items() if not values or len(set(values)) != len(values)]
        if empty:
            raise ValueError(f"grid.{empty[0]} must have values, each of them once")
        return self


class Teacher(Card):
    """A model that the study trains first, with the first seed, for methods to start from or to learn from.

    Attributes:
        name: a recipe of the study names it as `@name`, where a model id may stand: as a teacher or a start.
        recipe: name of the recipe card, or a TOML file.
        set: changes to the recipe, each as `--set` takes them.
    """

    name: str
    recipe: str
    set: tuple[str, ...] = ()


class Measurement(Card):
    """An attack on images that a trained model is judged by.

    Attributes:
        attack: name of the chain.
        suite: name of the suite.
        n: images a dataset; 0 for all.
        datasets: only these of the suite; empty: all.
        of: `line`, the chosen trial of each method at every interpolation; `chosen`, at the chosen one;
            `compared`, the same for the contenders of the comparisons alone; `front`, of these contenders,
            every trial and interpolation that lies on the method's front on validation images.
        repeats: seeds that a test is taken with at most, so that a dear attack costs less; 0 for all of them.
    """

    attack: str
    suite: str
    n: int = Field(ge=0)
    datasets: tuple[str, ...] = ()
    of: Literal["line", "front", "chosen", "compared"] = "line"
    repeats: int = Field(default=0, ge=0)


class Rule(Card):
    """How one trial and one interpolation of each method are chosen, from validation images alone.

    Attributes:
        highest: what the chosen one has the highest value of: `mean` of clean and robust accuracy, `clean`
            or `robust`.
        floor: points that the other accuracy must have, where `highest` is `clean` or `robust`.
        fixed: the date on which the rule was written down, before a model of the study was tested.
    """

    highest: Literal["mean", "clean", "robust"] = "mean"
    floor: float | None = Field(default=None, ge=0, le=100)
    fixed: str

    @model_validator(mode="after")
    def _floor(self) -> Rule:
        if (self.floor is None) != (self.highest == "mean"):
            raise ValueError("floor goes with highest = clean or robust, and they need one")
        return self


class Comparison(Card):
    """Two families of methods; of each, the member that the rule prefers is compared.

    Attributes:
        title: the question.
        a, b: names of methods.
    """

    title: str
    a: tuple[str, ...] = Field(min_length=1)
    b: tuple[str, ...] = Field(min_length=1)


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
    """Methods ranked by what clean accuracy costs them in robust accuracy, each at its best hyperparameters.

    Attributes:
        kind: `frontier`: methods are compared by their fronts.
        seeds: seeds of data order and noise. Every trial has the first one. The chosen trial of a method has
            the first `repeats`, and that of a compared method all of them.
        repeats: seeds of the chosen trial of a method.
        interpolation: shares of the trained weights; the rest is the start. One training gives a model for
            each of them (WiSE-FT, arXiv:2109.01903).
        reference: clean and robust accuracy, in points, that the hypervolume is measured from.
        set: changes to every method's recipe, before the method's own.
        probe: replaces the recipes' own, so that all training curves have the same points.
        teacher: models that are trained first.
        validation: of every trial; the only measurement that the rule sees.
        rule: how trials are chosen.
        test: of the chosen trials alone.
        method: the ways to train.
        comparison: what is compared.
        claim: numbers of a paper, to stand beside the first comparison.
    """

    kind: Literal["frontier"]
    name: str
    title: str
    seeds: tuple[Annotated[int, Field(ge=0)], ...]
    repeats: int = Field(default=1, ge=1)
    interpolation: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0,)
    reference: tuple[float, float] = (0.0, 0.0)
    set: tuple[str, ...] = ()
    probe: Probe
    validation: Measurement
    rule: Rule
    test: tuple[Measurement, ...] = ()
    teacher: tuple[Teacher, ...] = ()
    method: tuple[Method, ...]
    comparison: tuple[Comparison, ...] = ()
    claim: tuple[Claim, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def compared(self) -> frozenset[str]:
        """Names of all methods of the comparisons."""
        return frozenset(name for pair in self.comparison for name in (*pair.a, *pair.b))

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        names = [method.name for method in self.method]
        for name in names:
            if not NAME.fullmatch(name):
                raise ValueError(f"method {name!r:.60} must be letters, digits and . _ -")
        teachers = [teacher.name for teacher in self.teacher]
        if len(set(teachers)) != len(teachers) or not all(map(NAME.fullmatch, teachers)):
            raise ValueError("teacher names must differ, and be letters, digits and . _ -")
        if not names or len(set(names)) != len(names):
            raise ValueError("method names must differ, and there must be one")
        if unknown := sorted(self.compared - set(names)):
            raise ValueError(f"comparison of {unknown[0]!r:.60}, which is no method")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds must differ, and there must be one")
        if self.repeats > len(self.seeds):
            raise ValueError(f"repeats = {self.repeats}, and there are {len(self.seeds)} seeds")
        if 1.0 not in self.interpolation or len(set(self.interpolation)) != len(self.interpolation):
            raise ValueError("interpolation must have 1.0, and each share once")
        if self.claim and not self.comparison:
            raise ValueError("claims stand beside the first comparison, and there is none")
        return self
