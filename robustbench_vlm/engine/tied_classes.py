"""Classes that a classifier cannot tell apart, because their text is the same (ImageNet has `missile` twice).

The logits of such twins are equal for every image, so a twin is never *another* class: as one, it would be
the runner-up for ever, and margin and DLR losses would have gradient zero. The attacked function therefore
has one logit for each distinct class. Predictions count as in the field: `argmax` takes the first of the
twins, and accuracy compares its index with the label, so an image of a later twin is never right.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from robustbench_vlm.engine import canonical, losses
from robustbench_vlm.engine.check_record import Check, check
from robustbench_vlm.errors import some
from robustbench_vlm.types import Classify

PROBE_SEED = 0
UNITS = 16
"""Rounding of a float32 logit between columns, in units of the last place of the largest one."""
SHARE = 1e-3
"""Share of its own changes from image to image by which rounding may move a logit."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TiedClasses:
    """Which of C classes are the same.

    Attributes:
        first: for each class, the index of the first class that is the same; its own where there is none.
    """

    first: tuple[int, ...]

    @cached_property
    def distinct(self) -> list[int]:
        """The D classes that are left when twins count once, ascending."""
        return sorted(set(self.first))

    @property
    def twins(self) -> list[int]:
        """The classes that are the same as an earlier one, ascending."""
        return [k for k, first in enumerate(self.first) if first != k]

    def logits(self, logits: Tensor) -> Tensor:
        """(N, C) -> (N, D), one logit for each distinct class."""
        return logits.index_select(1, torch.tensor(self.distinct, device=logits.device))

    def labels(self, labels: Tensor) -> Tensor:
        """(N,) classes of C -> (N,) classes of D."""
        position = {k: i for i, k in enumerate(self.distinct)}
        table = torch.tensor([position[first] for first in self.first], device=labels.device)
        return table[labels]

    def predictions(self, logits: Tensor) -> Tensor:
        """(N, C) -> (N,) int64: the largest logit's class, the first of twins whatever their rounding."""
        return torch.tensor(self.first, device=logits.device)[logits.argmax(1)]

    def correct_margin(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(N,) true logit minus the largest of classes that are no twin of it; of a later twin, at most 0."""
        later = torch.tensor(self.first, device=labels.device)[labels] != labels
        apart = losses.correct_margin(self.logits(logits), self.labels(labels))
        return torch.where(later, losses.correct_margin(logits, labels).clamp(max=0), apart)


class DistinctClasses(nn.Module):
    """A classifier with one logit for each distinct class: (B, 3, H, W) -> (B, D)."""

    def __init__(self, classify: Classify, tied: TiedClasses) -> None:
        super().__init__()
        self.classify = classify
        self.tied = tied
        self.training = bool(getattr(classify, "training", False))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        return self.tied.logits(self.classify(images))


def check_of(tied: TiedClasses) -> Check:
    """The record that says which classes were attacked as one."""
    pairs = some([f"{k} as {tied.first[k]}" for k in tied.twins])
    sentence = f"classes with the same logits for every image are attacked as one: {pairs}"
    return check("tied-classes", "warn", float(len(tied.twins)), 0.0, sentence)


def grouped(texts: Sequence[Hashable]) -> TiedClasses | None:
    """The classes whose values are equal; None if all C differ."""
    seen: dict[Hashable, int] = {}
    first = tuple(seen.setdefault(text, k) for k, text in enumerate(texts))
    return TiedClasses(first) if len(seen) < len(first) else None


def of_bank(bank: Tensor) -> TiedClasses | None:
    """The classes whose rows of (C, D) are equal bit by bit; None if all C differ."""
    return grouped([row.tobytes() for row in bank.cpu().numpy()])


def found_in(classify: Classify, images: Tensor, clean: Tensor, rows: int) -> TiedClasses | None:
    """The classes whose logits are equal for every image, apart from rounding; None if there are none.

    Where clean logits have equal columns, `rows` images of noise are classified too, so that classes which
    are equal on few images by chance are not taken for twins. Columns that never change are no evidence.

    Args:
        classify: a classifier of pixels.
        images: (N, 3, H, W) in [0, 1].
        clean: (N, C) its logits.
        rows: rows of every call.
    """
    if _equal_columns(clean) is None:
        return None
    noise = torch.rand((rows, *images.shape[1:]), generator=torch.Generator().manual_seed(PROBE_SEED))
    probed = canonical.logits(classify, noise.to(images.device), rows)
    return _equal_columns(torch.cat([clean, probed.to(clean.device)]))


def _equal_columns(logits: Tensor) -> TiedClasses | None:
    """The classes with the same logits in all of (N, C), apart from constant columns.

    Columns of one matrix product are rounded differently, so those of twins need not have the same bits.
    What is taken for rounding is also far below what the columns change by themselves: with a large offset,
    rounding alone would hide all differences.
    """
    table = logits.detach().cpu().numpy()
    if not np.isfinite(table).all():
        return None
    change = np.ptp(table, axis=0) if len(table) > 1 else np.full(table.shape[1], np.inf)
    near = np.minimum(change * SHARE, UNITS * np.finfo(np.float32).eps * np.abs(table).max())
    groups = [np.flatnonzero(change)]
    for row in table:
        groups = [part for group in groups for part in _together(row, group, near)]
    first = np.arange(table.shape[1])
    for group in groups:
        first[group] = group.min()
    return TiedClasses(tuple(first.tolist())) if groups else None


def _together(row: Array, group: Array, near: Array) -> list[Array]:
    """The parts of a group of classes whose logits in one row lie near each other, of two classes or more."""
    ascending = group[np.argsort(row[group])]
    apart = np.diff(row[ascending]) > np.minimum(near[ascending[1:]], near[ascending[:-1]])
    return [part for part in np.split(ascending, np.flatnonzero(apart) + 1) if len(part) > 1]
