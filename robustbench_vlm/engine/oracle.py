"""The model as attacks call it: logits, or an image gradient, always for all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustbench_vlm.errors import AttackError
from robustbench_vlm.types import Classify


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of an objective with its gradient, at S rows.

    Attributes:
        logits: (S, C).
        values: (S,) the objective, which attacks maximise.
        gradient: (S, 3, H, W) gradient of each row's own value.
        finite: (S,) bool, all logits and gradient entries are finite.
        zero: (S,) bool, the gradient is exactly zero everywhere.
    """

    logits: Tensor
    values: Tensor
    gradient: Tensor
    finite: Tensor
    zero: Tensor


@dataclass
class Calls:
    """Model calls so far: forwards without gradient, and image gradients."""

    forwards: int = 0
    gradients: int = 0


@dataclass(frozen=True)
class Oracle:
    """A classifier that gives logits and image gradients in float32, whatever precision it works in.

    Attributes:
        classify: (S, 3, H, W) in [0, 1] -> logits (S, C).
        calls: how often it was called.
        once: whether a forward can be differentiated only once, because a compiled or replayed model
            overwrites what further backward passes need. Then every gradient has a forward of its own.
    """

    classify: Classify
    calls: Calls = field(default_factory=Calls)
    once: bool = False

    def logits(self, images: Tensor) -> Tensor:
        """(S, 3, H, W) -> (S, C), without gradient."""
        self.calls.forwards += 1
        with torch.no_grad():
            return self.classify(images.clone()).detach().float()  # a model may write into its input

    def gradient(self, images: Tensor, objective: Callable[[Tensor], Tensor]) -> Evaluation:
        """Evaluate and differentiate `objective` (logits (S, C) -> (S,)) at `images`.

        The sum over rows is differentiated, so each row's gradient is its own whatever S is. Parameters
        never receive a gradient.

        Raises:
            AttackError: the logits do not depend on the image through differentiable operations.
        """
        (evaluation,) = self.gradients(images, lambda logits: objective(logits)[:, None])
        return evaluation

    def gradients(self, images: Tensor, objectives: Callable[[Tensor], Tensor]) -> Iterator[Evaluation]:
        """As `gradient`, for M objectives (logits (S, C) -> (S, M)): one forward, M backward passes.

        Evaluations are yielded one after the other, so that one gradient needs to be in memory at a time.
        """
        leaf, logits, values = self._forward(images, objectives)
        last = values.shape[1] - 1
        for number in range(last + 1):
            if number and self.once:
                leaf, logits, values = self._forward(images, objectives)
            again = number < last and not self.once
            yield self._differentiate(leaf, logits, values[:, number], again=again)

    def _forward(
        self, images: Tensor, objectives: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Leaf, logits and values, with their graph."""
        leaf = images.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.classify(leaf.clone()).float()
            return leaf, logits, objectives(logits)

    def _differentiate(self, leaf: Tensor, logits: Tensor, values: Tensor, *, again: bool) -> Evaluation:
        """The gradient of `values` (S,); `again` keeps the graph for another backward pass."""
        self.calls.gradients += 1
        if not values.requires_grad:
            raise AttackError("the model gives no gradient with respect to the image: is it under no_grad?")
        (gradient,) = torch.autograd.grad(values.sum(), leaf, retain_graph=again, allow_unused=True)
        if gradient is None:
            raise AttackError("the model's logits do not depend on the image")
        # One reduction gives both flags: a maximum passes on NaN and infinity.
        largest = gradient.flatten(1).abs().amax(1)
        finite = torch.isfinite(largest + logits.detach().sum(1))
        return Evaluation(logits.detach(), values.detach(), gradient, finite, largest == 0)
