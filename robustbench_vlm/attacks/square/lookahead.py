"""Lookahead groups of Square: several rows query the next proposals of one image in one call.

Proposals of a random search do not depend on outcomes, so idle rows can query the next proposals of an image
that is still searching. The result is what a row alone would have found: the first proposal, in order, that
is accepted or fails. What was queried beyond it is forgotten.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustbench_vlm.engine.interface import State
from robustbench_vlm.engine.row_ops import take_index


@dataclass(frozen=True)
class SquareState(State):
    """The rows of Square; `iteration` counts the start and the proposals that are finished.

    Attributes:
        best: (S, 3, H, W) the point of smallest margin.
        best_margin: (S,) its margin of correctness.
        idle: (S,) int64, finished proposals that changed nothing.
        lower, upper: (S, 3, H, W) limits of each pixel.
        proposals: (S, Q + 2, k) int16, by `iteration`: offsets, signs and turns of every query. The first row
            (the start) and the last (past the end) are zeros and propose nothing.
        leader: (S,) int64, the row whose image each row works on; its own index for a row alone.
        position: (S,) int64, position of each row within its group.
        group_size: (S,) int64, number of rows in the group.
        grouped: whether any group has more than one row; if not, the three above are not read.
    """

    best: Tensor
    best_margin: Tensor
    idle: Tensor
    lower: Tensor
    upper: Tensor
    proposals: Tensor
    leader: Tensor
    position: Tensor
    group_size: Tensor
    grouped: bool

    @property
    def adv(self) -> Tensor:
        """The best point; a success is always one."""
        return self.best

    @property
    def forwards(self) -> Tensor:
        """(S,) queries of a row alone: the start, and every proposal that changes something."""
        return self.iteration - self.idle

    @property
    def backwards(self) -> Tensor:
        """(S,) zeros: Square takes no gradient."""
        return torch.zeros_like(self.iteration)


@dataclass(frozen=True)
class Query:
    """The result of one query in each row, at the row's own proposal.

    Attributes:
        margin: (S,) margins of correctness.
        wrong: (S,) bool, misclassified.
        better: (S,) bool, to be accepted as far as the row alone can tell.
        nonfinite: (S,) bool, a logit was NaN or infinite.
        idle: (S,) bool, the proposal changes nothing; None where that is not computed.
        passed: (S,) int64, proposals before it that the row passed over because they change nothing.
    """

    margin: Tensor
    wrong: Tensor
    better: Tensor
    nonfinite: Tensor
    idle: Tensor | None
    passed: Tensor | int


@dataclass(frozen=True)
class Decision:
    """What follows from a query, the same in every row of a group.

    Attributes:
        source: (S,) int64, the row whose proposal is accepted, if any is; None where it is each row's own.
        margin: (S,) margin of the accepted proposal, or of the last one queried if none is accepted.
        wrong, accepted, nonfinite: (S,) bool, of that proposal.
        iteration: (S,) int64, `State.iteration` of the last proposal that counts.
        idle: (S,) int64, proposals up to there that change nothing.
    """

    source: Tensor | None
    margin: Tensor
    wrong: Tensor
    accepted: Tensor
    nonfinite: Tensor
    iteration: Tensor
    idle: Tensor | int


def decide_alone(state: SquareState, query: Query, queries: int) -> Decision:
    """The decisions of rows that work alone.

    Args:
        state: before the query.
        query: of every row.
        queries: number of proposals.
    """
    # A row that has ended accepts nothing, because accepting writes its memory.
    accepted = query.better & ~(query.nonfinite | state.broken | state.done | state.nonfinite)
    # A row that passed over all proposals that were left has queried its best point again, without effect.
    at = (state.iteration + query.passed).clamp(max=queries)
    return Decision(
        source=None,
        margin=query.margin,
        wrong=query.wrong,
        accepted=accepted,
        nonfinite=query.nonfinite,
        iteration=at,
        idle=query.passed if query.idle is None else query.idle + query.passed,
    )


def assign(state: SquareState, leaders: Tensor, positions: Tensor) -> SquareState:
    """Every row becomes a copy of its leader, at its own position; args as in `LookaheadAttack.assign`."""
    sizes = torch.zeros_like(leaders).scatter_add(0, leaders, torch.ones_like(leaders))
    grouped = not torch.equal(leaders.cpu(), torch.arange(len(leaders)))
    changes: dict[str, Any] = {
        "leader": leaders,
        "position": positions,
        "group_size": sizes[leaders],
        "grouped": grouped,
    }
    return dataclasses.replace(take_index(state, leaders), **changes)


def decide_groups(state: SquareState, query: Query, queries: int) -> Decision:
    """The decisions of groups: the first event in the order of proposals decides.

    Args:
        state: before the query.
        query: of every row.
        queries: number of proposals.
    """
    rows, never = len(state.leader), 2 * len(state.leader)
    index = torch.arange(rows, device=state.leader.device)
    # Only proposals within the schedule count; of groups that have not begun only the leader's, the start.
    left = torch.where(state.iteration == 0, 1, (queries + 1 - state.iteration).clamp(min=1))
    counts = state.position < left
    event = counts & (query.better | query.nonfinite)

    def least(values: Tensor) -> Tensor:
        """(S,) the smallest value of each row's group."""
        return torch.full_like(values, never).scatter_reduce(0, state.leader, values, "amin")[state.leader]

    at = least(torch.where(event, state.position, never))
    happened = at < never
    last = torch.where(happened, at, torch.minimum(state.group_size, left) - 1)
    decisive = least(torch.where(state.position == last, index, never))
    idle: Tensor | int = 0
    if query.idle is not None:
        gone = query.idle & (state.position <= last)
        idle = torch.zeros_like(state.leader).scatter_add(0, state.leader, gone.long())[state.leader]
    nonfinite = happened & query.nonfinite[decisive]
    accepted = happened & ~(nonfinite | state.broken | state.done | state.nonfinite)
    return Decision(
        source=decisive,
        margin=query.margin[decisive],
        wrong=query.wrong[decisive],
        accepted=accepted,
        nonfinite=nonfinite,
        iteration=(state.iteration + last).clamp(max=queries),  # a row that has ended may be stepped on
        idle=idle,
    )
