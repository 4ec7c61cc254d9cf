"""Scenes to pixels: shapes as distance functions, textures, glyphs and noise. Vectorised over images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustbench_vlm.data.tiny import functions, strokes
from robustbench_vlm.data.tiny.functions import Array
from robustbench_vlm.data.tiny.strokes import Index

SIDE = 32
SCAN = 8  # side of a scan: the resolution of scikit-learn's digits
BLOCK = 64  # images drawn together: their masks stay in the processor's cache

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart", "moon", "arrow")
TEXTURES = (
    "plain",
    "horizontal stripes",
    "vertical stripes",
    "diagonal stripes",
    "checkerboard",
    "dots",
    "rings",
    "grid",
    "waves",
    "speckles",
    "gradient",
)


@dataclass
class Paint:
    """Two colours mixed by a texture, one row a painted object.

    Attributes:
        first, second: (M, 3) colours in [0, 1]; `plain` shows only the first.
        texture: (M,) indices into `TEXTURES`.
        period: (M,) pixels; `phase`: (M, 2) pixels.
    """

    first: Array
    second: Array
    texture: Index
    period: Array
    phase: Array


@dataclass
class Things:
    """Shapes to draw, at most one an image; a scene is a list of these layers.

    Attributes:
        image: (M,) image of each thing, without repetition.
        shape: (M,) indices into `SHAPES`.
        centre: (M, 2) pixels, x and y; `size`: (M,) radius in pixels; `angle`: (M,) radians.
        outline: (M,) width of the line in pixels, 0 for a filled shape.
    """

    image: Index
    shape: Index
    centre: Array
    size: Array
    angle: Array
    outline: Array
    paint: Paint


@dataclass
class Ink:
    """Glyphs to write, at most one an image.

    Attributes:
        image: (M,) image of each glyph; `glyph`: (M,) indices into `strokes.GLYPHS`.
        variant: (M,) in [0, 1), which skeleton; `jitter`: (M, P, 2) of control points.
        matrix: (M, 2, 2), and `shift`: (M, 2), from the glyph's square to the image's [-1, 1]^2.
        width: (M,) half thickness of the stroke, `soft`: (M,) width of its edge, in the same unit.
        scan: (M,) bool; true: fills the height, is reduced to 8 x 8 with 17 grey levels and enlarged again.
        colour: (M, 3) in [0, 1].
    """

    image: Index
    glyph: Index
    variant: Array
    jitter: Array
    matrix: Array
    shift: Array
    width: Array
    soft: Array
    scan: NDArray[np.bool_]
    colour: Array


@dataclass
class Scenes:
    """N images to be drawn.

    Attributes:
        ground: N rows.
        layers: drawn in order, later ones on top.
        ink: written last.
        contrast: (N,) in [0, 1], applied about the grey level `pivot` (N,), before the noise.
        grain: (N,) amplitude of the noise.
    """

    ground: Paint
    layers: list[Things]
    ink: Ink
    contrast: Array
    pivot: Array
    grain: Array


def enlarge(scans: Array) -> Array:
    """(N, 8, 8) -> (N, 32, 32), bilinear with pixel centres aligned; how scans come to the canvas."""
    position = (np.arange(SIDE) + 0.5) * SCAN / SIDE - 0.5
    weights = np.maximum(0, 1 - np.abs(np.clip(position, 0, SCAN - 1)[:, None] - np.arange(SCAN)))
    matrix = weights.astype(np.float32)
    return np.asarray(functions.product(functions.product(matrix, scans), matrix.T), np.float32)


def _shape(name: str, x: Array, y: Array) -> Any:  # noqa: ANN401 - an array of x's and y's shape
    """Roughly the signed distance to the edge of a shape of radius 1, negative inside."""
    ax = np.abs(x)
    if name == "circle":
        return functions.hypot(x, y) - 0.92
    if name == "square":
        return np.maximum(ax, np.abs(y)) - 0.8
    if name == "triangle":
        return np.maximum(y - 0.72, 0.87 * ax - 0.49 * y - 0.49)
    if name == "star":
        turn = np.pi / 5
        fold = np.abs((functions.arctan2(x, -y) + turn) % (2 * turn) - turn)
        radius = functions.hypot(x, y)
        return 0.55 * (radius * functions.cos(fold) - 1.05) + 0.83 * radius * functions.sin(fold)
    if name == "cross":
        ay = np.abs(y)
        return np.minimum(np.maximum(ax - 0.3, ay - 0.95), np.maximum(ay - 0.3, ax - 0.95))
    if name == "ring":
        return np.abs(functions.hypot(x, y) - 0.7) - 0.24
    if name == "diamond":
        return 0.83 * ax + 0.55 * np.abs(y) - 0.55
    if name == "heart":
        lobe = functions.hypot(ax - 0.42, y + 0.3) - 0.5
        return np.minimum(lobe, 0.707 * (ax + np.abs(y - 0.02)) - 0.62)
    if name == "moon":
        return np.maximum(functions.hypot(x + 0.1, y) - 0.92, 0.72 - functions.hypot(x - 0.42, y))
    shaft = np.maximum(np.abs(y) - 0.24, np.abs(x + 0.4) - 0.5)
    head = np.maximum(0.71 * (np.abs(y) + x) - 0.67, 0.0 - x)
    return np.minimum(shaft, head)


def _sharp(wave: Any) -> Any:  # noqa: ANN401 - an array
    return np.clip(0.5 + 2.5 * wave, 0, 1)


def _texture(name: str, x: Array, y: Array, period: Array, speckle: Array) -> Any:  # noqa: ANN401 - an array
    """Share of the first colour, in [0, 1], at pixels x (M, 1, W), y (M, H, 1)."""
    turn = (2 * np.pi / period).astype(np.float32)
    if name == "horizontal stripes":
        return _sharp(functions.cos(turn * y)) + 0 * x
    if name == "vertical stripes":
        return _sharp(functions.cos(turn * x)) + 0 * y
    if name == "diagonal stripes":
        return _sharp(functions.cos(0.71 * turn * (x + y)))
    if name == "checkerboard":
        return _sharp(2 * functions.cos(turn / 2 * x) * functions.cos(turn / 2 * y))
    if name == "dots":
        return _sharp(functions.cos(turn * x) + functions.cos(turn * y) - 0.4)
    if name == "rings":
        return _sharp(functions.cos(turn * functions.hypot(x - 16, y - 16)))
    if name == "grid":
        return _sharp(np.maximum(functions.cos(turn * x), functions.cos(turn * y)) - 0.7)
    if name == "waves":
        return _sharp(functions.cos(turn * (y + 2.2 * functions.sin(x * np.float32(2 * np.pi / 13)))))
    if name == "speckles":
        return np.kron(speckle[:, : SIDE // 2, : SIDE // 2] > 0.55, np.ones((1, 2, 2))).astype(np.float32)
    return np.clip(
        (x + y) / (2 * SIDE) + 0.5 * functions.cos(period), 0, 1
    )  # gradient: the phase picks its offset


def _colours(paint: Paint, rows: Index, noise: Array) -> Array:
    """(len(rows), 3, H, W) of painted surfaces, or (.., 3, 1, 1) where all are plain."""
    first, second = paint.first[rows, :, None, None], paint.second[rows, :, None, None]
    texture = paint.texture[rows]
    if not texture.any():
        return first
    share = np.ones((len(rows), SIDE, SIDE), np.float32)
    axis = np.arange(SIDE, dtype=np.float32)
    for kind in np.unique(texture[texture > 0]):
        own = np.flatnonzero(texture == kind)
        phase = paint.phase[rows[own]]
        x = axis[None, None, :] + phase[:, 0, None, None]
        y = axis[None, :, None] + phase[:, 1, None, None]
        period = paint.period[rows[own], None, None]
        share[own] = _texture(TEXTURES[kind], x, y, period, noise[own, 0])
    return second + (first - second) * share[:, None]


def _things(canvas: Array, things: Things, noise: Array) -> None:
    """Draw one layer into (N, 3, H, W)."""
    axis = np.arange(SIDE, dtype=np.float32)
    mask = np.empty((len(things.image), SIDE, SIDE), np.float32)
    for kind in np.unique(things.shape):
        own = np.flatnonzero(things.shape == kind)
        size = things.size[own, None, None]
        x = (axis[None, None, :] - things.centre[own, 0, None, None]) / size
        y = (axis[None, :, None] - things.centre[own, 1, None, None]) / size
        cos, sin = (f(things.angle[own])[:, None, None] for f in (functions.cos, functions.sin))
        edge = _shape(SHAPES[kind], cos * x + sin * y, cos * y - sin * x) * size
        line = things.outline[own, None, None]
        edge = np.where(line > 0, np.abs(edge) - line / 2, edge)
        mask[own] = np.clip(0.5 - edge, 0, 1)
    colours = _colours(things.paint, np.arange(len(mask)), noise[things.image])
    under = canvas[things.image]
    canvas[things.image] = under + (colours - under) * mask[:, None]


def _write(canvas: Array, ink: Ink) -> None:
    """Write glyphs into (N, 3, H, W)."""
    starts, ends = strokes.segments(ink.glyph, ink.variant, ink.jitter)
    turned = np.swapaxes(ink.matrix, 1, 2)
    starts, ends = functions.product(starts, turned), functions.product(ends, turned)
    both = np.concatenate([starts, ends], axis=1)
    low, high = both.min(1), both.max(1)
    # a scan is cropped to its ink: stretched to the full height, centred sideways, never stretched sideways
    middle = (low + high) / 2
    stretch = np.stack([np.ones(len(low), np.float32), 2 * (1 - ink.width) / (high - low)[:, 1]], 1)
    factor = np.where(ink.scan[:, None], stretch, 1)[:, None]
    offset = np.where(ink.scan[:, None], ink.shift * (0.5, 0.0) - middle * stretch, ink.shift)[:, None]
    starts, ends = (starts * factor + offset).astype(np.float32), (ends * factor + offset).astype(np.float32)
    mask = np.empty((len(starts), SIDE, SIDE), np.float32)
    for scan, side in ((True, 2 * SCAN), (False, SIDE)):
        own = np.flatnonzero(ink.scan == scan)
        if not len(own):
            continue
        gap = strokes.distance(starts[own], ends[own], side)
        drawn = np.clip(0.5 + (ink.width[own, None, None] - gap) / ink.soft[own, None, None], 0, 1)
        if scan:
            cells = drawn.reshape(len(own), SCAN, 2, SCAN, 2).mean((2, 4))
            drawn = enlarge(np.round(cells * 16) / 16)
        mask[own] = drawn
    under = canvas[ink.image]
    canvas[ink.image] = under + (ink.colour[:, :, None, None] - under) * mask[:, None]


def render(scenes: Scenes, noise: Array) -> NDArray[np.uint8]:
    """Draw N scenes.

    Args:
        scenes: what to draw.
        noise: (N, 3, 32, 32) uniform in [0, 1): grain, and the pattern of `speckles`.

    Returns:
        (N, 32, 32, 3) uint8, RGB.
    """
    total = len(scenes.grain)
    canvas = np.empty((total, 3, SIDE, SIDE), np.float32)
    canvas[:] = _colours(scenes.ground, np.arange(total), noise)
    for things in scenes.layers:
        if len(things.image):
            _things(canvas, things, noise)
    if len(scenes.ink.image):
        _write(canvas, scenes.ink)
    canvas *= scenes.contrast[:, None, None, None]
    canvas += ((1 - scenes.contrast) * scenes.pivot)[:, None, None, None]
    canvas += (noise - 0.5) * scenes.grain[:, None, None, None]
    pixels = np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
