"""Windows and patterns of Square, for rows whose windows differ, without waiting for the device."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from robustbench_vlm.engine import geometry, l1
from robustbench_vlm.engine.row_ops import spread

POWER = {"l2": 2, "l1": 4}  # exponent by which the steps of a pyramid fall
INNER = 1 - 1e-6  # L1 projects onto this share of the radius, as the reference does


def moved_window(
    best: Tensor, lower: Tensor, upper: Tensor, corner: Tensor, side: Tensor, move: Tensor, out: Tensor | None
) -> Tensor:
    """Linf: a window of every row moved up or down a channel, within ball and box.

    Args:
        best: (S, C, H, W) points in which windows are moved.
        lower: (S, C, H, W) lower limit of each pixel.
        upper: (S, C, H, W) upper limit of each pixel.
        corner: (S, 2) integers, top and left of each window.
        side: (S,) integers.
        move: (S, C) what is added to each channel.
        out: (S, C, H, W) memory for the result; its own if None.
    """
    height, width = best.shape[2:]
    offset = torch.arange(max(height, width), dtype=corner.dtype, device=best.device) - corner[:, :, None]
    inside = ((offset >= 0) & (offset < side[:, None, None])).to(best.dtype)
    down = move[:, :, None, None] * inside[:, 0, None, :height, None]
    # A product with 0 or 1 is exact, so the fused operation gives the bits of a product and a sum.
    return torch.addcmul(best, down, inside[:, 1, None, None, :width], out=out).clamp_(lower, upper)


def l2_proposal(best: Tensor, images: Tensor, proposal: Tensor, side: Tensor, eps: float) -> Tensor:
    """L2: the mass of one window is moved into another as a pyramid, and the change is scaled to the radius.

    Args:
        best: (S, C, H, W) points in which mass is moved.
        images: (S, C, H, W).
        proposal: (S, 4 + C + 1) int64: top and left of two windows, a sign a channel, turn.
        side: (S,) of both windows.
        eps: radius.
    """
    channels, shape = images.shape[1], (int(images.shape[2]), int(images.shape[3]))
    first, second = proposal[:, :2], proposal[:, 2:4]
    signs, turn = proposal[:, 4 : 4 + channels].to(best.dtype), proposal[:, -1]
    into, out_of = inside(first, side, shape)[:, None], inside(second, side, shape)[:, None]
    delta = best - images

    present = delta * into
    new = centred(pyramids(shape, best.device), first, side, turn, shape)[:, None] * signs[:, :, None, None]
    new = new + present / (present.square().sum((2, 3), keepdim=True).sqrt() + geometry.TINY)
    new = new * into
    new = new / (new.square().sum((2, 3), keepdim=True).sqrt() + geometry.TINY)

    # Where both windows are empty, `spare` is all the mass there is, and the root of a rounding error is not
    # small. So norm and radius are squared in the way of the reference.
    norm = delta.square().flatten(1).sum(1).sqrt()
    spare = (torch.full_like(norm, eps).square() - norm.square()).clamp(min=0) / channels
    union = torch.maximum(into, out_of)
    mass = (delta.square() * union).sum((2, 3), keepdim=True)
    new = new * (spread(spare, mass) + mass).sqrt()
    delta = torch.where(into > 0, new, delta * (1 - out_of))
    scale = eps / (geometry.length(delta) + geometry.TINY)
    return delta.mul_(spread(scale, delta)).add_(images).clamp_(0, 1)


def l1_proposal(best: Tensor, images: Tensor, proposal: Tensor, side: Tensor, eps: float) -> Tensor:
    """L1: the mass of one window is moved into another as a pyramid, and the point is projected.

    The arguments are those of `l2_proposal`.
    """
    channels, shape = images.shape[1], (int(images.shape[2]), int(images.shape[3]))
    first, second = proposal[:, :2], proposal[:, 2:4]
    signs, turn = proposal[:, 4 : 4 + channels].to(best.dtype), proposal[:, -1]
    into, out_of = inside(first, side, shape)[:, None], inside(second, side, shape)[:, None]
    delta = best - images

    present = delta * into
    patterns = pyramids(shape, best.device, "l1")
    new = centred(patterns, first, side, turn, shape)[:, None] * signs[:, :, None, None]
    new = new + present / (_mass(present) + geometry.TINY)
    new = new * into
    new = new / (_mass(new) + geometry.TINY)

    spare = (eps - geometry.distance(delta.flatten(1), "l1")).clamp(min=0) / channels
    mass = _mass(delta * torch.maximum(into, out_of))
    new = new * ((spread(spare, mass) + mass) * channels)
    delta = torch.where(into > 0, new, delta * (1 - out_of))
    return l1.onto(delta, images, eps * INNER)


def l1_start(images: Tensor, first: Tensor, eps: float) -> Tensor:
    """L1: images (S, C, H, W) changed by the `tiles` in `first` (S, C, H, W), projected onto ball and box."""
    return l1.onto(first, images, eps * INNER)


def _mass(delta: Tensor) -> Tensor:
    """(S, C, 1, 1) L1 norm of each channel."""
    return delta.abs().sum((2, 3), keepdim=True)


def window_masks(corner: Tensor, size: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(S, H) and (S, W): 1 for the rows and columns of the window at `corner` (S, 2) of side `size` (S,)."""
    found = []
    for axis, extent in enumerate(shape):
        offset = torch.arange(extent, device=corner.device) - corner[:, axis : axis + 1]
        found.append(((offset >= 0) & (offset < size[:, None])).float())
    return found[0], found[1]


