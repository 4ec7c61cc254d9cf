"""How papers evaluate, as records: which sentences stand for a class, and which attack counts how."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from robustbench_vlm.cards.card import Card
from robustbench_vlm.threat import Norm, require_radii

PLAIN = str.maketrans("_-/", "   ")

Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "longest", "squash"]
"""Both as open_clip names them; the names of `Resize` are made of one of each."""

Resize = Literal[
    "bicubic",
    "bicubic-squash",
    "bicubic-longest",
    "bilinear",
    "bilinear-256",
    "bilinear-squash",
    "bilinear-longest",
]
"""How an image is brought to the model's canvas before the attack. The first word is the kernel. Without a
second word, the shorter side is resized to the input size and the centre is cropped (open_clip's default);
`256`: the shorter side to 256/224 of the input size and a crop; `squash`: both sides to the input size;
`longest`: the longer side to the input size and black borders."""

CardResize = Literal["model"] | Resize
"""`Resize`, or `model`: as the evaluated model itself states."""


def sentences_sha256(names: Sequence[str], templates: Sequence[str]) -> str:
    """SHA-256 of the newline-joined sentences, class by class: the identity of what a class is called."""
    rendered = [template.replace("{c}", name) for name in names for template in templates]
    return hashlib.sha256("\n".join(rendered).encode()).hexdigest()


class PromptPack(Card):
    """The sentences of every dataset under one convention.

    Attributes:
        source: where the sentences and names come from.
        spelling: how class names are spelled that `names` does not list: `card`, as in the dataset card;
            `plain`, in small letters with spaces for `_`, `-` and `/`.
        template: the one sentence of datasets that `templates` does not list; empty for the card's own.
        templates: sentences with `{c}` by dataset.
        names: class names in label order by dataset.
        sentences_sha256: SHA-256 of the rendered sentences by dataset, checked when they are used.
    """

    name: str
    title: str
    version: int = 1
    source: str = ""
    spelling: Literal["card", "plain"] = "card"
    template: str = ""
    templates: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    names: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    sentences_sha256: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _placeholders(self) -> PromptPack:
        lists = [*self.templates.values(), *([(self.template,)] if self.template else [])]
        if any(not lines or any("{c}" not in line for line in lines) for lines in lists):
            raise ValueError("templates must be sentences that contain {c}")
        return self

    def words(
        self, dataset: str, names: Sequence[str], templates: Sequence[str]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Class names and templates of a dataset under this convention.

        Args:
            dataset: name of the card.
            names: the card's class names.
            templates: the card's templates.

        Raises:
            ValueError: the sentences are not those of `sentences_sha256`.
        """
        plain = self.spelling == "plain"
        spelt = tuple(name.lower().translate(PLAIN) if plain else name for name in names)
        chosen = self.names.get(dataset, spelt)
        sentences = self.templates.get(dataset, (self.template,) if self.template else tuple(templates))
        stated, found = self.sentences_sha256.get(dataset, ""), sentences_sha256(chosen, sentences)
        if stated and stated != found:
            raise ValueError(f"sentences of {dataset} have SHA-256 {found[:16]}, expected {stated[:16]}")
        return chosen, sentences


class Protocol(Card):
    """One way to evaluate, fixed as a whole, so that its numbers can stand beside each other.

    Attributes:
        paper: where it is described, or comes from.
        code: repository and commit that were read.
        suite: the suite it is usually run on.
        attack: name of the chain.
        norm: norm of the ball.
        eps: radii; all of them are attacked, the smaller ones first.
        n: images a dataset; 0 means all.
        prompts: name of the prompt pack.
        canvas: size at which the ball lies: `card`, as the dataset cards say; `model`, the model's input for
            all.
        resize: how images come to a model canvas.
        native_resize: the same for datasets whose cards have a native canvas, when `canvas` is `model`.
        antialias: whether the resize inside the model, from a native canvas to its input, is antialiased.
        input_px: the input size that models must have; 0 for any.
        differs: what is done otherwise than in that code, and why.
    """

    name: str
    title: str
    version: int = 1
    paper: str
    code: str = ""
    suite: str
    attack: str
    norm: Norm = "linf"
    eps: tuple[str, ...]
    n: int = Field(ge=0)
    prompts: str
    canvas: Literal["card", "model"] = "card"
    resize: Resize = "bicubic"
    native_resize: Resize = "bicubic"
    antialias: bool = True
    input_px: int = Field(default=0, ge=0)
    differs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _radii(self) -> Protocol:
        require_radii(self.eps, self.norm)
        return self
