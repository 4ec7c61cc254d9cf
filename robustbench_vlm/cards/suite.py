"""The record of a suite: datasets under one threat."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from robustbench_vlm.cards.card import Card as Card
from robustbench_vlm.threat import Norm, require_radii


class Suite(Card):
    """A named list of datasets under one threat: what makes two rows comparable.

    Attributes:
        datasets: names of the dataset cards.
        split: split of every dataset on which models are evaluated.
        norm: norm of the ball.
        eps: radii: `4/255` for linf, plain lengths in units of the pixel range for l2 and l1.
        n: images a dataset; 0 means all.
        sample: how they are drawn, by the smallest hashes of seed and key: `hash`, over the whole split;
            `stratified`, class by class in turn, so that even few images have every class equally often.
        seed: seed of the draw and of the attacks' noise.
        subset: a file of image names, one a line, that are taken in its order instead.
        subset_sha256: SHA-256 of that file, checked when it is read; empty for no check.
        means: further averages beside the one over all datasets, by name; the name `unseen` is taken: it is
            the average over datasets that the model and its parents were not trained on.
    """

    name: str
    title: str
    version: int = 1
    datasets: tuple[str, ...]
    split: str = "test"
    norm: Norm = "linf"
    eps: tuple[str, ...]
    n: int = Field(default=1000, ge=0)
    sample: Literal["hash", "stratified"] = "hash"
    seed: int = 0
    subset: str = ""
    subset_sha256: str = ""
    means: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _datasets_and_radii(self) -> Suite:
        if not self.datasets or len(set(self.datasets)) != len(self.datasets):
            raise ValueError("datasets must name one dataset at least, and none twice")
        require_radii(self.eps, self.norm)
        return self

    @model_validator(mode="after")
    def _means(self) -> Suite:
        for name, members in self.means.items():
            foreign = sorted(set(members) - set(self.datasets))
            if name == "unseen" or foreign or not members:
                raise ValueError(f"means.{name} must be another name than unseen, over datasets of the suite")
        return self
