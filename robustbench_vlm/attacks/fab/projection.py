"""Projection onto a hyperplane within the box, exact and without a sort; FAB needs two in each iteration.

Croce & Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack" (ICML 2020),
section 3.1: min ||d||_p subject to <w, t + d> = b and t + d in [0, 1]^n. Every entry moves towards the bound
at which <w, .> falls (or rises, if it must rise); gap_i is the distance to that bound. The solutions are

    Linf: |d_i| = min(m, gap_i);   L2: |d_i| = |w_i| min(m, gap_i / |w_i|);
    L1:   |d_i| = gap_i where |w_i| > s, a share of gap_i where |w_i| = s, else 0.

For Linf and L2 the multiplier m solves sum_i c_i min(m, r_i) = total, which is concave and piecewise linear
in m, by Newton's method: a correction from anywhere ends at the root or below it, and at the root if no r_i
lies in between. For L1 the threshold s is found by bisection over the float32 numbers. If the box does not
reach the hyperplane, all entries go to their bound. Rows never mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLAT = 1e-8  # entries of a normal vector below this count as zero, except for Linf
CLOSE = 2.0**-21  # relative error that a sum in float32 may have
HUGE = 1e30  # stands for an infinite multiplier in finite arithmetic
CORRECTIONS = 3  # where reading the device would wait; enough for moves of half of what the box allows
MOST = 64  # corrections of a row that is solved by itself; 17 were seen, at 0.9999 of what the box allows
BITS = 31  # a positive float32 without its sign bit: so many halvings find it


@dataclass(frozen=True)
class Moves:
    """Shortest moves from P points of each of S rows to that row's hyperplane.

    Entry i of a move is `turn * sign(w_i) * reach_i`.

    Attributes:
        reach: (P, S, d) how far each entry goes; without meaning where w is zero.
        turn: (P, S) 1 where <w, .> must rise, else -1.
        lengths: (P, S) norms of the moves.
        eased: (P, S) the multiplier divided by its lower bound, a start for a similar search.
    """

    reach: Tensor
    turn: Tensor
    lengths: Tensor
    eased: Tensor


@dataclass(frozen=True)
class Hyperplanes:
    """A hyperplane {z: <w, z> = b} for each of S rows.

    Attributes:
        norm: `linf`, `l2` or `l1`, the norm of moves that is minimised.
        signs: (S, d) signs of w.
        sizes: (S, d) |w|, 0 where an entry counts as zero.
    """

    norm: str
    signs: Tensor
    sizes: Tensor

    @staticmethod
    def of(normals: Tensor, norm: str) -> Hyperplanes:
        """The hyperplanes with normal vectors w (S, d)."""
        sizes = normals.abs()
        if norm != "linf":
            torch.hardshrink(sizes, FLAT, out=sizes)
        return Hyperplanes(norm, normals.sign(), sizes)

    def moves(self, points: Sequence[Tensor], falls: Tensor, eased: Tensor) -> Moves:
        """The shortest moves within the box by which <w, .> falls by `falls`.

        Args:
            points: P tensors (S, d) in [0, 1].
            falls: (P, S) <w, point> - b; negative means that <w, .> must rise.
            eased: (P, S) at least 1, start of the search; it changes the number of corrections and last bits.
        """
        turn, total = torch.where(falls < 0, 1.0, -1.0), falls.abs()
        gaps = self._gaps(points, turn)
        if self.norm == "l1":
            reach = gaps.mul_(shares(self.sizes, gaps, total))
            return Moves(reach, turn, reach.sum(-1), eased)
        weights, breaks = self.sizes, gaps
        if self.norm == "l2":
            weights, breaks = self.sizes.square(), gaps.div_(self.sizes.clamp(min=FLAT))
        # the multiplier if no entry met its bound
        lower = (total / weights.sum(1)).nan_to_num_(nan=0.0, posinf=HUGE).clamp_(max=HUGE)
        m = multiplier(weights, breaks, total, lower, lower * eased)
        eased = (m / lower).nan_to_num_(nan=1.0, posinf=1.0).clamp_(min=1)
        reach = torch.minimum(breaks, m[..., None], out=breaks)
        if self.norm == "linf":
            return Moves(reach, turn, m, eased)
        reach.mul_(self.sizes)
        return Moves(reach, turn, torch.linalg.vector_norm(reach, dim=-1), eased)

    def _gaps(self, points: Sequence[Tensor], turn: Tensor) -> Tensor:
        """(P, S, d) distance of each entry to the bound towards which it moves: 1 if it must grow, else 0."""
        gaps = torch.eq(
            self.signs, turn[..., None], out=self.sizes.new_empty(*turn.shape, self.sizes.shape[1])
        )
        for gap, point in zip(gaps, points, strict=True):
            gap.sub_(point)
        return gaps.abs_()


def multiplier(weights: Tensor, breaks: Tensor, total: Tensor, lower: Tensor, guess: Tensor) -> Tensor:
    """(P, S) the m with sum_i c_i min(m, r_i) = total; the largest r_i with c_i > 0 if no m is enough.

    On the CPU the result is exact to float32: rows that one correction does not solve, usually none, are
    solved by themselves. On other devices there are CORRECTIONS corrections, and the device is not read. A
    row that needs more gets an m below its root, so its move is valid but ends before the hyperplane.

    Args:
        weights: (S, d) c >= 0.
        breaks: (P, S, d) r >= 0.
        total: (P, S) >= 0.
        lower: (P, S) total / sum_i c_i.
        guess: (P, S) start.
    """
    if breaks.device.type != "cpu":
        return newton(weights, breaks, total, lower, guess, CORRECTIONS)
    work = torch.empty_like(breaks)
    m = _corrected(weights, breaks, total, guess, lower, torch.full_like(lower, HUGE), work)
    rest = total - torch.minimum(breaks, m[..., None], out=work).mul_(weights).sum(-1)
    rows = (rest.abs() > CLOSE * total).nonzero(as_tuple=True)
    if len(rows[0]):
        m[rows] = newton(weights[rows[1]], breaks[rows], total[rows], lower[rows], m[rows], MOST)
    return m


def newton(
    weights: Tensor, breaks: Tensor, total: Tensor, lower: Tensor, m: Tensor, corrections: int
) -> Tensor:
    """`multiplier` from `m` by `corrections` corrections; on the CPU fewer if all rows are solved before."""
    work = torch.empty_like(breaks)
    most = torch.mul(weights.sign(), breaks, out=work).amax(-1)
    for _ in range(corrections):
        before, m = m, _corrected(weights, breaks, total, m, lower, most, work)
        if m.device.type == "cpu" and torch.equal(m, before):
            break
    return m


def _corrected(
    weights: Tensor, breaks: Tensor, total: Tensor, m: Tensor, lower: Tensor, most: Tensor, work: Tensor
) -> Tensor:
    """One step of Newton's method; an m that is equal to the root in float32 does not change."""
    # Comparisons are written as 0 and 1 into `work`: selecting by a random mask costs several times more.
    slope = torch.gt(breaks, m[..., None], out=work).mul_(weights).sum(-1)
    rest = total - torch.minimum(breaks, m[..., None], out=work).mul_(weights).sum(-1)
    flat = torch.where(rest > 0, most, lower)
    better = torch.where(slope > 0, m + rest / slope, flat).maximum(lower).minimum(most)
    return torch.where(rest.abs() > CLOSE * total, better, m)


