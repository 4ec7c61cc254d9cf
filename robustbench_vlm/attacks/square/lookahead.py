"""Rows that look ahead together: several proposals of one image in one call, with the outcome of one row.

Proposals of a random search do not depend on outcomes, so idle rows can evaluate the next ones of an image
that is still searching. What counts is what a lone row would have found: the first proposal in order that is
accepted or fails; what was looked at beyond it is forgotten.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustbench_vlm.engine.interface import AnyState, State, rows_of


@dataclass(frozen=True)
class SquareState(State):
    """Square's rows; `iteration` counts the start and the proposals gone through.

    Attributes:
        best: (S, 3, H, W) the point of smallest margin.
        best_margin: (S,) its margin of correctness.
        idle: (S,) int64, proposals gone through that changed nothing.
        lower, upper: (S, 3, H, W) limits of each pixel.
        proposals: (S, Q + 2, k) int16, by `iteration`: offsets, signs and turns of every query, between two
            rows of zeros, which propose nothing: the start, and what is past the end.
        lead, place, size: (S,) int64, the row whose image each row works on, its position in that crew, and
            the number of rows in it.
        crewed: whether any crew has more than one row; if not, the three above are not read.
    """

    best: Tensor
    best_margin: Tensor
    idle: Tensor
    lower: Tensor
    upper: Tensor
    proposals: Tensor
    lead: Tensor
    place: Tensor
    size: Tensor
    crewed: bool

    @property
    def adv(self) -> Tensor:
        """The best point; a success is always one."""
        return self.best

    @property
    def forwards(self) -> Tensor:
        """(S,) what a lone row queries: every proposal that changes something, and the start."""
        return self.iteration - self.idle

    @property
    def backwards(self) -> Tensor:
        """None: it is a black-box attack."""
        return torch.zeros_like(self.iteration)


@dataclass(frozen=True)
class Look:
    """What each row saw at its own proposal.

    Attributes:
        margin: (S,) margins of correctness.
        wrong, better, nonfinite: (S,) bool; better as far as the row can tell.
        idle: (S,) bool, the proposal changes nothing; absent where that is not looked for.
        passed: (S,) int64, proposals before it that the row passed over because they change nothing.
    """

    margin: Tensor
    wrong: Tensor
    better: Tensor
    nonfinite: Tensor
    idle: Tensor | None
    passed: Tensor | int


@dataclass(frozen=True)
class Settled:
    """What a query came to, the same in every row of a crew.

    Attributes:
        source: (S,) int64, the row whose proposal was accepted, if any; absent where that is each row's own.
        margin: (S,) margin of the accepted proposal (of the last one looked at, where none was).
        wrong, accepted, nonfinite: (S,) bool.
        iteration: (S,) int64, `State.iteration` of the last proposal that counts.
        idle: (S,) int64, proposals gone through that change nothing.
    """

    source: Tensor | None
    margin: Tensor
    wrong: Tensor
    accepted: Tensor
    nonfinite: Tensor
    iteration: Tensor
    idle: Tensor | int


def alone(state: SquareState, seen: Look, queries: int) -> Settled:
    """Of rows that work for themselves.

    Args:
        state: before the query.
        seen: by every row.
        queries: proposals that there are.
    """
    # a row that has ended stays as it is, also where its memory is written
    accepted = seen.better & ~(seen.nonfinite | state.broken | state.done | state.nonfinite)
    # a row that passed over all that was left has looked at its best point once more, for nothing
    at = (state.iteration + seen.passed).clamp(max=queries)
    return Settled(
        source=None,
        margin=seen.margin,
        wrong=seen.wrong,
        accepted=accepted,
        nonfinite=seen.nonfinite,
        iteration=at,
        idle=seen.passed if seen.idle is None else seen.idle + seen.passed,
    )


def assign(state: AnyState, lead: Tensor, place: Tensor) -> AnyState:
    """Every row becomes a copy of its lead, with its own place."""
    size = torch.zeros_like(lead).scatter_add(0, lead, torch.ones_like(lead))
    crewed = not torch.equal(lead.cpu(), torch.arange(len(lead)))
    changes: dict[str, Any] = {"lead": lead, "place": place, "size": size[lead], "crewed": crewed}
    return dataclasses.replace(rows_of(state, lead), **changes)


def settle(state: SquareState, seen: Look, queries: int) -> Settled:
    """Of crews: the first event in the order of proposals decides.

    Args:
        state: before the query.
        seen: by every row.
        queries: proposals that there are.
    """
    rows, never = len(state.lead), 2 * len(state.lead)
    index = torch.arange(rows, device=state.lead.device)
    # proposals within the schedule; of rows that have not begun only the lead looks, at the start
    left = torch.where(state.iteration == 0, 1, (queries + 1 - state.iteration).clamp(min=1))
    counts = state.place < left
    event = counts & (seen.better | seen.nonfinite)

    def least(values: Tensor) -> Tensor:
        """(S,) the smallest value of each row's crew."""
        return torch.full_like(values, never).scatter_reduce(0, state.lead, values, "amin")[state.lead]

    at = least(torch.where(event, state.place, never))
    happened = at < never
    last = torch.where(happened, at, torch.minimum(state.size, left) - 1)
    decisive = least(torch.where(state.place == last, index, never))
    idle: Tensor | int = 0
    if seen.idle is not None:
        gone = seen.idle & (state.place <= last)
        idle = torch.zeros_like(state.lead).scatter_add(0, state.lead, gone.long())[state.lead]
    nonfinite = happened & seen.nonfinite[decisive]
    accepted = happened & ~(nonfinite | state.broken | state.done | state.nonfinite)
    return Settled(
        source=decisive,
        margin=seen.margin[decisive],
        wrong=seen.wrong[decisive],
        accepted=accepted,
        nonfinite=nonfinite,
        iteration=(state.iteration + last).clamp(max=queries),  # a row that has ended may be stepped on
        idle=idle,
    )
