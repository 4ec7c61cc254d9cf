"""Auto-PGD: ascent with momentum that halves its step by itself and restarts from its best point.

Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks" (ICML 2020), algorithm 1. Where paper and released code differ this follows the code, because
published numbers do: the oscillation test is `<=`, the first window counts from a loss of zero, and a restart
from the best point leaves the previous iterate as it was.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_vlm.engine import geometry, losses
from robustbench_vlm.engine.interface import (
    Alone,
    Attack,
    Evaluation,
    Oracle,
    Rows,
    State,
    common,
    misclassified,
    pick,
    spread,
)
from robustbench_vlm.engine.stopping import best_iterate
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat

MOMENTUM = 0.75  # weight of the projected step; the rest goes to the previous move
FIRST, LEAST, SHRINK = 0.22, 0.06, 0.03  # window lengths as shares of the steps: first, shortest, decrement


@dataclass(frozen=True)
class ApgdState(State):
    """APGD's rows.

    Attributes:
        lower, upper: (S, 3, H, W) limits of each pixel.
        previous: the iterate before `x`.
        gradient: at `x`.
        loss: (S,) int64, index of each row's loss in `losses.LOSSES`.
        best, best_gradient: the evaluation of largest loss, `best_value`.
        check_loss: (S,) best loss at the last checkpoint.
        last_loss: (S,) loss of the evaluation before, 0 before the first move.
        size: (S,) step length.
        window: (S,) int64 length of the current window.
        count: (S,) int64 iterations since its begin.
        rises: (S,) int64 of them in which the loss rose.
        reduced: (S,) bool, the last checkpoint halved the step (true at first).
        pending: (S,) bool, the step is halved and the best point taken up at the next move.
        last, peak: see `stopping.BestIterate`.
    """

    lower: Tensor
    upper: Tensor
    previous: Tensor
    gradient: Tensor
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
    last: Tensor
    peak: Tensor

    @property
    def adv(self) -> Tensor:
        """The current iterate; under `stop=last` the last misclassified one, as the reference returns."""
        return self.x if self.stop == "first" else self.last


@dataclass(frozen=True)
class Apgd(Alone):
    """Auto-PGD, untargeted or over the most likely wrong classes.

    Attributes:
        loss: a name of `losses.LOSSES`.
        steps: moves; each row is evaluated `steps + 1` times.
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
        if losses.targeted(self.loss) != (self.targets > 0):
            raise InputError(
                "apgd.targets",
                f"{self.targets} with loss {self.loss!r}",
                "at least 1 for a targeted loss, 0 for an untargeted one",
            )

    def ranks(self, n_classes: int) -> int:
        """At most every wrong class."""
        return min(self.targets, n_classes - 1)

    def substitutions(self, n_classes: int) -> list[str]:
        """DLR becomes a margin and targets are capped where classes are few."""
        return losses.few_classes(self.loss, self.targets, n_classes)

    def cost(self, n_classes: int) -> tuple[int, int]:
        """One gradient a step and one at x_0, for every target and restart."""
        runs = max(1, self.ranks(n_classes)) * self.restarts * (self.steps + 1)
        return runs, runs

    @property
    def beside(self) -> tuple[losses.Name, ...]:
        """Losses of other stages whose rows stand in the same table."""
        return ()

    def join(self, other: Attack) -> Attack | None:
        """With another loss of equal budget: each row keeps its own loss, and one gradient serves all."""
        if not isinstance(other, Apgd) or self._budget != other._budget:
            return None
        names = {*self.beside, *other.beside, other.loss} - {self.loss}
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Apgd)}
        return _Joint(**own, others=tuple(sorted(names)))

    @property
    def _budget(self) -> tuple[object, ...]:
        return self.steps, self.rho

    def _objective(self, state: ApgdState, logits: Tensor) -> Tensor:
        """(S,) each row's own loss."""
        return losses.of_rows([self.loss, *self.beside], state.loss, logits, state.labels, state.targets)

    def start(self, rows: Rows, threat: Threat) -> ApgdState:
        """A random point that touches the ball's surface."""
        images = rows.images
        x = geometry.surface_start(images, threat, rows.noise)
        lower, upper = geometry.bounds(images, threat)
        zero = torch.zeros_like(rows.labels)
        number = torch.zeros(len(rows.labels), dtype=images.dtype, device=images.device)
        yes = torch.ones_like(rows.labels, dtype=torch.bool)
        return ApgdState(
            **common(rows, threat, x),
            lower=lower,
            upper=upper,
            previous=x,
            gradient=torch.zeros_like(x),
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
            last=x,
            peak=number - torch.inf,
        )

    def step(self, state: ApgdState, oracle: Oracle) -> ApgdState:
        """Move (not at a row's first iteration), evaluate, and keep the books."""
        at = pick(state.pending, state.best, state.x)
        gradient = pick(state.pending, state.best_gradient, state.gradient)
        size = torch.where(state.pending, state.size / 2, state.size)
        x = _move(state, at, gradient, size)
        seen = self._look(state, x, oracle)
        moved = dataclasses.replace(
            state,
            x=x,
            previous=at,
            gradient=seen.gradient,
            size=size,
            **best_iterate(state, x, seen.values, misclassified(seen.logits, state.labels)),
            iteration=state.iteration + 1,
            done=state.iteration >= self.steps,
            nonfinite=~seen.finite,
            zero_gradients=state.zero_gradients + seen.zero,
            start_value=torch.where(state.iteration == 0, seen.values, state.start_value),
        )
        return self._books(moved, seen)

    def _look(self, state: ApgdState, x: Tensor, oracle: Oracle) -> Evaluation:
        """The evaluation of `x`."""
        return oracle.gradient(x, lambda logits: self._objective(state, logits))

    def _books(self, state: ApgdState, seen: Evaluation) -> ApgdState:
        """Best point, windows and checkpoints after an evaluation."""
        begun = state.iteration > 1  # the evaluation of x_0 is no move: it opens the first window
        better = seen.values > state.best_value
        best_value = torch.where(better, seen.values, state.best_value)
        check_loss = torch.where(begun, state.check_loss, best_value)
        count = state.count + begun
        rises = state.rises + (begun & (seen.values > state.last_loss))

        ends = begun & (count == state.window)
        oscillates = rises <= self.rho * state.window
        stale = ~state.reduced & (check_loss >= best_value)
        reduce = ends & (oscillates | stale)
        _, least, shrink = windows(self.steps)
        return dataclasses.replace(
            state,
            best=pick(better, state.x, state.best),
            best_gradient=pick(better, seen.gradient, state.best_gradient),
            best_value=best_value,
            check_loss=torch.where(ends, best_value, check_loss),
            last_loss=torch.where(begun, seen.values, state.last_loss),
            window=torch.where(ends, (state.window - shrink).clamp(min=least), state.window),
            count=torch.where(ends, 0, count),
            rises=torch.where(ends, 0, rises),
            reduced=torch.where(ends, reduce, state.reduced),
            pending=reduce,
        )


@dataclass(frozen=True)
class _Joint(Apgd):
    """Several stages in one table."""

    others: tuple[losses.Name, ...]

    @property
    def beside(self) -> tuple[losses.Name, ...]:
        """Losses of other stages whose rows stand in the same table."""
        return self.others


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
    """The next point of every row, and x_0 for rows that have not been evaluated yet.

    Multiplications and additions are kept apart, and in this order: fused ones round differently, and then
    the iterates are not those of the reference.
    """
    first = state.iteration == 0
    weight = torch.where(state.iteration == 1, 1.0, MOMENTUM)  # the first move has no move before it
    step = geometry.direction(gradient, state.threat).mul_(spread(size, at)).add_(at)
    if state.threat.norm == "linf":
        step.clamp_(state.lower, state.upper)
    else:
        step = geometry.project(step, state.images, state.threat)
    inertia = (at - state.previous).mul_(spread(1 - weight, at))
    step = step.sub_(at).mul_(spread(weight, at)).add_(at).add_(inertia)
    if state.threat.norm == "linf":
        step.clamp_(state.lower, state.upper)
    else:
        step = geometry.project(step, state.images, state.threat)
    return pick(first, state.x, step)


plugin = Apgd