def shares(sizes: Tensor, gaps: Tensor, total: Tensor) -> Tensor:
    """(P, S, d) the share of its gap that each entry goes in L1: 1 above a threshold, 0 below, equal at it.

    Args:
        sizes: (S, d) |w|, 0 or above FLAT.
        gaps: (P, S, d) >= 0.
        total: (P, S) wanted value of sum_i |w_i| gap_i share_i.
    """
    filled = sizes * gaps
    work = torch.empty_like(filled)

    def above(threshold: Tensor) -> Tensor:
        return torch.gt(sizes, threshold[..., None], out=work).mul_(filled).sum(-1)

    # Positive floats have the order of their bits, read as integers.
    high = sizes.amax(1).view(torch.int32).expand(total.shape)
    low = torch.full_like(total, FLAT).view(torch.int32)
    for _ in range(BITS):
        middle = low + (high - low) // 2
        over = above(middle.view(torch.float32)) > total
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    threshold = high.contiguous().view(torch.float32)
    rest = total - above(threshold)
    at = torch.eq(sizes, threshold[..., None], out=work)
    share = (rest / (at * filled).sum(-1)).nan_to_num_(nan=0.0, posinf=0.0).clamp_(0, 1)
    return at.mul_(share[..., None]).add_(torch.gt(sizes, threshold[..., None]))
