"""The model as attacks call it: logits, or an image gradient, always for all rows.

If memory runs out in a call, the call is made again in parts of half the rows. Attacks do not notice, and the
run then takes a smaller shape (`row_table`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

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
    """Model calls so far.

    Attributes:
        forwards: without gradient.
        gradients: image gradients.
        largest: rows of the largest call.
        fitting: rows of the largest call for which there is memory, as far as is known.
    """

    forwards: int = 0
    gradients: int = 0
    largest: int = 0
    fitting: int = sys.maxsize


@dataclass(frozen=True)
class Oracle:
    """A classifier that gives logits and image gradients in float32, whatever precision it works in.

    Attributes:
        classify: (S, 3, H, W) in [0, 1] -> logits (S, C).
        calls: how often it was called.
        once: whether a forward can be differentiated only once, because a compiled or replayed model
            overwrites what further backward passes need. Then every gradient has a forward of its own.
        fixed: whether the classifier takes calls of one shape only.
    """

    classify: Classify
    calls: Calls = field(default_factory=Calls)
    once: bool = False
    fixed: bool = False

    def logits(self, images: Tensor) -> Tensor:
        """(S, 3, H, W) -> (S, C), without gradient."""
        while True:
            try:
                with torch.no_grad():  # a model may write into its input
                    found = [self._classified(part.clone()).detach().float() for part in self._parts(images)]
            except (RuntimeError, MemoryError) as error:
                self._halve(len(images), error)
            else:
                self.calls.forwards += len(found)
                return found[0] if len(found) == 1 else torch.cat(found)

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
        done = 0
        while True:
            whole = len(images) <= self.calls.fitting
            found = (self._evaluations if whole else self._evaluations_in_parts)(images, objectives)
            try:
                for evaluation in islice(found, done, None):
                    done += 1
                    yield evaluation
            except (RuntimeError, MemoryError) as error:
                self._halve(len(images), error)
            else:
                return

    def _evaluations(self, images: Tensor, objectives: Callable[[Tensor], Tensor]) -> Iterator[Evaluation]:
        leaf, logits, values = self._forward(images, objectives)
        last = values.shape[1] - 1
        for number in range(last + 1):
            if number and self.once:
                leaf, logits, values = self._forward(images, objectives)
            again = number < last and not self.once
            gradient = self._gradient(leaf, values[:, number].sum(), again=again)
            yield _evaluation(logits, values[:, number], gradient)

    def _evaluations_in_parts(
        self, images: Tensor, objectives: Callable[[Tensor], Tensor]
    ) -> Iterator[Evaluation]:
        """The same by the chain rule: objectives need all rows, the model gets a part of them at a time."""
        logits = self.logits(images).requires_grad_()
        with torch.enable_grad():
            values = objectives(logits)
        for number in range(values.shape[1]):
            (weights,) = torch.autograd.grad(values[:, number].sum(), logits, retain_graph=True)
            gradients = []
            for part, weight in zip(self._parts(images), self._parts(weights), strict=True):
                leaf, _, weighted = self._forward(part, partial(torch.mul, weight))
                gradients.append(self._gradient(leaf, weighted.sum(), again=False))
            yield _evaluation(logits, values[:, number], torch.cat(gradients))

    def _parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The rows of a call in parts that fit into memory."""
        return torch.split(tensor, min(max(len(tensor), 1), self.calls.fitting))

    def _halve(self, rows: int, error: Exception) -> None:
        """After a call failed: take half the rows from now on.

        Raises:
            Exception: it failed for something else than memory, or no smaller call can be made.
        """
        failed = min(rows, self.calls.fitting)
        if self.fixed or failed < 2 or not out_of_memory(error):
            raise error
        self.calls.fitting = -(-failed // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _classified(self, images: Tensor) -> Tensor:
        self.calls.largest = max(self.calls.largest, len(images))
        return self.classify(images).clone()  # a model may write its next logits into the same memory

    def _forward(
        self, images: Tensor, objectives: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Leaf, logits and values, with their graph."""
        leaf = images.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._classified(leaf.clone()).float()
            return leaf, logits, objectives(logits)

    def _gradient(self, leaf: Tensor, value: Tensor, *, again: bool) -> Tensor:
        """The gradient of a number; `again` keeps the graph for another backward pass."""
        self.calls.gradients += 1
        if not value.requires_grad:
            raise AttackError("the model gives no gradient with respect to the image: is it under no_grad?")
        (gradient,) = torch.autograd.grad(value, leaf, retain_graph=again, allow_unused=True)
        if gradient is None:
            raise AttackError("the model's logits do not depend on the image")
        return gradient


def _evaluation(logits: Tensor, values: Tensor, gradient: Tensor) -> Evaluation:
    # The largest size gives both flags: a maximum passes on NaN and infinity.
    flat = gradient.flatten(1)
    largest = torch.maximum(flat.amax(1), -flat.amin(1))
    finite = torch.isfinite(largest + logits.detach().sum(1))
    return Evaluation(logits.detach(), values.detach(), gradient, finite, largest == 0)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, on a CPU or on another device."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "can't allocate memory" in str(error)
