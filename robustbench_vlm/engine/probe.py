"""A model to be checked: counted calls of one shape, and how much rounding is to be expected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn

from robustbench_vlm.engine import canonical, losses
from robustbench_vlm.engine.oracle import Evaluation, Oracle
from robustbench_vlm.types import Classify

FLOAT32 = torch.finfo(torch.float32).eps
LOW = (torch.float16, torch.bfloat16)
LOW_UNITS = 4
"""Units in the last place by which rounding may change a logit of a model that works in 16 bits."""


class Observed:
    """A classifier that notes the coarsest floating point type in which it works.

    Attributes:
        eps: relative spacing of that type, at least that of float32.
    """

    def __init__(self, classify: Classify) -> None:
        self._classify = classify
        kinds = {p.dtype for p in classify.parameters()} if isinstance(classify, nn.Module) else set()
        self.eps = max([FLOAT32, *(torch.finfo(kind).eps for kind in kinds if kind in LOW)])

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C) logits."""
        logits = self._classify(images)
        if isinstance(logits, Tensor):
            kinds = {logits.dtype} | (_types(logits) if torch.is_grad_enabled() else set())
            self.eps = max([self.eps, *(torch.finfo(kind).eps for kind in kinds if kind in LOW)])
        return logits


def _types(logits: Tensor) -> set[torch.dtype]:
    """Types of all intermediate results through which the gradient of `logits` flows."""
    found: set[torch.dtype] = set()
    met, nodes = set(), [logits.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in met:
            continue
        met.add(node)
        # A private attribute, but the only place where autograd tells the type of an intermediate result.
        found |= {metadata.dtype for metadata in getattr(node, "_input_metadata", ())}
        nodes += [function for function, _ in node.next_functions]
    return found


@dataclass(frozen=True)
class Probe:
    """A model with counted calls, each of exactly `rows` rows.

    Attributes:
        oracle: its calls and counts.
        rows: of every call.
    """

    oracle: Oracle
    rows: int

    @staticmethod
    def of(classify: Classify, rows: int) -> Probe:
        """Of a classifier."""
        return Probe(Oracle(Observed(classify)), rows)

    @property
    def eps(self) -> float:
        """Relative spacing of the coarsest type in which the model was seen to work, at least float32's."""
        classify = self.oracle.classify
        return classify.eps if isinstance(classify, Observed) else FLOAT32

    @property
    def low(self) -> bool:
        """Whether the model works in 16 bits."""
        return self.eps > FLOAT32

    def rounding(self, logits: Tensor, units: int, low_units: int = LOW_UNITS) -> float:
        """By how much rounding may change a logit.

        Args:
            logits: (n, C), of which the largest counts.
            units: in the last place, of a model that works in float32.
            low_units: the same of a model that works in 16 bits.
        """
        largest = float(logits.abs().nan_to_num(nan=0.0, posinf=0.0).max())
        return (low_units if self.low else units) * self.eps * largest

    def logits(self, images: Tensor) -> Tensor:
        """Logits (n, C) of images (n, 3, H, W), in as few calls as the shape allows."""

        def counted(batch: Tensor) -> Tensor:
            self.oracle.calls.forwards += 1
            return self.oracle.classify(batch)

        return canonical.logits(counted, images, self.rows)

    def gradients(
        self, images: Tensor, labels: Tensor, objectives: Callable[[Tensor, Tensor], Tensor]
    ) -> list[Evaluation]:
        """Evaluate and differentiate M objectives.

        Args:
            images: (n, 3, H, W), n a multiple of `rows`.
            labels: (n,) int64.
            objectives: labels (rows,) and logits (rows, C) of a call -> (rows, M).
        """
        parts = zip(torch.split(images, self.rows), torch.split(labels, self.rows), strict=True)
        calls = [list(self.oracle.gradients(part, partial(objectives, own))) for part, own in parts]
        names = [field.name for field in fields(Evaluation)]
        return [
            Evaluation(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
            for parts in zip(*calls, strict=True)
        ]

    def margins(self, images: Tensor, labels: Tensor, rivals: Tensor) -> Tensor:
        """(n,) float64 logit of a fixed wrong class minus that of the true one.

        Args:
            images: (n, 3, H, W).
            labels: (n,) int64 true classes.
            rivals: (n,) int64 wrong classes.
        """
        return losses.targeted_margin(self.logits(images).double(), labels, rivals)

    def margin_gradients(self, images: Tensor, labels: Tensor, rivals: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients (n, 3, H, W) of `margins` at images (n, 3, H, W), and the logits (n, C)."""
        rows = self.rows

        def of_chunk(begin: int) -> tuple[Tensor, Tensor]:
            part = slice(begin, begin + rows)
            right, wrong = canonical.padded(labels[part], rows), canonical.padded(rivals[part], rows)

            def objective(logits: Tensor) -> Tensor:
                return losses.targeted_margin(logits, right, wrong)

            found = self.oracle.gradient(canonical.padded(images[part], rows), objective)
            n = len(images[part])
            return found.gradient[:n], found.logits[:n]

        chunks = [of_chunk(begin) for begin in range(0, len(images), rows)]
        gradients, logits = zip(*chunks, strict=True)
        return torch.cat(gradients), torch.cat(logits)
