"""Auto-PGD: ascent with momentum that halves its step where progress stalls and restarts from its best point.

Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks" (ICML 2020), algorithm 1. Where paper and released code differ, this follows the code, because
published numbers do: the oscillation test is `<=`, the first window compares with a loss of zero, and a
restart from the best point leaves the previous iterate as it was.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_vlm.engine import geometry, losses
from robustbench_vlm.engine.interface import Attack, Rows, initial
from robustbench_vlm.engine.oracle import Evaluation, Oracle
from robustbench_vlm.engine.row_ops import misclassified, pick, spread
from robustbench_vlm.engine.stopping import BestIterateState, best_iterate, nothing_chosen
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat

MOMENTUM = 0.75  # weight of the projected step; the rest goes to the previous move
FIRST, LEAST, SHRINK = 0.22, 0.06, 0.03  # window lengths as shares of the steps: first, shortest, decrement


@dataclass(frozen=True)
class ApgdState(BestIterateState):
    """The rows of APGD.

    Attributes:
        lower, upper: (S, 3, H, W) limits of each pixel.
        previous: the iterate before `x`.
        gradient: at `x`.
        loss_names: losses that rows of this state may have.
        loss: (S,) int64, index of each row's own loss in `losses.NAMES`.
        best, best_gradient: the evaluation of largest loss, `best_value`.
        check_loss: (S,) best loss at the last checkpoint.
        last_loss: (S,) loss of the evaluation before, 0 before the first move.
        size: (S,) step length.
        window: (S,) int64, length of the current window.
        count: (S,) int64, iterations since the window began.
        rises: (S,) int64, how many of them raised the loss.
        reduced: (S,) bool, the last checkpoint halved the step (true at first).
        pending: (S,) bool, the next move halves the step and starts from the best point.
    """

    lower: Tensor
    upper: Tensor
    previous: Tensor
    gradient: Tensor
    loss_names: tuple[losses.Name, ...]
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    check_loss: Tensor
    last_loss: Tensor
    size: Tensor
    window: Tensor
    count: Tensor
    rises: Tensor
    reduced: Tensor
    pending: Tensor


@dataclass(frozen=True)
class Apgd(Attack):
    """Auto-PGD, untargeted or over the most likely wrong classes.

    Attributes:
        loss: a name of `losses.LOSSES`.
        steps: moves; a trajectory is evaluated `steps + 1` times.
        rho: share of rising iterations at or below which a window counts as oscillating.
        restarts: trajectories with fresh noise, for each target.
        targets: target classes for a targeted loss, most likely first; 0 otherwise.
    """

    loss: losses.Name
    steps: int
    rho: float
    restarts: int
    targets: int

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1:
            raise InputError("apgd", f"steps {self.steps}, restarts {self.restarts}", "at least 1 of each")
        losses.require_targets("apgd", self.loss, self.targets)

    @property
    def passes(self) -> tuple[int, int]:
        """One gradient at the start, and one for each step."""
        return self.steps + 1, self.steps + 1

    def shares_rows(self, other: Attack) -> bool:
        """With another loss if steps and rho are equal; each row is stepped with its own loss."""
        if not isinstance(other, Apgd) or type(other) is not type(self):
            return False
        return (self.steps, self.rho) == (other.steps, other.rho)

    def start(self, rows: Rows, threat: Threat) -> ApgdState:
        """A random point that touches the ball's surface."""
        images = rows.images
        x = geometry.surface_start(images, threat, rows.noise)
        lower, upper = geometry.bounds(images, threat)
        zero = torch.zeros_like(rows.labels)
        number = torch.zeros(len(rows.labels), dtype=images.dtype, device=images.device)
        yes = torch.ones_like(rows.labels, dtype=torch.bool)
        return ApgdState(
            **initial(rows, threat, x),
            **nothing_chosen(x),
            lower=lower,
            upper=upper,
            previous=x,
            gradient=torch.zeros_like(x),
            loss_names=rows.loss_names or (self.loss,),
            loss=zero + losses.NAMES.index(self.loss),
            best=x,
            best_gradient=torch.zeros_like(x),
            check_loss=number,
            last_loss=number,
            size=number + 2 * geometry.radius(threat),
            window=zero + windows(self.steps)[0],
            count=zero,
            rises=zero,
            reduced=yes,
            pending=~yes,
        )

    def step(self, state: ApgdState, oracle: Oracle) -> ApgdState:
        """Move (not at a row's first iteration), evaluate, and update best point, window and step length."""
        at = pick(state.pending, state.best, state.x)
        gradient = pick(state.pending, state.best_gradient, state.gradient)
        size = torch.where(state.pending, state.size / 2, state.size)
        x = _move(state, at, gradient, size)
        evaluation = self._evaluate(state, x, oracle)
        wrong = misclassified(evaluation.logits, state.labels)
        moved = dataclasses.replace(
            state,
            x=x,
            previous=at,
            gradient=evaluation.gradient,
            size=size,
            **best_iterate(state, x, evaluation.values, wrong),
            iteration=state.iteration + 1,
            done=state.iteration >= self.steps,
            nonfinite=~evaluation.finite,
            zero_gradients=state.zero_gradients + evaluation.zero,
            start_value=torch.where(state.iteration == 0, evaluation.values, state.start_value),
        )
        return self._updated(moved, evaluation)

    def _evaluate(self, state: ApgdState, x: Tensor, oracle: Oracle) -> Evaluation:
        """Each row's own loss at `x`, with its gradient."""
        names, labels, targets = state.loss_names, state.labels, state.targets
        return oracle.gradient(x, lambda logits: losses.of_rows(names, state.loss, logits, labels, targets))

    def _updated(self, state: ApgdState, evaluation: Evaluation) -> ApgdState:
        """Best point, windows and checkpoints after an evaluation."""
        begun = state.iteration > 1  # the evaluation of the start is no move: it opens the first window
        better = evaluation.values > state.best_value
        best_value = torch.where(better, evaluation.values, state.best_value)
        check_loss = torch.where(begun, state.check_loss, best_value)
        count = state.count + begun
        rises = state.rises + (begun & (evaluation.values > state.last_loss))

        ends = begun & (count == state.window)
        oscillates = rises <= self.rho * state.window
        stale = ~state.reduced & (check_loss >= best_value)
        reduce = ends & (oscillates | stale)
        _, least, shrink = windows(self.steps)
        return dataclasses.replace(
            state,
            best=pick(better, state.x, state.best),
            best_gradient=pick(better, evaluation.gradient, state.best_gradient),
            best_value=best_value,
            check_loss=torch.where(ends, best_value, check_loss),
            last_loss=torch.where(begun, evaluation.values, state.last_loss),
            window=torch.where(ends, (state.window - shrink).clamp(min=least), state.window),
            count=torch.where(ends, 0, count),
            rises=torch.where(ends, 0, rises),
            reduced=torch.where(ends, reduce, state.reduced),
            pending=reduce,
        )


