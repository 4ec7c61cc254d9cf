"""Smaller shapes for the end of a run, where few images are left: only those that give the same bits.

The numbers of a row may depend on the shape of the call that it is in, so calls have one fixed shape. But
where a model gives the very same bits in a call of half the rows, idle rows need not be paid for. No library
promises that, so each model is asked, on its own images, in the run that is about to use it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustbench_vlm.engine import losses
from robustbench_vlm.engine.interface import Oracle

LEAST = 8  # rows, and their multiples: whole vectors, and on a CPU the cost of a row is that of a full call


def halves(rows: int) -> list[int]:
    """The smaller shapes that may be tried, largest first."""
    found = []
    while rows % (2 * LEAST) == 0:
        rows //= 2
        found.append(rows)
    return found


@dataclass
class Shapes:
    """The shapes of one run: the full one, and smaller ones once they were seen to give its bits.

    A shape is looked at when it is first wanted, by a call or two of its own rows; the first look costs a
    gradient of the full shape as well.

    Attributes:
        oracle: the model as attacks see it.
        images: (n, 3, H, W); taken in turn they fill the calls that are compared.
        labels: (n,) int64.
        logits: (n, C) of the images, in the full shape.
        rows: the full shape.
        gradients: whether gradients are asked for as well.
        known: whether each shape looked at gives the same bits.
    """

    oracle: Oracle
    images: Tensor
    labels: Tensor
    logits: Tensor
    rows: int
    gradients: bool
    known: dict[int, bool] = field(default_factory=dict)
    _full: list[Tensor] = field(default_factory=list)

    def smallest(self, wanted: int) -> int:
        """The smallest shape of the same bits that has room for `wanted` rows."""
        for shape in reversed(halves(self.rows)):
            if shape >= wanted:
                if shape not in self.known:
                    self.known[shape] = self._same(shape)
                if self.known[shape]:
                    return shape
        return self.rows

    @property
    def some(self) -> bool:
        """Whether a smaller shape was found."""
        return any(self.known.values())

    def _same(self, shape: int) -> bool:
        """Whether the last rows of a full call have the same bits in a call of their own."""
        turn = torch.arange(self.rows, device=self.images.device) % len(self.images)
        if not self._full:
            self._full = [self.logits[turn], *self._differentiated(turn)]
        part = turn[-shape:]
        own = [self.oracle.logits(self.images[part]), *self._differentiated(part)]
        # values are compared, and NaN differs from itself: then nothing counts as the same
        return all(torch.equal(a[-shape:], b) for a, b in zip(self._full, own, strict=True))

    def _differentiated(self, chosen: Tensor) -> list[Tensor]:
        """Logits and image gradient of a call, where gradients are asked for."""
        if not self.gradients:
            return []
        labels = self.labels[chosen]
        seen = self.oracle.gradient(
            self.images[chosen], lambda logits: losses.cross_entropy(logits, labels, labels)
        )
        return [seen.logits, seen.gradient]
