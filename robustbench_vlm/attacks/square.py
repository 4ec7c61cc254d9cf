"""Square attack: random search with square-shaped changes; needs logits, not gradients.

Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search" (ECCV
2020), with AutoAttack's settings: margin loss, and the schedule of window sizes not rescaled to the number of
queries. Every image has its own stream of proposals, a function of its name; nothing is drawn in the loop.
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

from robustbench_vlm.attacks import geometry, losses
from robustbench_vlm.attacks.interface import Alone, Oracle, Rows, State, common, pick, progress, spread
from robustbench_vlm.attacks.windows import centred, inside, pyramids, tiles, window_masks
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # the last query of each size of the schedule


@dataclass(frozen=True)
class SquareState(State):
    """Square's rows; `x` is the proposal last evaluated.

    Attributes:
        lower, upper: (S, 3, H, W) limits of each pixel.
        best: (S, 3, H, W) point of smallest margin.
        best_margin: (S,) its margin of correctness.
        proposals: (S, Q, n) int16, offsets, signs and turns of every query.
    """

    lower: Tensor
    upper: Tensor
    best: Tensor
    best_margin: Tensor
    proposals: Tensor

    @property
    def backwards(self) -> Tensor:
        """None: it is a black-box attack."""
        return torch.zeros_like(self.iteration)

    @property
    def adv(self) -> Tensor:
        """The best point; a success is always one."""
        return self.best


@dataclass(frozen=True)
class Square(Alone):
    """Square attack.

    Attributes:
        queries: proposals after the start point.
        p: share of the image that the first windows cover.
        restarts: trajectories with fresh noise.
    """

    queries: int
    p: float
    restarts: int

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

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
        """One forward a query and one at the start point; no gradient."""
        return (self.queries + 1) * self.restarts, 0

    def start(self, rows: Rows, threat: Threat) -> SquareState:
        """Vertical stripes (Linf) or a tiling with pyramids (L2), and all proposals of each row."""
        images, shape = rows.images, tuple(rows.images.shape[1:])
        sizes = window_sizes(self.queries, self.p, shape[1], shape[2], threat.norm)
        drawn = [_draw(stream, sizes, shape, threat.norm) for stream in rows.noise.streams()]
        begin = torch.from_numpy(np.stack([first for first, _ in drawn])).to(images.device)
        x = (images + geometry.radius(threat) * begin).clamp_(0, 1)
        lower, upper = geometry.bounds(images, threat)
        return SquareState(
            **common(rows, threat, x),
            lower=lower,
            upper=upper,
            best=x,
            best_margin=torch.full((len(images),), torch.inf, dtype=images.dtype, device=images.device),
            proposals=torch.from_numpy(np.stack([rest for _, rest in drawn])).to(images.device),
        )

    def step(self, state: SquareState, oracle: Oracle) -> SquareState:
        """Evaluate one proposal of every row (the start point first) and keep it where it is better."""
        begun = state.iteration > 0
        query = (state.iteration - 1).clamp(0, self.queries - 1)
        height, width = state.images.shape[2:]
        sizes = window_sizes(self.queries, self.p, height, width, state.threat.norm)
        size = _table(sizes, query.device)[query]
        proposal = state.proposals[torch.arange(len(query), device=query.device), query].long()
        propose = _linf if state.threat.norm == "linf" else _l2
        x = pick(begun, propose(state, proposal, size), state.x)

        logits = oracle.logits(x)
        margin = losses.judge(logits, state.labels)
        better = (margin < state.best_margin) | (margin <= 0)
        wrong = logits.argmax(1) != state.labels
        broken = wrong if state.stop == "first" else wrong | state.broken
        # a tie ends the search, as in the reference, though it breaks nothing
        done = (state.iteration >= self.queries) | ((margin <= 0) & ~wrong)
        return dataclasses.replace(
            state,
            x=x,
            best=pick(better, x, state.best),
            best_margin=torch.where(better, margin, state.best_margin),
            broken=broken,
            first=torch.where(wrong & ((state.first < 0) | ~state.broken), state.iteration, state.first),
            iteration=state.iteration + 1,
            done=done,
            **progress(state, -margin),
            nonfinite=~torch.isfinite(logits.sum(1)),
        )


@cache
def window_sizes(queries: int, p: float, height: int, width: int, norm: str) -> tuple[int, ...]:
    """Side of the window at each query; odd and at least 3 for L2."""
    sizes = []
    for query in range(queries):
        share = p / 2 ** sum(query > last for last in HALVINGS)
        side = max(round(math.sqrt(share * height * width)), 1)
        if norm != "linf":
            side = max(side, 3) | 1
        sizes.append(min(side, height, width))
    return tuple(sizes)


@cache
def _table(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(sizes, device=device)


def _draw(
    noise: np.random.Generator, sizes: tuple[int, ...], shape: tuple[int, ...], norm: str
) -> tuple[np.ndarray, np.ndarray]:
    """The start, in units of the radius, and all proposals of one row."""
    channels, height, width = shape
    side = np.array(sizes)
    # floor(n u) with n = H - side: the last admissible offset is never drawn, as in the reference
    windows = 1 if norm == "linf" else 2
    corners = noise.random((len(sizes), windows, 2))
    room = np.stack([height - side, width - side], axis=1)[:, None]
    offsets = np.floor(corners * room).astype(np.int16).reshape(len(sizes), -1)
    signs = noise.integers(0, 2, (len(sizes), channels), dtype=np.int16) * 2 - 1
    if norm == "linf":
        stripes = noise.integers(0, 2, (channels, 1, width)) * 2 - 1
        first = np.broadcast_to(stripes, shape).astype(np.float32)
        return first, np.concatenate([offsets, signs], axis=1)
    turns = noise.integers(0, 2, (len(sizes), 1), dtype=np.int16)
    return tiles(noise, shape), np.concatenate([offsets, signs, turns], axis=1)


def _linf(state: SquareState, proposal: Tensor, size: Tensor) -> Tensor:
    """One window of every row moved by twice the radius, up or down a channel."""
    rows, columns = window_masks(proposal[:, :2], size, state.images.shape[2:])
    move = proposal[:, 2:].to(state.best.dtype).mul_(2 * geometry.radius(state.threat))
    patch = move[:, :, None, None] * rows[:, None, :, None] * columns[:, None, None, :]
    return patch.add_(state.best).clamp_(state.lower, state.upper)


def _l2(state: SquareState, proposal: Tensor, size: Tensor) -> Tensor:
    """Mass of one window moved into another as a pyramid, and the whole rescaled to the radius."""
    shape, eps = state.images.shape[2:], geometry.radius(state.threat)
    channels = state.images.shape[1]
    first, second = proposal[:, :2], proposal[:, 2:4]
    signs, turn = proposal[:, 4 : 4 + channels].to(state.best.dtype), proposal[:, -1]
    into, out_of = inside(first, size, shape)[:, None], inside(second, size, shape)[:, None]
    delta = state.best - state.images

    held = delta * into
    new = (
        centred(pyramids(shape, state.best.device), first, size, turn, shape)[:, None]
        * signs[:, :, None, None]
    )
    new = new + held / (held.square().sum((2, 3), keepdim=True).sqrt() + geometry.TINY)
    new = new * into
    new = new / (new.square().sum((2, 3), keepdim=True).sqrt() + geometry.TINY)

    spare = (eps**2 - geometry.length(delta).square()).clamp(min=0) / channels
    union = torch.maximum(into, out_of)
    mass = (delta.square() * union).sum((2, 3), keepdim=True)
    new = new * (spread(spare, mass) + mass).sqrt()
    delta = torch.where(into > 0, new, delta * (1 - out_of))
    scale = eps / (geometry.length(delta) + geometry.TINY)
    return delta.mul_(spread(scale, delta)).add_(state.images).clamp_(0, 1)


plugin = Square