def windows(steps: int) -> tuple[int, int, int]:
    """First length, shortest length and decrement of the windows between checkpoints."""
    return max(int(FIRST * steps), 1), max(int(LEAST * steps), 1), max(int(SHRINK * steps), 1)


def checkpoints(steps: int) -> list[int]:
    """Numbers of moves after which the step may be halved."""
    window, least, shrink = windows(steps)
    found, at = [], window
    while at <= steps:
        found.append(at)
        window = max(window - shrink, least)
        at += window
    return found


def _move(state: ApgdState, at: Tensor, gradient: Tensor, size: Tensor) -> Tensor:
    """The next point of every row; rows that were never evaluated stay at their start.

    Products and sums are separate operations, in this order: fused ones round differently, and then the
    iterates differ from those of the reference.
    """
    weight = torch.where(state.iteration == 1, 1.0, MOMENTUM)  # the first move has no move before it
    linf = state.threat.norm == "linf"
    if linf:  # a product with a sign is exact, so the fused operation gives the bits of a product and a sum
        step = gradient.sign()
        torch.addcmul(at, step, spread(size, at), out=step).clamp_(state.lower, state.upper)
    else:
        step = geometry.direction(gradient, state.threat).mul_(spread(size, at)).add_(at)
        step = geometry.project(step, state.images, state.threat)
    step = step.sub_(at).mul_(spread(weight, at)).add_(at)
    step.addcmul_(at - state.previous, spread(1 - weight, at))  # so is a product with a quarter, or with 0
    if linf:
        return step.clamp_(state.lower, state.upper)  # a fresh row has gradient 0 and is where it was
    step = geometry.project(step, state.images, state.threat)
    return pick(state.iteration == 0, state.x, step)


plugin = Apgd
