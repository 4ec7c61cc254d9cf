"""Which misclassified iterate a row that walks to its end gives back, the same for every attack on a loss."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from robustbench_vlm.engine.interface import Stop, pick


class BestIterate(Protocol):
    """A state that keeps an iterate.

    Attributes:
        last: (S, 3, H, W) under `stop=last` the last misclassified iterate, under `stop=best` that of largest
            objective; the current one while there is none. Not moved under `stop=first`.
        peak: (S,) the objective there, -inf while there is none; followed only under `stop=best`.
    """

    @property
    def stop(self) -> Stop: ...  # noqa: D102 - as in `State`
    @property
    def iteration(self) -> Tensor: ...  # noqa: D102
    @property
    def broken(self) -> Tensor: ...  # noqa: D102
    @property
    def first(self) -> Tensor: ...  # noqa: D102
    @property
    def last(self) -> Tensor: ...  # noqa: D102
    @property
    def peak(self) -> Tensor: ...  # noqa: D102


def best_iterate(state: BestIterate, x: Tensor, values: Tensor, wrong: Tensor) -> dict[str, Any]:
    """`broken`, `first`, `last` and `peak` after an evaluation.

    Args:
        state: before it.
        x: (S, 3, H, W) what was evaluated.
        values: (S,) the objective there.
        wrong: (S,) bool, success there.
    """
    first = torch.where(wrong & ((state.first < 0) | ~state.broken), state.iteration, state.first)
    if state.stop == "first":
        return {"broken": wrong, "first": first}
    broken = wrong | state.broken
    if state.stop == "last":
        return {"broken": broken, "first": first, "last": pick(wrong | ~broken, x, state.last)}
    better = wrong & (values > state.peak)
    return {
        "broken": broken,
        "first": first,
        "last": pick(better | ~broken, x, state.last),
        "peak": torch.where(better, values, state.peak),
    }
