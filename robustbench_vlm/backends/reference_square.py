"""Square's random numbers in the order of the reference, whose proposals are shared by a batch of images.

Linf: a stripe pattern for each image, then for every query one window, and one sign for each channel, for all
images. L2: signs are drawn for the images that are still robust at that query, so they depend on outcomes,
and the proposals of a query are written just before it.
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
    """The draws of the reference, each computed from uniform float32 numbers as the reference computes it."""

    generator: torch.Generator

    def signs(self, *shape: int) -> Tensor:
        """(*shape) float32, -1 or 1."""
        return (2 * torch.rand(shape, generator=self.generator) - 1).sign()

    def below(self, n: int) -> int:
        """An integer from 0 to n - 1, and 0 for n = 0; computed by a float32 product, as in the reference."""
        return int((n * torch.rand(1, generator=self.generator)).long())

    def coin(self) -> bool:
        """True with probability one half."""
        return bool(torch.rand(1, generator=self.generator) > 0.5)


def begin(
    attack: Square, rows: Rows, threat: Threat, generator: torch.Generator
) -> tuple[SquareState, Callable[[State], None]]:
    """The state of rows before their first step, and a function to call with the state before each step."""
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
    """Do nothing: in Linf all proposals are drawn before the first step."""


def _shared(draws: Draws, side: int, shape: Shape) -> Tensor:
    """(2 + C,) int16: the corner of one window, and a sign for each channel."""
    corner = [draws.below(shape[1] - side), draws.below(shape[2] - side)]
    return torch.cat([torch.tensor(corner), draws.signs(shape[0])]).to(torch.int16)


@dataclass
class _Feed:
    """Draws the L2 proposals of one query after another.

    Attributes:
        draws: the generator of the batch.
        sides: side of the window at each query.
        shape: (C, H, W) of an image.
        n: number of rows with an image.
        query: number of the next query; -1 before the first step, which evaluates the start.
    """

    draws: Draws
    sides: tuple[int, ...]
    shape: Shape
    n: int
    query: int = -1

    def __call__(self, state: State) -> None:
        """Write the proposals of the next query into the memory of the state, which nothing else uses."""
        if not isinstance(state, SquareState):
            raise TypeError(type(state).__name__)
        if self.query >= 0:
            channels, height, width = self.shape
            side = self.sides[self.query]
            down, along = height - side, width - side
            corners = [self.draws.below(extent) for extent in (down, along, down, along)]
            turned = self.draws.coin()
            robust = (state.best_margin[: self.n] > 0).nonzero().squeeze(1)
            signs = self.draws.signs(len(robust), channels)
            rows = torch.cat(
                [
                    torch.tensor(corners).expand(len(robust), 4),
                    signs,
                    torch.full((len(robust), 1), int(turned)),
                ],
                dim=1,
            )
            state.proposals[robust, self.query + 1] = rows.to(state.proposals)  # row 0 is the start's
        self.query += 1


def _tiles(draws: Draws, n: int, shape: Shape) -> Tensor:
    """(n, C, H, W) float32 of unit L2 norm: 5 x 5 tiles, each turned either for all images or for none."""
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
