"""Square attack: random search with square-shaped changes; needs logits, not gradients.

Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search" (ECCV
2020), with AutoAttack's settings: margin loss, and the schedule of window sizes not rescaled to the number of
queries. Every image has its own stream of proposals, a function of its name; nothing is drawn in the loop.

Proposals do not depend on outcomes, which is used twice. One that changes nothing cannot be accepted and is
passed over without a query (Linf: about 3 in 100). And idle rows may form a crew that looks at the next
proposals of one image at once: the first that is accepted counts, later ones are proposed again from there.
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
from robustbench_vlm.attacks.square.lookahead import SquareState
from robustbench_vlm.attacks.square.windows import l1_proposal, l1_start, l2_proposal, moved_window, tiles
from robustbench_vlm.engine import geometry, losses
from robustbench_vlm.engine.interface import Alone, AnyState, Oracle, Rows, common, pick, spread
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # the last query of each size of the schedule


@dataclass(frozen=True)
class Square(Alone):
    """Square attack.

    Attributes:
        queries: proposals after the start point, those that change nothing included.
        p: share of the image that the first windows cover.
        restarts: trajectories with fresh noise.
    """

    queries: int
    p: float
    restarts: int

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    looks_ahead: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.queries, self.restarts) < 1 or not 0 < self.p <= 1:
            found = f"queries {self.queries}, restarts {self.restarts}, p {self.p}"
            raise InputError("square", found, "at least 1 query and restart, and p in (0, 1]")

    def ranks(self, n_classes: int) -> int:  # noqa: ARG002 - the same for every number of classes
        """Untargeted."""
        return 0

    def substitutions(self, n_classes: int) -> list[str]:  # noqa: ARG002 - the margin needs two classes
        """None."""
        return []

    def cost(self, n_classes: int) -> tuple[int, int]:  # noqa: ARG002 - the same for every number of classes
        """At most one forward a query and one at the start point; no gradient."""
        return (self.queries + 1) * self.restarts, 0

    def start(self, rows: Rows, threat: Threat) -> SquareState:
        """Vertical stripes (Linf) or a tiling with pyramids (L2, L1), and all proposals of each row."""
        shape = tuple(rows.images.shape[1:])
        sides = window_sides(self.queries, self.p, shape[1], shape[2], threat.norm)
        side = np.array(sides)
        drawn = [_draw(stream, side, shape, threat.norm) for stream in rows.noise.streams()]
        begin = torch.from_numpy(np.stack([first for first, _ in drawn]))
        return self.begin(rows, threat, begin, torch.from_numpy(np.stack([rest for _, rest in drawn])))

    def begin(self, rows: Rows, threat: Threat, first: Tensor, proposals: Tensor) -> SquareState:
        """Rows with given draws.

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
            **common(rows, threat, x),
            best=x.clone(),
            best_margin=torch.full((len(images),), torch.inf, dtype=images.dtype, device=images.device),
            idle=torch.zeros_like(rows.labels),
            lower=lower,
            upper=upper,
            proposals=torch.cat([nothing, proposals, nothing], dim=1).to(images.device),
            lead=alone,
            place=torch.zeros_like(alone),
            size=torch.ones_like(alone),
            crewed=False,
        )

    def assign(self, state: AnyState, leaders: Tensor, positions: Tensor) -> AnyState:
        """Rows of a crew look at consecutive proposals of their lead."""
        return lookahead.assign(state, leaders, positions)

    def step(self, state: SquareState, oracle: Oracle) -> SquareState:
        """Evaluate one proposal of every row (the start point first) and keep it where it is better."""
        at = state.iteration
        if state.crewed:
            at = (at + state.place).clamp_(max=self.queries + 1)
        if state.threat.norm == "linf":
            x, idle, passed = self._next(state, at)
        else:
            x, idle, passed = self._propose(state, at), None, 0

        logits = oracle.logits(x)
        margin = losses.correct_margin(logits, state.labels)
        better = margin < state.best_margin
        seen = lookahead.Look(
            margin=margin,
            wrong=logits.argmax(1) != state.labels,
            better=better if state.stop == "best" else better | (margin <= 0),
            nonfinite=~torch.isfinite(logits.sum(1)),
            idle=idle,
            passed=passed,
        )
        settle = lookahead.settle if state.crewed else lookahead.alone
        return self._keep(state, x, settle(state, seen, self.queries))

    def _keep(self, state: SquareState, x: Tensor, found: lookahead.Settled) -> SquareState:
        """The state after a query of every row, or of every crew."""
        success = found.accepted & found.wrong
        # a tie ends the search, as in the reference, though it breaks nothing
        done = found.iteration >= self.queries
        if state.stop != "best":
            done = done | (found.accepted & (found.margin <= 0))
        best_margin = torch.where(found.accepted, found.margin, state.best_margin)
        return dataclasses.replace(
            state,
            x=x,
            best=_overwrite(state.best, x, found),
            best_margin=best_margin,
            broken=success if state.stop == "first" else success | state.broken,
            first=torch.where(success & ~state.broken, found.iteration, state.first),
            iteration=found.iteration + 1,
            idle=state.idle + found.idle,
            done=done,
            nonfinite=found.nonfinite,
            start_value=torch.where(state.iteration == 0, -found.margin, state.start_value),
            best_value=-best_margin,
        )

    def _next(self, state: SquareState, at: Tensor) -> tuple[Tensor, Tensor, Tensor | int]:
        """What each row looks at, whether that changes nothing, and how many such proposals it passed over.

        Rows of crews pass over nothing: their fellows look at the next proposals anyway. On a GPU, where
        counting would wait for the device, nobody does.
        """
        x = self._window(state.best, state.lower, state.upper, state, at, None, state.x)
        idle = _unchanged(x, state.best) & (at > 0) & (at <= self.queries)
        if state.crewed or at.device.type != "cpu":
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
        """(S, k) int16 what each row proposes."""
        rows = torch.arange(len(at), device=at.device) if rows is None else rows
        return state.proposals[rows, at]

    def _schedule(self, state: SquareState, device: torch.device) -> Tensor:
        """(Q + 2,) int16 side of the window at each iteration."""
        height, width = state.images.shape[2:]
        return _sides(self.queries, self.p, height, width, state.threat.norm, device)

    def _propose(self, state: SquareState, at: Tensor) -> Tensor:
        """What each row looks at, norms other than Linf."""
        side = self._schedule(state, at.device)[at].long()
        proposal = self._proposal(state, at).long()
        propose = l1_proposal if state.threat.norm == "l1" else l2_proposal
        x = propose(state.best, state.images, proposal, side, geometry.radius(state.threat))
        return pick((at > 0) & (at <= self.queries), x, state.best)


