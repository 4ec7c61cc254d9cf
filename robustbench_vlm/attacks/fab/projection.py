"""The shortest way to a hyperplane within the box, exact and without a sort: FAB goes it twice an iteration.

Croce & Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack" (ICML 2020),
section 3.1: min ||d||_p subject to <w, t + d> = b and t + d in [0, 1]^n. Every entry moves towards the bound
at which <w, .> falls (or rises, if it must); way_i is how far that is. The solutions are

    Linf: |d_i| = min(m, way_i);   L2: |d_i| = |w_i| min(m, way_i / |w_i|);
    L1:   |d_i| = way_i where |w_i| > s, a share of way_i where |w_i| = s, else 0.

For Linf and L2 the multiplier m solves sum_i c_i min(m, r_i) = total, which is concave and piecewise linear
in m, by Newton's method: a correction from anywhere ends at the root or short of it, and at the root once no
r_i lies in between. For L1 the threshold s is found by bisection over the float32 numbers. Where the box does
not reach the hyperplane, all entries go to their bound. Rows never mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLAT = 1e-8  # below this an entry of a normal vector is no direction, except for Linf
CLOSE = 2.0**-21  # share of its goal by which a sum in float32 may miss it
HUGE = 1e30  # an infinite multiplier that can be computed with
CORRECTIONS = 6  # on devices that must not be asked for more: settles moves of half of what the box allows
MOST = 64  # of a row that is solved by itself; 17 were ever seen, at 0.9999 of what the box allows
BITS = 31  # of a positive float32


@dataclass(frozen=True)
class Moves:
    """Shortest moves from P points of each of S rows to that row's hyperplane.

    Entry i of a move is `turn * sign(w_i) * reach_i`.

    Attributes:
        reach: (P, S, d) how far each entry goes; means nothing where w is zero.
        turn: (P, S) 1 where <w, .> must rise, else -1.
        lengths: (P, S) norms of the moves.
        eased: (P, S) the multiplier over its lower bound, from which a similar search may start.
    """

    reach: Tensor
    turn: Tensor
    lengths: Tensor
    eased: Tensor


@dataclass(frozen=True)
class Hyperplanes:
    """A hyperplane {z: <w, z> = b} for each of S rows.

    Attributes:
        norm: `linf`, `l2` or `l1`, in which moves are shortest.
        signs: (S, d) of w.
        sizes: (S, d) |w|, 0 where w is no direction.
    """

    norm: str
    signs: Tensor
    sizes: Tensor

    @staticmethod
    def of(normals: Tensor, norm: str) -> Hyperplanes:
        """Those with normal vectors w (S, d)."""
        sizes = normals.abs()
        if norm != "linf":
            torch.hardshrink(sizes, FLAT, out=sizes)
        return Hyperplanes(norm, normals.sign(), sizes)

    def moves(self, points: Sequence[Tensor], falls: Tensor, eased: Tensor) -> Moves:
        """The shortest moves within the box by which <w, .> falls by `falls`.

        Args:
            points: P tensors (S, d) in [0, 1].
            falls: (P, S) <w, point> - b; negative means that <w, .> must rise.
            eased: (P, S) at least 1, where the search starts; changes its length and the last bits.
        """
        turn, total = torch.where(falls < 0, 1.0, -1.0), falls.abs()
        ways = self._ways(points, turn)
        if self.norm == "l1":
            reach = ways.mul_(shares(self.sizes, ways, total))
            return Moves(reach, turn, reach.sum(-1), eased)
        weights, breaks = self.sizes, ways
        if self.norm == "l2":
            weights, breaks = self.sizes.square(), ways.div_(self.sizes.clamp(min=FLAT))
        # what m would be if no entry met its bound
        lower = (total / weights.sum(1)).nan_to_num_(nan=0.0, posinf=HUGE).clamp_(max=HUGE)
        m = multiplier(weights, breaks, total, lower, lower * eased)
        eased = (m / lower).nan_to_num_(nan=1.0, posinf=1.0).clamp_(min=1)
        reach = torch.minimum(breaks, m[..., None], out=breaks)
        if self.norm == "linf":
            return Moves(reach, turn, m, eased)
        reach.mul_(self.sizes)
        return Moves(reach, turn, torch.linalg.vector_norm(reach, dim=-1), eased)

    def _ways(self, points: Sequence[Tensor], turn: Tensor) -> Tensor:
        """(P, S, d) from each entry to the bound that it moves to: 1 where it must grow, else 0."""
        ways = torch.eq(
            self.signs, turn[..., None], out=self.sizes.new_empty(*turn.shape, self.sizes.shape[1])
        )
        for way, point in zip(ways, points, strict=True):
            way.sub_(point)
        return ways.abs_()


def multiplier(weights: Tensor, breaks: Tensor, total: Tensor, lower: Tensor, guess: Tensor) -> Tensor:
    """(P, S) the m with sum_i c_i min(m, r_i) = total; the largest r_i that counts where none is enough.

    On the CPU exact to float32: rows that one correction does not settle, usually none, are solved by
    themselves. Elsewhere CORRECTIONS corrections, and no look at the device; a row that would need more keeps
    an m below its root, so its move is a valid one that ends short of the hyperplane.

    Args:
        weights: (S, d) c >= 0.
        breaks: (P, S, d) r >= 0.
        total: (P, S) >= 0.
        lower: (P, S) total / sum_i c_i.
        guess: (P, S) where to start.
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
    """`multiplier` from `m` by so many corrections, fewer if the CPU sees that all rows are settled."""
    work = torch.empty_like(breaks)
    most = torch.mul(torch.gt(weights, 0), breaks, out=work).amax(-1)
    for _ in range(corrections):
        before, m = m, _corrected(weights, breaks, total, m, lower, most, work)
        if m.device.type == "cpu" and torch.equal(m, before):
            break
    return m


def _corrected(
    weights: Tensor, breaks: Tensor, total: Tensor, m: Tensor, lower: Tensor, most: Tensor, work: Tensor
) -> Tensor:
    """One step of Newton's method; an m that float32 cannot tell from the root stays."""
    # comparisons written as 0 and 1 into memory at hand: selecting by a random mask costs several times more
    slope = torch.gt(breaks, m[..., None], out=work).mul_(weights).sum(-1)
    rest = total - torch.minimum(breaks, m[..., None], out=work).mul_(weights).sum(-1)
    flat = torch.where(rest > 0, most, lower)
    better = torch.where(slope > 0, m + rest / slope, flat).maximum(lower).minimum(most)
    return torch.where(rest.abs() > CLOSE * total, better, m)


def shares(sizes: Tensor, ways: Tensor, total: Tensor) -> Tensor:
    """(P, S, d) the share of its way that each entry goes in L1: 1 above a threshold, 0 below, equal at it.

    Args:
        sizes: (S, d) |w|, 0 or above FLAT.
        ways: (P, S, d) >= 0.
        total: (P, S) what sum_i |w_i| way_i share_i shall be.
    """
    filled = sizes * ways
    work = torch.empty_like(filled)

    def above(threshold: Tensor) -> Tensor:
        return torch.gt(sizes, threshold[..., None], out=work).mul_(filled).sum(-1)

    # positive floats are ordered as their bits are
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
