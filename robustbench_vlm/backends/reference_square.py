"""Square's random numbers as the reference draws them: proposals shared by a batch, one query after another.

Linf: a stripe pattern for each image, then for every query one window and one sign a channel for all images.
L2: signs are drawn for those images that are still robust at that query, so they depend on outcomes, and the
proposals of a query are written when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_vlm.attacks.square import Square, windows
from robustbench_vlm.attacks.square.lookahead import SquareState
from robustbench_vlm.attacks.square.square import window_sides
from robustbench_vlm.engine.interface import Rows, State
from robustbench_vlm.threat import Threat

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Draws:
    """The three things that the reference draws, each from uniform float32 numbers in its order."""

    generator: torch.Generator

    def signs(self, *shape: int) -> Tensor:
        """-1 or 1, float32."""
        return (2 * torch.rand(shape, generator=self.generator) - 1).sign()

    def below(self, n: int) -> int:
        """0 to n - 1, and 0 for n = 0; rounded as float32 products are."""
        return int((n * torch.rand(1, generator=self.generator)).long())

    def coin(self) -> bool:
        """True in one half of all cases."""
        return bool(torch.rand(1, generator=self.generator) > 0.5)


def begin(
    attack: Square, rows: Rows, threat: Threat, generator: torch.Generator
) -> tuple[SquareState, Callable[[State], None]]:
    """Rows that are about to start, and what has to be called before each of their steps."""
    draws, shape = Draws(generator), tuple(rows.images.shape[1:])
    sides = window_sides(attack.queries, attack.p, shape[1], shape[2], threat.norm)
    n = len(rows.labels)
    if threat.norm == "linf":
        stripes = draws.signs(n, shape[0], 1, shape[2]).expand(n, *shape)
        proposals = torch.stack([_shared(draws, side, shape) for side in sides])
        return attack.begin(rows, threat, stripes, proposals.expand(n, -1, -1)), _nothing
    first = _tiles(draws, n, shape)
    proposals = torch.zeros(n, len(sides), 5 + shape[0], dtype=torch.int16)
    feed = _Feed(draws, sides, shape, n)
    return attack.begin(rows, threat, first, proposals), feed


def _nothing(state: State) -> None:
    """All proposals are known from the start."""


def _shared(draws: Draws, side: int, shape: Shape) -> Tensor:
    """(2 + C,) int16: one window, and one sign a channel."""
    corner = [draws.below(shape[1] - side), draws.below(shape[2] - side)]
    return torch.cat([torch.tensor(corner), draws.signs(shape[0])]).to(torch.int16)


@dataclass
class _Feed:
    """The L2 proposals of one query after another.

    Attributes:
        n: rows that hold an image.
        query: the next one; the first step evaluates the start and needs none.
    """

    draws: Draws
    sides: tuple[int, ...]
    shape: Shape
    n: int
    query: int = -1

    def __call__(self, state: State) -> None:
        """Write the proposals of the next query into the state: nobody else holds them."""
        if not isinstance(state, SquareState):
            raise TypeError(type(state).__name__)
        if self.query >= 0:
            channels, height, width = self.shape
            side = self.sides[self.query]
            down, along = height - side, width - side
            corners = [self.draws.below(room) for room in (down, along, down, along)]
            turned = self.draws.coin()
            alive = (state.best_margin[: self.n] > 0).nonzero().squeeze(1)
            signs = self.draws.signs(len(alive), channels)
            rows = torch.cat(
                [
                    torch.tensor(corners).expand(len(alive), 4),
                    signs,
                    torch.full((len(alive), 1), int(turned)),
                ],
                dim=1,
            )
            state.proposals[alive, self.query + 1] = rows.to(state.proposals)  # the first is the start's
        self.query += 1


def _tiles(draws: Draws, n: int, shape: Shape) -> Tensor:
    """(n, C, H, W) float32 of unit L2 norm: 5 x 5 tiles, each turned for all images or for none."""
    channels, height, width = shape
    side = max(min(height, width) // 5, 1)
    found = torch.zeros((n, *shape), dtype=torch.float64)
    for top in range((height - 5 * side) // 2, height - side + 1, side):
        for left in range((width - 5 * side) // 2, width - side + 1, side):
            pattern = torch.from_numpy(windows.eta(side))
            pattern = pattern.T if draws.coin() else pattern
            found[:, :, top : top + side, left : left + side] = pattern * draws.signs(n, channels, 1, 1)
    size: Tensor = torch.linalg.vector_norm(found.flatten(1), dim=1)
    return found.div(size[:, None, None, None]).float()
