"""The model as a package is given it: in our fixed shape, with nothing that a package could change.

Packages seed global generators, call `.backward()` where parameters collect gradients, write into the logits
they are given, and turn NaN gradients into zero steps. None of that reaches the model or a verdict.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustbench_vlm.engine import canonical
from robustbench_vlm.errors import AttackError
from robustbench_vlm.types import Classify


class GuardedModel(nn.Module):
    """A classifier that accepts batches of any size, counts its calls and notes numbers that are not finite.

    The classifier is no submodule: a package that sets modes or goes through parameters cannot reach it.

    Attributes:
        rows: number of rows of every call of the classifier.
        forwards: calls of the classifier without gradient.
        gradients: calls of the classifier with an image gradient.
        nonfinite: positions, in the batch under attack, of images near which a logit or gradient was not
            finite.
    """

    def __init__(self, classify: Classify, rows: int, device: torch.device) -> None:
        super().__init__()
        self.rows, self.forwards, self.gradients = rows, 0, 0
        self.nonfinite: set[int] = set()
        self._batch = torch.empty(0)
        self._classify = (classify,)  # a tuple, so that torch does not register a submodule
        # Some packages read the device of the model from its parameters.
        self.on_device = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, C) float32, in memory that the package may write."""
        if torch.is_grad_enabled() and images.requires_grad:
            logits: Tensor = _DetachedParameters.apply(images, self)  # type: ignore[no-untyped-call]
            return logits
        with torch.no_grad():
            return self.evaluate(images).detach().clone()

    def evaluate(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, C) logits, by calls of the fixed shape."""
        chunks = torch.split(images, self.rows)
        self.forwards += len(chunks)
        (classify,) = self._classify
        # The classifier is given copies, since it may write into its input.
        padded = [canonical.padded(chunk, self.rows).clone() for chunk in chunks]
        logits = torch.cat([classify(batch).float() for batch in padded])[: len(images)]
        self.note_nonfinite(images, logits)
        return logits

    def count_gradient(self, n: int, *, again: bool) -> None:
        """Count the forward pass of n images as a gradient; `again` if it was counted as one before."""
        calls = -(-n // self.rows)
        self.gradients += calls
        self.forwards -= 0 if again else calls

    @contextmanager
    def attacked(self, batch: Tensor) -> Iterator[None]:
        """While images (n, 3, H, W) are under attack, `nonfinite` is about them."""
        self.nonfinite, self._batch = set(), batch.flatten(1)
        yield

    def note_nonfinite(self, images: Tensor, numbers: Tensor) -> None:
        """Note for which images some of their `numbers` are not finite.

        A package does not tell which image of the batch a query belongs to: the nearest one is taken.

        Args:
            images: (m, 3, H, W) queries.
            numbers: (m, ...) logits or gradients of the queries.
        """
        images = images.detach().flatten(1)
        bad = ~numbers.detach().flatten(1).isfinite().all(1) & images.isfinite().all(1)
        if bool(bad.any()):
            self.nonfinite |= set(torch.cdist(images[bad], self._batch).argmin(1).tolist())


class _DetachedParameters(torch.autograd.Function):
    """Logits of a `GuardedModel` whose backward pass ends at the images: parameters receive no gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, model: GuardedModel) -> Tensor:  # noqa: ANN401 - torch's context
        leaf = images.detach().requires_grad_()
        with torch.enable_grad():
            logits = model.evaluate(leaf)
        if not logits.requires_grad:
            raise AttackError("the model gives no gradient with respect to the image: is it under no_grad?")
        ctx.model, ctx.leaf, ctx.logits, ctx.again = model, leaf, logits, False
        return logits.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override] # noqa: ANN401
        (found,) = torch.autograd.grad(ctx.logits, ctx.leaf, gradient, retain_graph=True, allow_unused=True)
        if found is None:
            raise AttackError("the model's logits do not depend on the image")
        ctx.model.count_gradient(len(found), again=ctx.again)
        ctx.again = True
        ctx.model.note_nonfinite(ctx.leaf, found)
        return found, None
