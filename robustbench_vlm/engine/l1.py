"""Projection onto the intersection of L1 ball and box, exact and without a sort.

Duchi et al., "Efficient projections onto the l1-ball for learning in high dimensions" (ICML 2008), with the
box of Croce & Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers" (ICML 2021).
A change v is projected to d, whose entries have the signs of v and

    |d_i| = min(max(|v_i| - m, 0), gap_i),

where gap_i is how far entry i may go in its direction within the box, and m >= 0 is the smallest number with
sum_i |d_i| <= radius. That sum falls as m grows, so m is found by a bisection over the float32 numbers with a
fixed number of steps; then the linear piece that contains m is solved in float64. Rows never mix, and nothing
waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 31  # a positive float32 without its sign bit: so many halvings find it


def onto(delta: Tensor, images: Tensor, radius: Tensor | float) -> Tensor:
    """The point of ball and box that is nearest to `images + delta`.

    Args:
        delta: (S, 3, H, W) float32.
        images: (S, 3, H, W) in [0, 1], the centres.
        radius: a number, or (S,) float32.

    Returns:
        (S, 3, H, W) in [0, 1].
    """
    v, centre = delta.flatten(1), images.flatten(1)
    return _changed(v, centre, _back(v, centre, radius)).view_as(images)


def onto_counted(delta: Tensor, images: Tensor, radius: Tensor | float) -> tuple[Tensor, Tensor]:
    """As `onto`; also (S,) float32, the number of entries that the released code would count as changed.

    That code adds a correction to `images + delta`, so an entry that should return to its old value can miss
    it by a rounding, and is counted. Here such entries return exactly, since many of them together would
    leave the ball; but l1-APGD needs the number as that code counts it.
    """
    v, centre = delta.flatten(1), images.flatten(1)
    back = _back(v, centre, radius)
    counted = ((centre + v).sub_(back * v.sign()) != centre).sum(1).float()
    return _changed(v, centre, back).view_as(images), counted


def _back(v: Tensor, centre: Tensor, radius: Tensor | float) -> Tensor:
    """(S, d) by how much the absolute value of each entry of v must fall."""
    size = v.abs()
    beyond = (size - torch.where(v > 0, 1 - centre, centre)).clamp_(min=0)
    m = threshold(size, beyond, radius)
    return torch.maximum(beyond, m[:, None], out=beyond).minimum(size)


def _changed(v: Tensor, centre: Tensor, back: Tensor) -> Tensor:
    return (v.abs() - back).mul_(v.sign()).add_(centre).clamp_(0, 1)


def threshold(size: Tensor, beyond: Tensor, radius: Tensor | float) -> Tensor:
    """(S,) the smallest m >= 0 with sum_i max(|v_i| - max(beyond_i, m), 0) <= radius.

    Args:
        size: (S, d) |v|.
        beyond: (S, d) by how much |v| exceeds the gap within the box, at least 0.
        radius: a number, or (S,).
    """
    work, reach = torch.empty_like(size), size - beyond

    def left(m: Tensor) -> Tensor:
        torch.sub(size, m[:, None], out=work).clamp_(min=0)
        return torch.minimum(work, reach, out=work).sum(1)

    # Positive floats have the order of their bits, read as integers.
    high = size.amax(1).view(torch.int32)
    low = torch.zeros_like(high)
    for _ in range(BITS):
        middle = low + (high - low) // 2
        over = left(middle.view(torch.float32)) > radius
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    m = high.contiguous().view(torch.float32)
    # On this piece the sum is sum |v| of free entries - (their number) m + sum of gap of entries at the box.
    bound, free = beyond >= m[:, None], (size > m[:, None]) & (beyond < m[:, None])
    total = (size * free + reach * bound).sum(1, dtype=torch.float64)
    count = free.sum(1)
    exact = ((total - radius) / count.clamp(min=1)).float()
    m = torch.where(count > 0, exact.clamp(min=0), m)
    return torch.where(left(torch.zeros_like(m)) <= radius, 0.0, m)
