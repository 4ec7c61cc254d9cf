"""Glyphs as ink: jittered polylines, and the distance of every pixel to them. Vectorised over images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from robustbench_vlm.data.tiny import functions
from robustbench_vlm.data.tiny.functions import Array
from robustbench_vlm.data.tiny.glyphs import DIGITS, LETTERS

Index = NDArray[np.intp]

GLYPHS: tuple[str, ...] = (*DIGITS, *LETTERS)
"""Names of all glyphs: the ten digit words, then capital letters."""

SUBDIVISION = 2  # straight pieces between two control points of a curve


@dataclass(frozen=True)
class Sheet:
    """All skeletons as matrices, so a batch of them is one einsum.

    Attributes:
        control: (K, P, 2) control points in [-1, 1], padded by repeating the last one.
        starts, ends: (K, S, P) weights of the control points at both ends of each straight segment;
            missing segments repeat the last one, which changes no distance.
        first: (G,) index of the first skeleton of each glyph; `count`: (G,) how many it has.
    """

    control: Array
    starts: Array
    ends: Array
    first: Index
    count: Index


def _curve(points: int) -> Array:
    """(M, points) weights of a Catmull-Rom curve through `points` control points, end points included."""
    rows = []
    for piece in range(points - 1):
        for step in range(SUBDIVISION):
            t = step / SUBDIVISION
            around = [max(piece - 1, 0), piece, piece + 1, min(piece + 2, points - 1)]
            weights = (
                (-t + 2 * t**2 - t**3) / 2,
                (2 - 5 * t**2 + 3 * t**3) / 2,
                (t + 4 * t**2 - 3 * t**3) / 2,
                (-(t**2) + t**3) / 2,
            )
            row = np.zeros(points, np.float32)
            for index, weight in zip(around, weights, strict=True):
                row[index] += weight
            rows.append(row)
    rows.append(np.eye(points, dtype=np.float32)[-1])
    return np.stack(rows)


def _skeleton(text: str) -> tuple[Array, Array, Array]:
    """One skeleton: control points (P, 2) in [-1, 1], weights of segment starts and ends (S, P)."""
    strokes = [(part.startswith("~"), part.removeprefix("~").split()) for part in text.split("|")]
    control = np.array([(int(p[0]), int(p[1])) for _, points in strokes for p in points], np.float32)
    starts, ends, offset = [], [], 0
    for curved, points in strokes:
        own = _curve(len(points)) if curved else np.eye(len(points), dtype=np.float32)
        weights = np.zeros((len(own), len(control)), np.float32)
        weights[:, offset : offset + len(points)] = own
        starts.append(weights[:-1])
        ends.append(weights[1:])
        offset += len(points)
    return (control - (5.0, 4.5)) / (5.0, 4.5), np.concatenate(starts), np.concatenate(ends)


@cache
def sheet() -> Sheet:
    """Every skeleton of every glyph."""
    texts = [DIGITS.get(name) or LETTERS[name] for name in GLYPHS]
    parts = [_skeleton(text) for skeletons in texts for text in skeletons]
    points = max(len(control) for control, _, _ in parts)
    segments = max(len(starts) for _, starts, _ in parts)

    def pad(array: Array, rows: int) -> Array:
        return np.concatenate([array, np.repeat(array[-1:], rows - len(array), axis=0)])

    def widen(array: Array) -> Array:
        return np.pad(array, ((0, 0), (0, points - array.shape[1])))

    count = np.array([len(skeletons) for skeletons in texts])
    return Sheet(
        control=np.stack([pad(control, points) for control, _, _ in parts]).astype(np.float32),
        starts=np.stack([widen(pad(starts, segments)) for _, starts, _ in parts]),
        ends=np.stack([widen(pad(ends, segments)) for _, _, ends in parts]),
        first=np.concatenate([[0], np.cumsum(count)[:-1]]),
        count=count,
    )


def segments(glyph: Index, variant: Array, jitter: Array) -> tuple[Array, Array]:
    """Both ends of the straight segments of N glyphs, before any affine map.

    Args:
        glyph: (N,) indices into `GLYPHS`.
        variant: (N,) numbers in [0, 1) that choose the skeleton.
        jitter: (N, P', 2) displacements of control points in the same unit; P' at least `sheet()`'s P.

    Returns:
        starts and ends, each (N, S, 2), roughly within [-1, 1].
    """
    every = sheet()
    chosen = every.first[glyph] + (variant * every.count[glyph]).astype(np.intp)
    control = every.control[chosen] + jitter[:, : every.control.shape[1]]
    return functions.product(every.starts[chosen], control), functions.product(every.ends[chosen], control)


def distance(starts: Array, ends: Array, side: int) -> Array:
    """Distance of each pixel centre of a side x side image to the nearest segment.

    Args:
        starts: (N, S, 2) in [-1, 1], the image being the square [-1, 1]^2.
        ends: (N, S, 2) their other ends.
        side: of the image, in pixels.

    Returns:
        (N, side, side) in units of half the image's side.
    """
    axis = (np.arange(side, dtype=np.float32) * 2 + 1) / side - 1
    x, y = axis[None, None, :], axis[None, :, None]
    along = ends - starts
    length2 = np.maximum((along**2).sum(-1), 1e-8)
    nearest = np.full((len(starts), side, side), 9.0, np.float32)
    for s in range(starts.shape[1]):
        ax, ay = (starts[:, s, i, None, None] for i in (0, 1))
        dx, dy = (along[:, s, i, None, None] for i in (0, 1))
        px, py = x - ax, y - ay  # (N, 1, side), (N, side, 1): the projection is separable until clipped
        scale = length2[:, s, None, None]
        t = px * (dx / scale) + py * (dy / scale)
        np.clip(t, 0.0, 1.0, out=t)
        gap = (px - t * dx) ** 2
        gap += (py - t * dy) ** 2
        np.minimum(nearest, gap, out=nearest)
    return np.sqrt(nearest)
