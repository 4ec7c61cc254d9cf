"""Attributes of a scene -> its layout: sizes, positions, colours and noise, all from uniform numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from robustbench_vlm import rng
from robustbench_vlm.data.tiny import functions
from robustbench_vlm.data.tiny.functions import Array
from robustbench_vlm.data.tiny.render import BLOCK, SIDE, TEXTURES, Ink, Paint, Scenes, Things, render
from robustbench_vlm.data.tiny.strokes import Index, sheet
from robustbench_vlm.data.tiny.words import COLOURS, FAMILIES, Attributes, captions, sample

NUMBERS = 104  # uniform numbers a scene uses: 8 attributes, 2 caption, the rest layout
LAYOUT = 10
NOISE = (3, SIDE, SIDE)

# Faded, almost noiseless scenes: full contrast or noise alone would make an undefended model robust at 4/255.
CONTRAST = (0.25, 0.55)
GRAIN = 0.04
FINE = 1.8  # small things and thin lines get this much more contrast, or no model could be robust there

BASE = np.array(list(COLOURS.values()), np.float32)
LUMA = np.array((0.30, 0.59, 0.11), np.float32)


class Columns:
    """Hands out the columns of a matrix of uniform numbers, each once."""

    def __init__(self, u: Array) -> None:
        self._u = u
        self._next = 0

    def take(self, low: float = 0.0, high: float = 1.0, size: int = 0) -> Array:
        """(N,) or (N, size) numbers, uniform in [low, high)."""
        start, self._next = self._next, self._next + max(size, 1)
        assert self._next <= self._u.shape[1], "NUMBERS is too small for the layout"
        block = self._u[:, start : self._next] if size else self._u[:, start]
        return np.asarray(low + (high - low) * block, np.float32)


def _tint(colour: Index, u: Columns) -> Array:
    """(N, 3) a colour as it occurs: a little darker or lighter, a little off."""
    base = BASE[colour] * u.take(0.8, 1.0)[:, None]
    return np.asarray(np.clip(base + u.take(-0.06, 0.06, 3), 0, 1), np.float32)


def _ground(luma: Array, u: Columns) -> Array:
    """(N, 3) nearly grey backgrounds that stand off from brightness `luma` (N,) by at least 0.25."""
    grey = u.take(0.0, 0.8)
    near = np.abs(grey - luma) < 0.25
    grey = np.where(near, np.where(luma < 0.42, luma + 0.35, luma - 0.35), grey)
    grey = grey[:, None] + u.take(-0.06, 0.06, 3)
    return np.asarray(np.clip(grey, 0, 1), np.float32)


def _plain(colour: Array) -> Paint:
    rows = len(colour)
    ones = np.ones(rows, np.float32)
    return Paint(colour, colour, np.zeros(rows, np.intp), ones, np.zeros((rows, 2), np.float32))


def scenes(attributes: Attributes, u: Array) -> Scenes:
    """Lay out N scenes.

    Args:
        attributes: what they show, N rows.
        u: (N, NUMBERS - LAYOUT) uniform in [0, 1).
    """
    draw = Columns(u)
    family = np.array(FAMILIES)[attributes.family]
    tint = _tint(attributes.colour, draw)
    ground = _plain(_ground(functions.product(tint, LUMA), draw))
    contrast, pivot, grain = draw.take(*CONTRAST), draw.take(0.3, 0.7), draw.take(0.0, GRAIN)
    shown = np.isin(family, ("shape", "textured", "outline", "position"))
    layers = [_single(attributes, np.flatnonzero(shown), family, tint, draw)]
    _pattern(ground, attributes, family == "pattern", draw)
    layers += _several(attributes, np.flatnonzero(family == "count"), tint, draw)
    rows = np.flatnonzero((family == "letter") | (family == "digit"))
    ink = _ink(attributes, rows, (family == "digit")[rows], tint, draw)
    scanned, full = rows[ink.scan], draw.take()
    ground.first[scanned] = 0
    contrast = np.where(np.isin(family, ("outline", "count", "position")), FINE * contrast, contrast)
    pivot[scanned] = 0
    contrast[scanned] = (CONTRAST[0] + (1 - CONTRAST[0]) * full)[scanned]
    return Scenes(ground, layers, ink, contrast, pivot, grain)


def _single(attributes: Attributes, rows: Index, family: np.ndarray, tint: Array, draw: Columns) -> Things:
    """The one object of shape, textured, outline and position scenes."""
    small = (family == "position")[rows]
    size = np.where(small, draw.take(7.5, 9.0)[rows], draw.take(9.5, 13.0)[rows])
    spread = draw.take(-3.0, 3.0, 2)[rows]
    row, column = np.divmod(np.array([0, 1, 2, 3, 5, 6, 7, 8])[attributes.position[rows]], 3)
    cell = 7.5 + 8.0 * np.stack([column, row], 1) + spread * 0.4
    centre = np.where(small[:, None], cell, (SIDE - 1) / 2 + spread)
    line = np.where((family == "outline")[rows], draw.take(2.8, 4.2)[rows], 0)
    other = tint[rows] * draw.take(0.0, 0.25)[rows, None]
    textured = (family == "textured")[rows]
    paint = Paint(
        first=tint[rows],
        second=other.astype(np.float32),
        texture=np.where(textured, attributes.texture[rows], 0),
        period=draw.take(5.0, 7.5)[rows],
        phase=draw.take(0.0, 16.0, 2)[rows],
    )
    angle = draw.take(-0.25, 0.25)[rows]
    return Things(
        rows,
        attributes.shape[rows],
        centre.astype(np.float32),
        size.astype(np.float32),
        angle,
        line.astype(np.float32),
        paint,
    )


def _pattern(ground: Paint, attributes: Attributes, shown: np.ndarray, draw: Columns) -> None:
    """Turn some grounds into patterns of two colours at least 0.3 apart in brightness."""
    first = draw.take(0.0, 1.0, 3)
    second = draw.take(0.0, 1.0, 3)
    gap = functions.product(first - second, LUMA)
    push = np.where(np.abs(gap) < 0.3, np.where(gap < 0, -0.3, 0.3), 0)[:, None]
    rows = np.flatnonzero(shown)
    ground.first[rows] = np.clip(first + push, 0, 1)[rows]
    ground.second = ground.first.copy()
    ground.second[rows] = np.clip(second - push, 0, 1)[rows]
    ground.texture[rows] = attributes.texture[rows]
    period = draw.take(7.0, 11.0)
    gradient = attributes.texture == TEXTURES.index("gradient")
    ground.period = np.where(gradient, np.pi / 2, period).astype(np.float32)
    ground.phase = np.where(gradient[:, None], 0, draw.take(0.0, 16.0, 2)).astype(np.float32)


def _several(attributes: Attributes, rows: Index, tint: Array, draw: Columns) -> list[Things]:
    """One to five like objects in different cells of a 3 x 3 sheet."""
    order = np.argsort(draw.take(0.0, 1.0, 9)[rows], axis=1)
    spread = draw.take(-1.0, 1.0, 10)[rows].reshape(len(rows), 5, 2)
    size = draw.take(3.8, 4.9)[rows]
    angle = draw.take(-0.25, 0.25)[rows]
    layers = []
    for turn in range(5):
        own = np.flatnonzero(attributes.count[rows] >= turn)
        image = rows[own]
        row, column = np.divmod(order[own, turn], 3)
        centre = 5.5 + 10.0 * np.stack([column, row], 1) + spread[own, turn]
        line = np.zeros(len(own), np.float32)
        paint = _plain(tint[image])
        centre = centre.astype(np.float32)
        layers.append(Things(image, attributes.shape[image], centre, size[own], angle[own], line, paint))
    return layers


def _ink(attributes: Attributes, rows: Index, digit: np.ndarray, tint: Array, draw: Columns) -> Ink:
    """The glyph of letter and digit scenes: most digits and some letters as if scanned."""
    scan = draw.take()[rows] < np.where(digit, 0.8, 0.4)
    angle = draw.take(-0.17, 0.17)[rows]
    shear = draw.take(-0.25, 0.40)[rows]  # people slant to the right
    scale = np.where(scan, draw.take(0.75, 1.05)[rows], draw.take(0.6, 0.85)[rows])
    aspect = draw.take(0.8, 1.15)[rows]
    cos, sin = functions.cos(angle), functions.sin(angle)
    lean = np.stack([np.stack([scale * aspect, -shear * scale], 1), np.stack([0 * scale, scale], 1)], 1)
    turn = np.stack([np.stack([cos, -sin], 1), np.stack([sin, cos], 1)], 1)
    paper = draw.take()[rows]
    white = np.where(scan, 1.0, 0.0)[:, None]
    colour = tint[rows] * (1 - white) + white
    wide = draw.take(0.10, 0.24)[rows]
    points = sheet().control.shape[1]
    reach = draw.take(0.03, 0.12)[rows]
    jitter = draw.take(-1.0, 1.0, 2 * points)[rows].reshape(len(rows), points, 2) * reach[:, None, None]
    return Ink(
        image=rows,
        glyph=attributes.glyph[rows],
        variant=paper,
        jitter=jitter.astype(np.float32),
        matrix=functions.product(turn, lean).astype(np.float32),
        shift=draw.take(-0.15, 0.15, 2)[rows],
        width=wide.astype(np.float32),
        soft=np.full(len(rows), 1 / 8, np.float32),
        scan=scan,
        colour=colour.astype(np.float32),
    )


def draw_block(attributes: Attributes, u: Array, noise: Array, boost: float = 1.0) -> np.ndarray:
    """(N, 32, 32, 3) uint8 of N scenes from their numbers, with `boost` times their contrast."""
    parts = []
    for start in range(0, len(u), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(u)))
        laid = scenes(attributes.rows(rows), u[rows, LAYOUT:])  # in pieces that fit the cache
        strong = np.minimum(laid.contrast * np.float32(boost), 1)
        parts.append(render(replace(laid, contrast=strong), noise[rows]))
    return np.concatenate(parts)


def stream(name: str, size: int) -> tuple[np.ndarray, list[str]]:
    """A block of `size` captioned scenes for pretraining, a function of `name` and `size`.

    Returns:
        (size, 32, 32, 3) uint8 images and one caption each.
    """
    generator = rng.generator(name)
    u = generator.random((size, NUMBERS), dtype=np.float32)
    noise = generator.random((size, *NOISE), dtype=np.float32)
    attributes = sample(u[:, :8])
    return draw_block(attributes, u, noise), captions(attributes, u[:, 8:10])