def inside(corner: Tensor, size: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(S, H, W) 1 in the window at `corner` and 0 elsewhere."""
    rows, columns = window_masks(corner, size, shape)
    return rows[:, :, None] * columns[:, None, :]


def pyramid(height: int, width: int, norm: str = "l2") -> np.ndarray:
    """(height, width) float64 of unit norm: the sum of growing squares around the centre.

    Square q has the height 1/(q+1)^2 for L2 and 1/(q+1)^4 for L1.
    """
    steps = np.zeros((height, width))
    row, column = height // 2, width // 2
    for q in range(max(row, column) + 1):
        steps[max(row - q, 0) : row + q + 1, max(column - q, 0) : column + q + 1] += (
            1 / (q + 1) ** POWER[norm]
        )
    return _unit(steps, norm)


@cache
def eta(side: int, norm: str = "l2") -> np.ndarray:
    """(side, side) float64 of unit norm: a pyramid in the upper half, its negative below."""
    half = side // 2
    upper = pyramid(half, side, norm) if half else np.zeros((0, side))
    return _unit(np.concatenate([upper, -pyramid(side - half, side, norm)]), norm)


def _unit(pattern: np.ndarray, norm: str) -> np.ndarray:
    size = np.abs(pattern).sum() if norm == "l1" else np.linalg.norm(pattern)
    unit: np.ndarray = pattern / size
    return unit


@cache
def pyramids(shape: tuple[int, int], device: torch.device, norm: str = "l2") -> Tensor:
    """(n + 1, n, n) float32: `eta` of every side up to n = min(H, W), in the upper left corner."""
    most = min(shape)
    found = np.zeros((most + 1, most, most), dtype=np.float32)
    for side in range(1, most + 1):
        found[side, :side, :side] = eta(side, norm)
    return torch.from_numpy(found).to(device)


def centred(patterns: Tensor, corner: Tensor, size: Tensor, turn: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(S, H, W) the pattern of each row's size at its corner, transposed where `turn` (S,) is 1.

    Values outside the window have no meaning.
    """
    last = patterns.shape[-1] - 1
    down = (torch.arange(shape[0], device=corner.device) - corner[:, :1]).clamp(0, last)[:, :, None]
    along = (torch.arange(shape[1], device=corner.device) - corner[:, 1:]).clamp(0, last)[:, None, :]
    turned = turn.bool()[:, None, None]
    return patterns[size[:, None, None], torch.where(turned, along, down), torch.where(turned, down, along)]


def tiles(noise: np.random.Generator, shape: tuple[int, ...], norm: str = "l2") -> np.ndarray:
    """Start of Square in L2 and L1: 5 x 5 tiles of `eta` with random signs and turns; unit norm for L2."""
    channels, height, width = shape
    side = max(min(height, width) // 5, 1)
    # An image with a side below 5 has fewer than 5 tiles along it.
    down = range(max((height - 5 * side) // 2, 0), height - side + 1, side)
    along = range(max((width - 5 * side) // 2, 0), width - side + 1, side)
    # Drawn tile by tile, turn before signs: the order is part of what a name's stream gives.
    drawn = [(noise.integers(0, 2), noise.integers(0, 2, channels)) for _ in range(len(down) * len(along))]
    turns = np.array([turn for turn, _ in drawn])
    signs = np.array([sign for _, sign in drawn]) * 2 - 1
    pattern = eta(side, norm)
    blocks = signs[:, :, None, None] * np.stack([pattern, pattern.T])[turns][:, None]
    blocks = blocks.reshape(len(down), len(along), channels, side, side).transpose(2, 0, 3, 1, 4)
    found = np.zeros(shape)
    inner = blocks.reshape(channels, len(down) * side, len(along) * side)
    found[:, down[0] : down[0] + inner.shape[1], along[0] : along[0] + inner.shape[2]] = inner
    return (found if norm == "l1" else found / np.linalg.norm(found)).astype(np.float32)
