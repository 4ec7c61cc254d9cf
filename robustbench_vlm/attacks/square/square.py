"""Square attack: random search with square-shaped changes; needs logits, not gradients.

Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search" (ECCV
2020), with AutoAttack's settings: margin loss, and the schedule of window sizes not rescaled to the number of
queries. Every image has its own stream of proposals, a function of its name; nothing is drawn in the loop.

Proposals do not depend on outcomes, which is used twice. A proposal that changes nothing cannot be accepted
and is passed over without a query (Linf: about 3 in 100). And idle rows may join a lookahead group that
queries the next proposals of one image at once: the first that is accepted counts, and later ones are
proposed again from there.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from robustbench_vlm.attacks.square import lookahead
from robustbench_vlm.attacks.square.lookahead import Decision, Query, SquareState
from robustbench_vlm.attacks.square.windows import l1_proposal, l1_start, l2_proposal, moved_window, tiles
from robustbench_vlm.engine import geometry, losses
from robustbench_vlm.engine.interface import LookaheadAttack, Rows, initial
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.engine.row_ops import misclassified, pick, spread
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which a window's area is halved


@dataclass(frozen=True)
class Square(LookaheadAttack):
    """Square attack.

    Attributes:
        queries: proposals after the start point, those that change nothing included.
        p: share of the image that each of the first windows covers.
        restarts: trajectories with fresh noise.
    """

    queries: int
    p: float
    restarts: int

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")

    def __post_init__(self) -> None:
        if min(self.queries, self.restarts) < 1 or not 0 < self.p <= 1:
            found = f"queries {self.queries}, restarts {self.restarts}, p {self.p}"
            raise InputError("square", found, "at least 1 query and restart, and p in (0, 1]")

    @property
    def passes(self) -> tuple[int, int]:
        """At most one forward a query and one at the start point; no gradient."""
        return self.queries + 1, 0

    def start(self, rows: Rows, threat: Threat) -> SquareState:
        """Vertical stripes (Linf) or a tiling with pyramids (L2, L1), and all proposals of each row."""
        shape = tuple(rows.images.shape[1:])
        sides = window_sides(self.queries, self.p, shape[1], shape[2], threat.norm)
        side = np.array(sides)
        drawn = [_draw(stream, side, shape, threat.norm) for stream in rows.noise.streams()]
        begin = torch.from_numpy(np.stack([first for first, _ in drawn]))
        return self.begin(rows, threat, begin, torch.from_numpy(np.stack([rest for _, rest in drawn])))

    def begin(self, rows: Rows, threat: Threat, first: Tensor, proposals: Tensor) -> SquareState:
        """Rows with given draws: `start`, and the reference mode with draws of its own.

        Args:
            rows: n of them.
            threat: ball and radius.
            first: (n, 3, H, W) float32, the start in units of the radius; L1: a change to be projected.
            proposals: (n, Q, k) int16; Linf: top, left and one sign a channel; L2 and L1: top and left of two
                windows, one sign a channel, and whether the pattern is turned.
        """
        images = rows.images
        eps, first = geometry.radius(threat), first.to(images.device)
        x = l1_start(images, first, eps) if threat.norm == "l1" else (images + eps * first).clamp_(0, 1)
        lower, upper = geometry.bounds(images, threat)
        nothing = torch.zeros_like(proposals[:, :1])
        alone = torch.arange(len(images), device=images.device)
        return SquareState(
            **initial(rows, threat, x),
            best=x.clone(),
            best_margin=torch.full((len(images),), torch.inf, dtype=images.dtype, device=images.device),
            idle=torch.zeros_like(rows.labels),
            lower=lower,
            upper=upper,
            proposals=torch.cat([nothing, proposals, nothing], dim=1).to(images.device),
            leader=alone,
            position=torch.zeros_like(alone),
            group_size=torch.ones_like(alone),
            grouped=False,
        )

    def assign(self, state: SquareState, leaders: Tensor, positions: Tensor) -> SquareState:
        """Rows of a group query consecutive proposals of their leader."""
        return lookahead.assign(state, leaders, positions)

    def step(self, state: SquareState, oracle: Oracle) -> SquareState:
        """Query one proposal of every row (the start point first) and accept it where it is better."""
        at = state.iteration
        if state.grouped:
            at = (at + state.position).clamp_(max=self.queries + 1)
        if state.threat.norm == "linf":
            x, idle, passed = self._next_linf(state, at)
        else:
            x, idle, passed = self._next(state, at), None, 0

        logits = oracle.logits(x)
        margin = losses.correct_margin(logits, state.labels)
        better = margin < state.best_margin
        query = Query(
            margin=margin,
            wrong=misclassified(logits, state.labels),
            better=better if state.stop == "best" else better | (margin <= 0),
            nonfinite=~torch.isfinite(logits.sum(1)),
            idle=idle,
            passed=passed,
        )
        decide = lookahead.decide_groups if state.grouped else lookahead.decide_alone
        return self._updated(state, x, decide(state, query, self.queries))

    def _updated(self, state: SquareState, x: Tensor, decision: Decision) -> SquareState:
        """The state after a query of every row, or of every group."""
        success = decision.accepted & decision.wrong
        done = decision.iteration >= self.queries
        if state.stop != "best":
            # A margin of exactly 0 ends the search, as in the reference, though it is no success.
            done = done | (decision.accepted & (decision.margin <= 0))
        best_margin = torch.where(decision.accepted, decision.margin, state.best_margin)
        return dataclasses.replace(
            state,
            x=x,
            best=_overwrite(state.best, x, decision),
            best_margin=best_margin,
            broken=success if state.stop == "first" else success | state.broken,
            first=torch.where(success & ~state.broken, decision.iteration, state.first),
            iteration=decision.iteration + 1,
            idle=state.idle + decision.idle,
            done=done,
            nonfinite=decision.nonfinite,
            start_value=torch.where(state.iteration == 0, -decision.margin, state.start_value),
            best_value=-best_margin,
        )

    def _next_linf(self, state: SquareState, at: Tensor) -> tuple[Tensor, Tensor, Tensor | int]:
        """Linf: the points to query.

        Rows in groups pass over nothing, since other rows query the next proposals anyway. On a GPU no row
        does, since counting would wait for the device.

        Returns:
            (S, 3, H, W) points; (S,) bool, the proposal changes nothing; (S,) number of proposals before it
            that were passed over because they change nothing.
        """
        x = self._window(state.best, state.lower, state.upper, state, at, None, state.x)
        idle = _unchanged(x, state.best) & (at > 0) & (at <= self.queries)
        if state.grouped or at.device.type != "cpu":
            return x, idle, 0
        stuck, passed = idle.nonzero().squeeze(1), torch.zeros_like(at)
        while len(stuck):
            passed[stuck] += 1
            later, best = (at + passed)[stuck], state.best[stuck]
            window = self._window(best, state.lower[stuck], state.upper[stuck], state, later, stuck, None)
            x.index_copy_(0, stuck, window)
            idle[stuck] = _unchanged(window, best) & (later <= self.queries)
            stuck = stuck[idle[stuck]]
        return x, idle, passed

    def _window(
        self,
        best: Tensor,
        lower: Tensor,
        upper: Tensor,
        state: SquareState,
        at: Tensor,
        rows: Tensor | None,
        out: Tensor | None,
    ) -> Tensor:
        """Linf: the best points of all rows, or of `rows` (k,) int64, with their windows at `at` moved."""
        proposal = self._proposal(state, at, rows)
        side = self._schedule(state, at.device)[at]
        move = proposal[:, 2:] * (2 * geometry.radius(state.threat))
        return moved_window(best, lower, upper, proposal[:, :2], side, move, out)

    def _proposal(self, state: SquareState, at: Tensor, rows: Tensor | None = None) -> Tensor:
        """(S, k) int16, the proposal of each row at iteration `at` (S,)."""
        rows = torch.arange(len(at), device=at.device) if rows is None else rows
        return state.proposals[rows, at]

    def _schedule(self, state: SquareState, device: torch.device) -> Tensor:
        """(Q + 2,) int16, side of the window at each iteration."""
        height, width = state.images.shape[2:]
        return _sides(self.queries, self.p, height, width, state.threat.norm, device)

    def _next(self, state: SquareState, at: Tensor) -> Tensor:
        """L2 and L1: (S, 3, H, W) the points to query."""
        side = self._schedule(state, at.device)[at].long()
        proposal = self._proposal(state, at).long()
        propose = l1_proposal if state.threat.norm == "l1" else l2_proposal
        x = propose(state.best, state.images, proposal, side, geometry.radius(state.threat))
        return pick((at > 0) & (at <= self.queries), x, state.best)


def _unchanged(x: Tensor, best: Tensor) -> Tensor:
    """(S,) bool: equal in every pixel."""
    return (x - best).abs_().flatten(1).amax(1) == 0


def _overwrite(best: Tensor, x: Tensor, decision: Decision) -> Tensor:
    """`best` with the accepted proposals written into it; they are few, and a CPU copies only them."""
    if best.device.type == "cpu":
        rows = decision.accepted.nonzero().squeeze(1)
        return best.index_copy_(0, rows, x[rows if decision.source is None else decision.source[rows]])
    new = x if decision.source is None else x.index_select(0, decision.source)
    return torch.where(spread(decision.accepted, best), new, best)


@cache
def window_sides(queries: int, p: float, height: int, width: int, norm: str) -> tuple[int, ...]:
    """Side of the window at each query; except for Linf odd and at least 3, in images that are so large."""
    sides = []
    for query in range(queries):
        share = p / 2 ** sum(query > last for last in HALVINGS)
        side = max(round(math.sqrt(share * height * width)), 1)
        if norm != "linf":
            side = max(side, 3) | 1
        sides.append(min(side, height, width))
    return tuple(sides)


@cache
def _sides(queries: int, p: float, height: int, width: int, norm: str, device: torch.device) -> Tensor:
    sides = window_sides(queries, p, height, width, norm)
    return torch.tensor([sides[0], *sides, sides[-1]], dtype=torch.int16, device=device)


def _draw(
    noise: np.random.Generator, side: np.ndarray, shape: tuple[int, ...], norm: str
) -> tuple[np.ndarray, np.ndarray]:
    """The start of one row, in units of the radius, and all its proposals."""
    channels, height, width = shape
    # floor(n u) with n = H - side never gives the last admissible offset, as in the reference.
    windows = 1 if norm == "linf" else 2
    corners = noise.random((len(side), windows, 2))
    extent = np.stack([height - side, width - side], axis=1)[:, None]
    offsets = np.floor(corners * extent).astype(np.int16).reshape(len(side), -1)
    signs = noise.integers(0, 2, (len(side), channels), dtype=np.int16) * 2 - 1
    if norm == "linf":
        stripes = noise.integers(0, 2, (channels, 1, width)) * 2 - 1
        first = np.broadcast_to(stripes, shape).astype(np.float32)
        return first, np.concatenate([offsets, signs], axis=1)
    turns = noise.integers(0, 2, (len(side), 1), dtype=np.int16)
    return tiles(noise, shape, norm), np.concatenate([offsets, signs, turns], axis=1)


plugin = Square
