"""Projected gradient descent.

Madry et al., "Towards deep learning models resistant to adversarial attacks" (ICLR 2018).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from robustbench_vlm.engine import geometry, losses
from robustbench_vlm.engine.interface import (
    Alone,
    Evaluation,
    Oracle,
    Rows,
    State,
    common,
    misclassified,
    pick,
    progress,
)
from robustbench_vlm.engine.stopping import best_iterate
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat, parse_eps


@dataclass(frozen=True)
class PgdState(State):
    """PGD's rows, and those of its relatives.

    Attributes:
        ahead: (S, 3, H, W) the iterate that follows `x`; when the row is done, the last iterate, unjudged.
        last, peak: see `stopping.BestIterate`; followed only under `stop=best`.
    """

    ahead: Tensor
    last: Tensor
    peak: Tensor

    @property
    def adv(self) -> Tensor:
        """The success if there is one, else the last iterate; under `stop=last` the last iterate."""
        if self.stop == "best":
            return self.last
        return pick(self.done & ~self.broken, self.ahead, self.x)


AnyPgd = TypeVar("AnyPgd", bound=PgdState)


@dataclass(frozen=True)
class Pgd(Alone):
    """Fixed-step ascent; under `stop=last` the last iterate is judged, whatever came before.

    Under `stop=best` the last iterate is evaluated like the others, which costs one gradient more.

    Attributes:
        loss: a name of `losses.LOSSES` that aims at no class.
        steps: gradient steps.
        step_size: `eps/N` as a share of the radius, or a length such as `1/255`.
        restarts: trajectories with fresh noise.
        random_start: start at a random point of the ball instead of at the image.
    """

    loss: losses.Name
    steps: int
    step_size: str
    restarts: int
    random_start: bool

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    def __post_init__(self) -> None:
        losses.require_untargeted("pgd", self.loss)
        if self.steps < 1 or self.restarts < 1:
            raise InputError("pgd", f"steps {self.steps}, restarts {self.restarts}", "at least 1 of each")
        step_length(self.step_size, Threat("linf", Fraction(1, 255)))

    def ranks(self, n_classes: int) -> int:  # noqa: ARG002 - the same for every number of classes
        """Untargeted."""
        return 0

    def substitutions(self, n_classes: int) -> list[str]:
        """DLR with 2 classes becomes the margin."""
        return losses.few_classes(self.loss, 0, n_classes)

    def cost(self, n_classes: int) -> tuple[int, int]:  # noqa: ARG002 - the same for every number of classes
        """One gradient a step; the last iterate is judged by the canonical pass."""
        return self.steps * self.restarts, self.steps * self.restarts

    def start(self, rows: Rows, threat: Threat) -> PgdState:
        """A random point of the ball, clipped into the box, or the image itself."""
        images = rows.images
        x = geometry.uniform_start(images, threat, rows.noise) if self.random_start else images.clone()
        return begin(rows, threat, x)

    def step(self, state: PgdState, oracle: Oracle) -> PgdState:
        """Evaluate the next iterate and compute the one that follows it."""
        seen = look(self.loss, state, oracle)
        size = step_length(self.step_size, state.threat)
        return advanced(state, seen, geometry.direction(seen.gradient, state.threat).mul_(size), self.steps)


def begin(rows: Rows, threat: Threat, x: Tensor) -> PgdState:
    """Rows that are about to evaluate `x`."""
    peak = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    return PgdState(**common(rows, threat, x), ahead=x.clone(), last=x, peak=peak)


def look(loss: losses.Name, state: PgdState, oracle: Oracle) -> Evaluation:
    """The evaluation of the next iterate."""

    def objective(logits: Tensor) -> Tensor:
        return losses.LOSSES[losses.effective(loss, logits.shape[1])](logits, state.labels, state.targets)

    return oracle.gradient(state.ahead, objective)


def advanced(state: AnyPgd, seen: Evaluation, move: Tensor, steps: int) -> AnyPgd:
    """The state after an evaluation, with the projected move as the iterate that follows.

    Args:
        state: before it.
        seen: of `state.ahead`.
        move: (S, 3, H, W), spent.
        steps: moves of a trajectory.
    """
    changes: dict[str, Any] = {}
    if state.stop != "last":
        changes = best_iterate(state, state.ahead, seen.values, misclassified(seen.logits, state.labels))
    iteration = state.iteration + 1
    return dataclasses.replace(
        state,
        x=state.ahead,
        ahead=geometry.project(move.add_(state.ahead), state.images, state.threat),
        iteration=iteration,
        done=iteration >= steps + (state.stop == "best"),
        **progress(state, seen.values),
        **changes,
        nonfinite=~seen.finite,
        zero_gradients=state.zero_gradients + seen.zero,
    )


def step_length(text: str, threat: Threat) -> float:
    """The length of a step: `eps/N` relative to the radius, else a length in the notation of eps.

    Raises:
        InputError: neither of the two forms.
    """
    word, slash, share = text.replace(" ", "").partition("/")
    if word != "eps":
        return float(parse_eps(text, threat.norm))
    try:
        return float(threat.eps / Fraction(share) if slash else threat.eps)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"step size {text!r}", "no such share of the radius", "eps/4 or 1/255") from None


plugin = Pgd