def _unchanged(x: Tensor, best: Tensor) -> Tensor:
    """(S,) bool: equal in every pixel."""
    return (x - best).abs_().flatten(1).amax(1) == 0


def _overwrite(best: Tensor, x: Tensor, found: lookahead.Settled) -> Tensor:
    """`best` itself, with the accepted proposals in it: they are few, and on a CPU only they are copied."""
    if best.device.type == "cpu":
        rows = found.accepted.nonzero().squeeze(1)
        return best.index_copy_(0, rows, x[rows if found.source is None else found.source[rows]])
    new = x if found.source is None else x.index_select(0, found.source)
    return torch.where(spread(found.accepted, best), new, best)


@cache
def window_sides(queries: int, p: float, height: int, width: int, norm: str) -> tuple[int, ...]:
    """Side of the window at each query; odd and at least 3 but for Linf."""
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
    """The start, in units of the radius, and all proposals of one row."""
    channels, height, width = shape
    # floor(n u) with n = H - side: the last admissible offset is never drawn, as in the reference
    windows = 1 if norm == "linf" else 2
    corners = noise.random((len(side), windows, 2))
    room = np.stack([height - side, width - side], axis=1)[:, None]
    placed = np.floor(corners * room).astype(np.int16).reshape(len(side), -1)
    signs = noise.integers(0, 2, (len(side), channels), dtype=np.int16) * 2 - 1
    if norm == "linf":
        stripes = noise.integers(0, 2, (channels, 1, width)) * 2 - 1
        first = np.broadcast_to(stripes, shape).astype(np.float32)
        return first, np.concatenate([placed, signs], axis=1)
    turns = noise.integers(0, 2, (len(side), 1), dtype=np.int16)
    return tiles(noise, shape, norm), np.concatenate([placed, signs, turns], axis=1)


plugin = Square
