"""The model as a package sees it: in our fixed shape, with nothing that a package could change.

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


class Seen(nn.Module):
    """A classifier, whatever batch a package makes; its calls are counted.

    The classifier is no submodule: a package that sets modes or looks through parameters leaves it alone.

    Attributes:
        forwards: calls of the fixed shape without gradient.
        gradients: calls with an image gradient.
        sick: positions in the batch under attack of images near which a number was not finite.
    """

    def __init__(self, classify: Classify, rows: int, device: torch.device) -> None:
        super().__init__()
        self.rows, self.forwards, self.gradients = rows, 0, 0
        self.sick: set[int] = set()
        self._batch = torch.empty(0)
        self._held = (classify,)
        # some ask the parameters of a model where it is
        self.place = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, C) float32, in memory of its own."""
        if torch.is_grad_enabled() and images.requires_grad:
            logits: Tensor = _Through.apply(images, self)  # type: ignore[no-untyped-call]
            return logits
        with torch.no_grad():
            return self.evaluate(images).clone()

    def evaluate(self, images: Tensor) -> Tensor:
        """The logits by calls of the fixed shape."""
        chunks = torch.split(images, self.rows)
        self.forwards += len(chunks)
        (classify,) = self._held
        logits = torch.cat([classify(canonical.padded(c, self.rows))[: len(c)].float() for c in chunks])
        self.examine(images, logits)
        return logits

    def count_gradient(self, n: int, *, again: bool) -> None:
        """Turn the forward of n images into an image gradient; `again`, it was one already."""
        calls = -(-n // self.rows)
        self.gradients += calls
        self.forwards -= 0 if again else calls

    @contextmanager
    def attacked(self, batch: Tensor) -> Iterator[None]:
        """While images (n, 3, H, W) are under attack; `sick` is about them."""
        self.sick, self._batch = set(), batch.flatten(1)
        yield

    def examine(self, images: Tensor, numbers: Tensor) -> None:
        """Note where `numbers` (m, ...), which belong to `images` (m, 3, H, W), are not finite.

        A package does not say which images it asks about: the nearest clean one is taken.
        """
        images = images.detach().flatten(1)
        bad = ~numbers.detach().flatten(1).isfinite().all(1) & images.isfinite().all(1)
        if bool(bad.any()):
            self.sick |= set(torch.cdist(images[bad], self._batch).argmin(1).tolist())


class _Through(torch.autograd.Function):
    """Logits of a `Seen` whose backward pass ends at the images: parameters never receive a gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, model: Seen) -> Tensor:  # noqa: ANN401 - torch's context
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
        ctx.model.examine(ctx.leaf, found)
        return found, None
