"""Attribute values of a scene, their words, and captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from robustbench_vlm.data.tiny.functions import Array
from robustbench_vlm.data.tiny.render import SHAPES, TEXTURES
from robustbench_vlm.data.tiny.strokes import GLYPHS, Index

COLOURS = {
    "red": (0.90, 0.08, 0.08),
    "orange": (1.00, 0.52, 0.02),
    "yellow": (0.97, 0.92, 0.08),
    "green": (0.08, 0.62, 0.12),
    "cyan": (0.08, 0.85, 0.90),
    "blue": (0.08, 0.16, 0.92),
    "purple": (0.50, 0.06, 0.70),
    "pink": (1.00, 0.55, 0.78),
    "brown": (0.48, 0.27, 0.08),
    "white": (0.97, 0.97, 0.97),
}
COUNTS = ("one", "two", "three", "four", "five")
POSITIONS = (
    "top left",
    "top",
    "top right",
    "left",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
FAMILIES = ("shape", "textured", "outline", "pattern", "count", "position", "letter", "digit")
SHARES = (0.18, 0.11, 0.12, 0.11, 0.10, 0.08, 0.14, 0.16)  # of the families in pretraining
DIGIT_COUNT = 10

ADJECTIVES = {
    "horizontal stripes": "striped",
    "vertical stripes": "striped",
    "diagonal stripes": "striped",
    "checkerboard": "checkered",
    "dots": "dotted",
}
"""Textures that shapes are filled with, and their adjectives."""

BEGINNINGS = ("a photo of a", "a photo of a", "this is a photo of a", "a picture of a", "an image of a", "a")
SAYINGS: dict[str, tuple[str, ...]] = {
    "shape": (
        "{begin} {colour} {shape}",
        "{begin} {colour} {shape}",
        "{begin} {shape}",
        "{begin} {colour} object",
        "{begin} {colour} shape",
    ),
    "textured": (
        "{begin} {adjective} {shape}",
        "{begin} {adjective} {shape}",
        "{begin} {colour} {adjective} {shape}",
    ),
    "outline": (
        "{begin} outline of a {shape}",
        "the outline of a {shape}",
        "a line drawing of a {shape}",
        "a sketch of a {shape}",
    ),
    "pattern": (
        "{begin} pattern of {texture}",
        "a pattern of {texture}",
        "a background with {texture}",
        "{begin} texture with {texture}",
    ),
    "count": (
        "a photo of {count} {shapes}",
        "a photo of {count} {objects}",
        "an image with {count} {objects}",
        "{count} {colour} {shapes}",
    ),
    "position": (
        "a photo of a {shape} at the {position}",
        "a photo of an object at the {position}",
        "something at the {position}",
        "a {colour} {shape} at the {position}",
    ),
    "letter": (
        "{begin} letter {glyph}",
        "a photo of the letter {glyph}",
        "a handwritten letter {glyph}",
        "the letter {glyph}",
    ),
    "digit": (
        "{begin} digit {glyph}",
        "a photo of the number {glyph}",
        "a handwritten digit {glyph}",
        "the digit {glyph}",
    ),
}


@dataclass
class Attributes:
    """What N scenes show; every field is (N,) indices into the lists above."""

    family: Index
    colour: Index
    shape: Index
    texture: Index
    count: Index
    position: Index
    glyph: Index

    def rows(self, index: Index) -> Attributes:
        """The attributes of some of the scenes."""
        return Attributes(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def held_out(colour: Index, shape: Index) -> np.ndarray:
    """Which pairs of colour and shape are never drawn for training: 25 of the 100."""
    turn = (shape - colour) % len(SHAPES)
    return np.asarray((turn < 2) | ((turn == 2) & (colour % 2 == 0)))


def sample(u: Array) -> Attributes:
    """Attributes of N pretraining scenes.

    Args:
        u: (N, 8) uniform in [0, 1).
    """

    def pick(column: int, size: int) -> Index:
        return (u[:, column] * size).astype(np.intp)

    family = np.minimum(np.searchsorted(np.cumsum(SHARES), u[:, 0], side="right"), len(FAMILIES) - 1)
    colour, shape = pick(1, len(COLOURS)), pick(2, len(SHAPES))
    # a held-out pair becomes the pair three shapes on, which never is one
    shape = np.where(held_out(colour, shape), (shape + 3) % len(SHAPES), shape)
    fills = [TEXTURES.index(name) for name in ADJECTIVES]
    textured = family == FAMILIES.index("textured")
    texture = np.where(textured, np.array(fills)[pick(3, len(fills))], 1 + pick(3, len(TEXTURES) - 1))
    digit = family == FAMILIES.index("digit")
    glyph = np.where(digit, pick(6, DIGIT_COUNT), DIGIT_COUNT + pick(6, len(GLYPHS) - DIGIT_COUNT))
    return Attributes(family, colour, shape, texture, pick(4, len(COUNTS)), pick(5, len(POSITIONS)), glyph)


def captions(attributes: Attributes, u: Array) -> list[str]:
    """One true sentence a scene.

    Args:
        attributes: what the scenes show, N rows.
        u: (N, 2) uniform in [0, 1): which sentence of `SAYINGS`, which beginning.
    """
    colours = tuple(COLOURS)
    lines = []
    for i, family in enumerate(attributes.family):
        sayings = SAYINGS[FAMILIES[family]]
        shape, texture = SHAPES[attributes.shape[i]], TEXTURES[attributes.texture[i]]
        single = attributes.count[i] == 0
        lines.append(
            sayings[int(u[i, 0] * len(sayings))].format(
                begin=BEGINNINGS[int(u[i, 1] * len(BEGINNINGS))],
                colour=colours[attributes.colour[i]],
                shape=shape,
                shapes=shape if single else plural(shape),
                objects="object" if single else "objects",
                texture=texture,
                adjective=ADJECTIVES.get(texture, ""),
                count=COUNTS[attributes.count[i]],
                position=POSITIONS[attributes.position[i]],
                glyph=GLYPHS[attributes.glyph[i]],
            )
        )
    return lines


def plural(noun: str) -> str:
    """The plural of a noun."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def sentences() -> Iterator[str]:
    """Sentences that together contain every word of every caption."""
    yield from BEGINNINGS
    for sayings in SAYINGS.values():
        yield from (saying.translate(str.maketrans("{}", "  ")) for saying in sayings)
    yield from (*COLOURS, *SHAPES, *map(plural, SHAPES), *TEXTURES, *ADJECTIVES.values())
    yield from (*COUNTS, *POSITIONS, *GLYPHS, "object", "objects")
