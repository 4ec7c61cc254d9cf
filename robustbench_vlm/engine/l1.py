"""The nearest point of the L1 ball within the box, exact and without a sort.

Duchi et al., "Efficient projections onto the l1-ball for learning in high dimensions" (ICML 2008), with the
box of Croce & Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers" (ICML 2021).
Of a change v every entry keeps its sign and

    |d_i| = min(max(|v_i| - m, 0), way_i),

way_i being how far entry i may go in its direction, and m >= 0 the smallest with sum_i |d_i| <= radius.
That sum falls as m grows, so m is found by bisection over the float32 numbers, always as many steps; then the
linear piece on which it lies is solved in float64. Rows never mix, and nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 31  # of a positive float32


def onto(delta: Tensor, images: Tensor, radius: Tensor | float) -> Tensor:
    """The image nearest to `images + delta` in ball and box.

    Args:
        delta: (S, 3, H, W) float32.
        images: (S, 3, H, W) in [0, 1], the centres.
        radius: one, or (S,) float32.

    Returns:
        (S, 3, H, W) in [0, 1].
    """
    v, centre = delta.flatten(1), images.flatten(1)
    return _changed(v, centre, _back(v, centre, radius)).view_as(images)


def onto_counted(delta: Tensor, images: Tensor, radius: Tensor | float) -> tuple[Tensor, Tensor]:
    """As `onto`; also (S,) float32 how many entries the released code would count as changed.

    That code adds a correction to `images + delta`, so an entry that is to come back to where it was can miss
    it by a rounding, and l1-APGD there goes by the count of such entries too. Here they come back exactly,
    since many of them would leave the ball.
    """
    v, centre = delta.flatten(1), images.flatten(1)
    back = _back(v, centre, radius)
    counted = ((centre + v).sub_(back * v.sign()) != centre).sum(1).float()
    return _changed(v, centre, back).view_as(images), counted


def _back(v: Tensor, centre: Tensor, radius: Tensor | float) -> Tensor:
    """(S, d) by how much each entry of v must shrink."""
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
        beyond: (S, d) by how much |v| exceeds the way to the box, at least 0.
        radius: one, or (S,).
    """
    work, reach = torch.empty_like(size), size - beyond

    def left(m: Tensor) -> Tensor:
        torch.sub(size, m[:, None], out=work).clamp_(min=0)
        return torch.minimum(work, reach, out=work).sum(1)

    # positive floats are ordered as their bits are
    high = size.amax(1).view(torch.int32)
    low = torch.zeros_like(high)
    for _ in range(BITS):
        middle = low + (high - low) // 2
        over = left(middle.view(torch.float32)) > radius
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    m = high.contiguous().view(torch.float32)
    # on this piece the sum is (free entries' |v|) - (their number) m + (ways of those at the box)
    bound, free = beyond >= m[:, None], (size > m[:, None]) & (beyond < m[:, None])
    total = (size * free + reach * bound).sum(1, dtype=torch.float64)
    count = free.sum(1)
    exact = ((total - radius) / count.clamp(min=1)).float()
    m = torch.where(count > 0, exact.clamp(min=0), m)
    return torch.where(left(torch.zeros_like(m)) <= radius, 0.0, m)
