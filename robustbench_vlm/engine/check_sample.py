"""The images on which a model is checked, in calls of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from robustbench_vlm.engine import canonical, losses
from robustbench_vlm.engine.probe import Probe
from robustbench_vlm.types import Classify

UNITS = 64
"""Rounding of a float32 logit between calls: other rows or kernels, in units of the last place."""
NEAR = 10
"""Multiple of a change of the logits below which a clean margin counts as near to it."""


@dataclass(frozen=True)
class CheckSample:
    """Images that fill calls of one shape; the first `n` are checked, the others are copies.

    Attributes:
        probe: the model.
        images: (m, 3, H, W), m a multiple of the rows of a call.
        labels: (m,) int64.
        keys: n names.
        logits: (m, C) of the first calls.
    """

    probe: Probe
    images: Tensor
    labels: Tensor
    keys: tuple[str, ...]
    logits: Tensor

    @staticmethod
    def of(classify: Classify, images: Tensor, labels: Tensor, keys: Sequence[str], rows: int) -> CheckSample:
        """Of a classifier, images (n, 3, H, W) with labels (n,) and names, and the rows of a call."""
        probe, whole = Probe.of(classify, rows), -(-len(keys) // rows) * rows
        batch = canonical.padded(images, whole)
        return CheckSample(probe, batch, canonical.padded(labels, whole), tuple(keys), probe.logits(batch))

    @property
    def n(self) -> int:
        """Number of images that are checked."""
        return len(self.keys)

    @property
    def rounding(self) -> float:
        """By how much rounding may change a logit from one call to another."""
        return self.probe.rounding(self.logits[: self.n], UNITS)

    @property
    def right(self) -> Tensor:
        """(n,) bool: finite and classified correctly, so that it can be attacked."""
        logits, labels = self.logits[: self.n], self.labels[: self.n]
        return logits.isfinite().all(1) & (logits.argmax(1) == labels)

    def change(self, other: Tensor, rows: Tensor | None = None) -> float:
        """Largest change of a logit from the first call, where both are finite.

        Args:
            other: (m, C) logits of other calls.
            rows: (k,) int64 the rows to compare; all that are checked if None.
        """
        moved = (other - self.logits)[: self.n] if rows is None else (other - self.logits)[rows]
        return float(moved.abs().nan_to_num(nan=0.0, posinf=0.0).max()) if len(moved) else 0.0

    def near(self, change: float) -> int:
        """Number of images whose clean margin is so small that `change` could change the prediction."""
        margins = losses.correct_margin(self.logits[: self.n], self.labels[: self.n])
        return int((margins.abs() < NEAR * change).sum())
