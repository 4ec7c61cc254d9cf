"""Operations on rows: broadcasting, selecting, and moving rows of a state."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from robustbench_vlm.engine.interface import AnyState, State


def misclassified(logits: Tensor, labels: Tensor) -> Tensor:
    """(S,) bool: the first largest logit is not the label's."""
    return logits.argmax(1) != labels


def spread(values: Tensor, images: Tensor) -> Tensor:
    """(S,) values of rows, shaped to broadcast over (S, 3, H, W)."""
    return values.reshape(-1, *[1] * (images.ndim - 1))


def pick(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Row-wise `new` where `mask` (S,) else `old`; on a CPU without a copy if all rows agree."""
    if mask.device.type == "cpu":
        count = int(mask.sum())
        if count == 0:
            return old
        if count == mask.numel():
            return new
    return torch.where(spread(mask, new) if new.ndim > 1 else mask, new, old)


def _tensors(state: State) -> dict[str, Any]:
    """The tensors of a state by the names of their fields."""
    return {
        field.name: value
        for field in dataclasses.fields(state)
        if isinstance(value := getattr(state, field.name), Tensor)
    }


def take(state: AnyState, rows: list[int]) -> AnyState:
    """A copy of the given rows, as a state of `len(rows)` rows."""
    return take_index(state, torch.tensor(rows, device=state.labels.device))


def take_index(state: AnyState, index: Tensor) -> AnyState:
    """As `take`, with the rows as (n,) int64 on the state's device."""
    taken: dict[str, Any] = {name: value.index_select(0, index) for name, value in _tensors(state).items()}
    return dataclasses.replace(state, **taken)


def single(state: AnyState, row: int) -> AnyState:
    """One row, as a view; valid as long as nothing steps the state."""
    view: dict[str, Any] = {name: value[row : row + 1] for name, value in _tensors(state).items()}
    return dataclasses.replace(state, **view)


def scatter(state: AnyState, rows: list[int], fresh: AnyState) -> AnyState:
    """`state` with row i of `fresh` in row `rows[i]`."""
    index = torch.tensor(rows, device=state.labels.device)
    new = _tensors(fresh)
    filled: dict[str, Any] = {
        name: value.index_copy(0, index, new[name]) for name, value in _tensors(state).items()
    }
    return dataclasses.replace(state, **filled)


def freeze(active: Tensor, old: AnyState, new: AnyState) -> AnyState:
    """`new` for rows in `active` (S,) bool, `old` for the others: rows that ended stay as they ended."""
    before = _tensors(old)
    changed: dict[str, Any] = {
        name: torch.where(spread(active, value), value, before[name])
        for name, value in _tensors(new).items()
        if value is not before[name]
    }
    return dataclasses.replace(new, **changed)
