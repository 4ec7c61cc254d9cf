"""Smaller call shapes for the end of a run, where few images are left; only those that give the same bits.

The numbers of a row may depend on the shape of the call that it is in, so calls have one fixed shape. But
where a model gives the very same bits in a call of half the rows, idle rows need not be computed. No library
promises that, so each model is tested on its own images, in the run that is about to use the shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustbench_vlm.engine import losses
from robustbench_vlm.engine.oracle import Oracle

LEAST = 8  # rows; shapes are multiples of it, since vector units then work on whole vectors


def halves(rows: int) -> list[int]:
    """The smaller shapes that may be tried, largest first."""
    found = []
    while rows % (2 * LEAST) == 0:
        rows //= 2
        found.append(rows)
    return found


@dataclass
class Shapes:
    """The shapes of one run: the full one, and smaller ones that were seen to give its bits.

    A shape is tested when it is first wanted, by one or two calls of its own rows; the first test also costs
    a gradient in the full shape.

    Attributes:
        oracle: the model as attacks call it.
        images: (n, 3, H, W); repeated in turn, they fill the calls that are compared.
        labels: (n,) int64.
        logits: (n, C) of the images, in the full shape.
        rows: number of rows of the full shape.
        gradients: whether the attacks take gradients, so that those are compared too.
        tested: whether each tested shape gives the same bits.
    """

    oracle: Oracle
    images: Tensor
    labels: Tensor
    logits: Tensor
    rows: int
    gradients: bool
    tested: dict[int, bool] = field(default_factory=dict)
    _full: list[Tensor] = field(default_factory=list)

    def smallest(self, wanted: int) -> int:
        """The smallest shape of the same bits with at least `wanted` rows."""
        for shape in reversed(halves(self.rows)):
            if shape >= wanted:
                if shape not in self.tested:
                    self.tested[shape] = self._same_bits(shape)
                if self.tested[shape]:
                    return shape
        return self.rows

    @property
    def some(self) -> bool:
        """Whether a smaller shape was found."""
        return any(self.tested.values())

    def _same_bits(self, shape: int) -> bool:
        """Whether the last rows of a full call have the same bits in a call of their own."""
        turn = torch.arange(self.rows, device=self.images.device) % len(self.images)
        if not self._full:
            self._full = [self.logits[turn], *self._differentiated(turn)]
        part = turn[-shape:]
        own = [self.oracle.logits(self.images[part]), *self._differentiated(part)]
        # NaN differs from itself, so a model with NaN keeps the full shape.
        return all(torch.equal(a[-shape:], b) for a, b in zip(self._full, own, strict=True))

    def _differentiated(self, chosen: Tensor) -> list[Tensor]:
        """Logits and image gradient at the images `chosen`; nothing if no attack takes gradients."""
        if not self.gradients:
            return []
        labels = self.labels[chosen]
        evaluation = self.oracle.gradient(
            self.images[chosen], lambda logits: losses.cross_entropy(logits, labels, labels)
        )
        return [evaluation.logits, evaluation.gradient]
