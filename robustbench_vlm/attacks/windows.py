"""Windows and patterns of the Square attack: masks by comparison, so nothing waits for an offset."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor


def window_masks(corner: Tensor, size: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows (S, H) and columns (S, W) of the window at `corner` (S, 2) of side `size` (S,): 1 if inside."""
    found = []
    for axis, extent in enumerate(shape):
        place = torch.arange(extent, device=corner.device) - corner[:, axis : axis + 1]
        found.append(((place >= 0) & (place < size[:, None])).float())
    return found[0], found[1]


def inside(corner: Tensor, size: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(S, H, W) 1 in the window at `corner` and 0 elsewhere."""
    rows, columns = window_masks(corner, size, shape)
    return rows[:, :, None] * columns[:, None, :]


def pyramid(height: int, width: int) -> np.ndarray:
    """(height, width) float64 of unit L2 norm: steps 1/(q+1)^2 on growing squares around the centre."""
    steps = np.zeros((height, width))
    row, column = height // 2, width // 2
    for q in range(max(row, column) + 1):
        steps[max(row - q, 0) : row + q + 1, max(column - q, 0) : column + q + 1] += 1 / (q + 1) ** 2
    unit: np.ndarray = steps / np.linalg.norm(steps)
    return unit


def eta(side: int) -> np.ndarray:
    """(side, side) float64 of unit L2 norm: a pyramid in the upper half, its negative below."""
    half = side // 2
    upper = pyramid(half, side) if half else np.zeros((0, side))
    pattern = np.concatenate([upper, -pyramid(side - half, side)])
    unit: np.ndarray = pattern / np.linalg.norm(pattern)
    return unit


@cache
def pyramids(shape: tuple[int, int], device: torch.device) -> Tensor:
    """(n + 1, n, n) float32, `eta` of every side up to n = min(H, W) in the upper left corner."""
    most = min(shape)
    found = np.zeros((most + 1, most, most), dtype=np.float32)
    for side in range(1, most + 1):
        found[side, :side, :side] = eta(side)
    return torch.from_numpy(found).to(device)


def centred(patterns: Tensor, corner: Tensor, size: Tensor, turn: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(S, H, W) the pattern of each row's size at its corner, transposed where `turn` (S,) is 1.

    Outside the window the values mean nothing.
    """
    last = patterns.shape[-1] - 1
    down = (torch.arange(shape[0], device=corner.device) - corner[:, :1]).clamp(0, last)[:, :, None]
    along = (torch.arange(shape[1], device=corner.device) - corner[:, 1:]).clamp(0, last)[:, None, :]
    turned = turn.bool()[:, None, None]
    return patterns[size[:, None, None], torch.where(turned, along, down), torch.where(turned, down, along)]


def tiles(noise: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Square's L2 start: 5 x 5 tiles of `eta` with random signs and turns, of unit L2 norm in all."""
    channels, height, width = shape
    side = max(min(height, width) // 5, 1)
    found = np.zeros(shape)
    for top in range((height - 5 * side) // 2, height - side + 1, side):
        for left in range((width - 5 * side) // 2, width - side + 1, side):
            pattern = eta(side)
            pattern = pattern.T if noise.integers(0, 2) else pattern
            signs = noise.integers(0, 2, (channels, 1, 1)) * 2 - 1
            found[:, top : top + side, left : left + side] += pattern * signs
    return (found / np.linalg.norm(found)).astype(np.float32)
