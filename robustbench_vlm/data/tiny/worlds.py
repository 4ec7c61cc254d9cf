"""The datasets of the tiny world: one seen, seven unseen, and scikit-learn's scanned digits.

Image i of a split is a function of its own name alone, never of how many images are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from robustbench_vlm import rng
from robustbench_vlm.data.tiny.render import SHAPES, SIDE, TEXTURES, enlarge
from robustbench_vlm.data.tiny.scenes import NOISE, NUMBERS, draw_block
from robustbench_vlm.data.tiny.strokes import GLYPHS, Index
from robustbench_vlm.data.tiny.words import (
    COLOURS,
    COUNTS,
    DIGIT_COUNT,
    FAMILIES,
    POSITIONS,
    Attributes,
    held_out,
    sample,
)

SEEN = "tiny-seen"
DIGITS = "tiny-digits"
Fixed = Mapping[str, int]


@dataclass(frozen=True)
class World:
    """One dataset.

    Attributes:
        classes: name of each class -> the attributes that make it; all others vary freely.
        templates: sentences with `{c}`.
        size: images of each split.
        boost: contrast, as a multiple of what pretraining shows; more of it is another rendering, in which a
            model can tell thin lines and fine patterns apart under attack.
    """

    name: str
    classes: Mapping[str, Fixed]
    templates: tuple[str, ...]
    size: Mapping[str, int] = field(default_factory=lambda: {"test": 1000})
    boost: float = 1.0

    @property
    def folder(self) -> str:
        """Name of the folder below the data root."""
        return f"wds_{self.name}"


def _fixed(family: str, **values: int) -> Fixed:
    return {"family": FAMILIES.index(family), **values}


def _seen() -> dict[str, Fixed]:
    """40 classes of three kinds: 20 coloured shapes, 10 textured shapes, 10 letters."""
    classes: dict[str, Fixed] = {}
    for c, colour in enumerate(COLOURS):
        for step in (4, 7):
            s = (c + step) % len(SHAPES)
            classes[f"{colour} {SHAPES[s]}"] = _fixed("shape", colour=c, shape=s)
    fills = {
        "striped": ("horizontal stripes", ("circle", "square", "heart", "arrow")),
        "checkered": ("checkerboard", ("square", "triangle", "star")),
        "dotted": ("dots", ("circle", "square", "heart")),
    }
    for adjective, (texture, shapes) in fills.items():
        for shape in shapes:
            classes[f"{adjective} {shape}"] = _fixed(
                "textured", texture=TEXTURES.index(texture), shape=SHAPES.index(shape)
            )
    for letter in "ACEHKMRSTX":
        classes[f"letter {letter}"] = _fixed("letter", glyph=GLYPHS.index(letter))
    return classes


def _pairs() -> dict[str, Fixed]:
    """The pairs of colour and shape that no training image shows."""
    return {
        f"{colour} {shape}": _fixed("shape", colour=c, shape=s)
        for c, colour in enumerate(COLOURS)
        for s, shape in enumerate(SHAPES)
        if held_out(np.array(c), np.array(s))
    }


def _worlds() -> tuple[World, ...]:
    photo = ("a photo of a {c}", "a picture of a {c}", "this is a photo of a {c}")
    counts = ("one object", *(f"{count} objects" for count in COUNTS[1:]))
    return (
        World(SEEN, _seen(), photo, {"train": 16000, "val": 1000, "test": 1000}),
        World("tiny-pairs", _pairs(), photo),
        World(
            "tiny-colours",
            {name: _fixed("shape", colour=i) for i, name in enumerate(COLOURS)},
            ("a photo of a {c} object", "a picture of a {c} shape"),
        ),
        World(
            "tiny-outlines",
            {name: _fixed("outline", shape=i) for i, name in enumerate(SHAPES)},
            ("a line drawing of a {c}", "a sketch of a {c}", "the outline of a {c}"),
            boost=2.0,
        ),
        World(
            "tiny-textures",
            {name: _fixed("pattern", texture=i) for i, name in enumerate(TEXTURES) if i},
            ("a pattern of {c}", "a background with {c}"),
            boost=1.3,
        ),
        World(
            "tiny-counts",
            {name: _fixed("count", count=i) for i, name in enumerate(counts)},
            ("a photo of {c}", "an image with {c}"),
        ),
        World(
            "tiny-positions",
            {name: _fixed("position", position=i) for i, name in enumerate(POSITIONS)},
            ("a photo of an object at the {c}", "something at the {c}"),
        ),
        World(
            "tiny-letters",
            {f"letter {name}": _fixed("letter", glyph=GLYPHS.index(name)) for name in "BDFJLPUVWZ"},
            ("a photo of the {c}", "a handwritten {c}"),
            boost=2.0,
        ),
        World(
            DIGITS,
            {name: _fixed("digit", glyph=i) for i, name in enumerate(GLYPHS[:DIGIT_COUNT])},
            ("a photo of the number {c}", "a handwritten digit {c}"),
            {"test": 1797},
        ),
    )


WORLDS: Mapping[str, World] = {world.name: world for world in _worlds()}
"""Every dataset by name; the class lists and templates of the cards are made from these."""


def labels(name: str, index: Index) -> Index:
    """(N,) int labels of images `index` (N,) of any split; classes take turns, so they are balanced."""
    if name == DIGITS:
        return _scans()[1][index]
    return index % len(WORLDS[name].classes)


def images(name: str, split: str, index: Index) -> NDArray[np.uint8]:
    """Images `index` (N,) of a split of a dataset.

    Returns:
        (N, 32, 32, 3) uint8, RGB.
    """
    if name == DIGITS:
        return _scans()[0][index]
    u = np.empty((len(index), NUMBERS), np.float32)
    noise = np.empty((len(index), *NOISE), np.float32)
    for row, i in enumerate(index):
        generator = rng.generator(f"tiny/{name}/{split}/s{i:07d}")
        u[row] = generator.random(NUMBERS, dtype=np.float32)
        noise[row] = generator.random(NOISE, dtype=np.float32)
    world = WORLDS[name]
    return draw_block(_attributes(world, labels(name, index), u), u, noise, world.boost)


def _attributes(world: World, label: Index, u: NDArray[np.float32]) -> Attributes:
    """Free attributes as in pretraining, those of the class fixed."""
    attributes = sample(u[:, :8])
    classes = list(world.classes.values())
    for name in (part.name for part in fields(Attributes)):
        fixed = np.array([values.get(name, -1) for values in classes])[label]
        setattr(attributes, name, np.where(fixed >= 0, fixed, getattr(attributes, name)))
    return attributes


def _scans() -> tuple[NDArray[np.uint8], Index]:
    """All 1,797 scanned digits of scikit-learn: (1797, 32, 32, 3) uint8 and (1797,) labels, in its order."""
    from sklearn.datasets import load_digits  # slow to import, and only this dataset needs it

    digits = load_digits()
    grey = enlarge(digits.images.astype(np.float32) / 16)
    pixels = np.clip(grey * 255 + 0.5, 0, 255).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=-1), digits.target.astype(np.intp)


assert SIDE == 32  # the cards state native_px = 32
