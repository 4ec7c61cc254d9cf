"""The best-iterate rule: which misclassified iterate a row returns when it runs to its end.

It is the same for every attack that maximises a loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustbench_vlm.engine.interface import State
from robustbench_vlm.engine.row_ops import pick


@dataclass(frozen=True)
class BestIterateState(State):
    """A state that remembers an iterate.

    Attributes:
        chosen: (S, 3, H, W) under `stop=last` the last misclassified iterate, under `stop=best` that of
            largest objective; the current one while there is none. Not followed under `stop=first`.
        chosen_value: (S,) the objective there, -inf while there is none; followed only under `stop=best`.
    """

    chosen: Tensor
    chosen_value: Tensor

    @property
    def adv(self) -> Tensor:
        """The current iterate under `stop=first`, else the chosen one."""
        return self.x if self.stop == "first" else self.chosen


def nothing_chosen(x: Tensor) -> dict[str, Any]:
    """The fields of `BestIterateState` for rows that will evaluate `x` first."""
    lowest = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    return {"chosen": x, "chosen_value": lowest}


def best_iterate(state: BestIterateState, x: Tensor, values: Tensor, wrong: Tensor) -> dict[str, Any]:
    """`broken`, `first`, `chosen` and `chosen_value` after an evaluation.

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
        return {"broken": broken, "first": first, "chosen": pick(wrong | ~broken, x, state.chosen)}
    better = wrong & (values > state.chosen_value)
    return {
        "broken": broken,
        "first": first,
        "chosen": pick(better | ~broken, x, state.chosen),
        "chosen_value": torch.where(better, values, state.chosen_value),
    }
