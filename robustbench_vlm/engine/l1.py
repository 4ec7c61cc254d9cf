"""Projection onto the intersection of L1 ball and box, exact and without a sort.

Duchi et al., "Efficient projections onto the l1-ball for learning in high dimensions" (ICML 2008), with the
box of Croce & Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers" (ICML 2021).
A change v is projected to d, whose entries have the signs of v and

    |d_i| = min(max(|v_i| - m, 0), gap_i),

where gap_i is how far entry i may go in its direction within the box, and m >= 0 is the smallest number with
sum_i |d_i| <= radius. That sum is convex, piecewise linear and falling in m. Newton's method, kept between
two numbers of which one is too small and one is not, finds the linear piece that contains m; the piece is
then solved in float64. In float32 the computed sum falls as well, whatever its rounding. So there is one
float32 number at which it comes down to the radius, and any search that ends at its piece ends with the same
bits: here those of a bisection over all float32 numbers. Rows never mix.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLOSE = 2.0**-21  # relative error that a sum in float32 may have
PROBES = 12  # steps of the search where asking whether it has ended would wait for the device
MOST = 8 * 31  # steps on a CPU: every eighth halves what is left of the 31 bits of a positive number


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
    moved = (centre + v).sub_(back * v.sign())
    counted = torch.ne(moved, centre, out=moved).sum(1)
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

    On the CPU m is exact to float32. On other devices a row whose piece is not found in PROBES steps gets a
    larger m, so that its point lies inside the ball.

    Args:
        size: (S, d) |v|.
        beyond: (S, d) by how much |v| exceeds the gap within the box, at least 0.
        radius: a number, or (S,).
    """
    reach, work = size - beyond, torch.empty_like(size)
    limit = radius if isinstance(radius, Tensor) else size.new_full((len(size),), radius)
    none, on_cpu = torch.zeros_like(limit), size.device.type == "cpu"

    def at(m: Tensor) -> Tensor:
        """(4, S) m, by how much the sum exceeds the limit, and how many of |v| and of `beyond` exceed m."""
        column = m[:, None]
        torch.clamp(torch.sub(size, column, out=work), zero, reach, out=work)
        over = work.sum(1).sub_(limit)
        larger = [torch.gt(values, column, out=work).sum(1) for values in (size, beyond)]
        return torch.stack([m, over, *larger])

    # The sum at `low` exceeds the limit, and at `high` it does not. A row that is inside at m = 0 is settled.
    zero = none.new_zeros(())
    low, high = at(none), torch.stack([size.amax(1), -limit, none, none])
    inside = settled = ~(low[1] > 0)
    for number in range(MOST if on_cpu else PROBES):
        if on_cpu and bool(settled.all()):
            break
        found = at(_between(low, high, CLOSE * limit, middle=number % 8 == 7))
        small = found[1] > 0
        low, high = torch.where(small, found, low), torch.where(small, high, found)
        # Settled: all numbers above `low` up to `high` are on one piece, or `high` is the only one.
        neighbours = high[0].view(torch.int32) - low[0].view(torch.int32) <= 1
        settled = (low[2:] == high[2:]).all(0) | neighbours | inside
    m = high[0]
    # On this piece the sum is sum |v| of free entries - (their number) m + sum of gap of entries at the box.
    free = torch.gt(size, m[:, None], out=torch.empty_like(size)).mul_(torch.lt(beyond, m[:, None], out=work))
    entries = free.sum(1)
    bound = torch.ge(beyond, m[:, None], out=work)
    total = free.mul_(size).add_(bound.mul_(reach)).sum(1, dtype=torch.float64)
    exact = ((total - radius) / entries.clamp(min=1)).float()
    return torch.where(inside, 0.0, torch.where((entries > 0) & settled, exact.clamp(min=0), m))


def _between(low: Tensor, high: Tensor, slack: Tensor, *, middle: bool) -> Tensor:
    """(S,) the number to look at next, for `low` and `high` as in `threshold`.

    Newton's step from `low`, else that from `high`, else the middle. A step goes beyond the root by what the
    sum may be rounded, so that from the right piece it ends at the other side of the root. Positive floats
    have the order of their bits, read as integers; so the middle alone would end after 31 steps.

    Args:
        low: (4, S).
        high: (4, S).
        slack: (S,) by how much the sum may be rounded.
        middle: whether all rows take the middle.
    """
    bits = low[0].view(torch.int32)
    half = (bits + ((high[0].view(torch.int32) - bits) >> 1)).view(torch.float32)
    if middle:
        return half
    (least, most), slopes = (low[0], high[0]), (low[2] - low[3], high[2] - high[3])
    up, down = least + (low[1] + slack) / slopes[0], most + (high[1] - slack) / slopes[1]
    falling = torch.where((down > least) & (down < most), down, half)
    return torch.where((up > least) & (up < most), up, falling)
