"""Projected gradient descent.

Madry et al., "Towards deep learning models resistant to adversarial attacks" (ICLR 2018).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from robustbench_vlm.engine import geometry, losses
from robustbench_vlm.engine.interface import Attack, Rows, initial, progress
from robustbench_vlm.engine.oracle import Evaluation, Oracle
from robustbench_vlm.engine.row_ops import misclassified, pick
from robustbench_vlm.engine.stopping import BestIterateState, best_iterate, nothing_chosen
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat, parse_eps


@dataclass(frozen=True)
class PgdState(BestIterateState):
    """The rows of PGD and of attacks like it; an iterate is chosen only under `stop=best`.

    Attributes:
        ahead: (S, 3, H, W) the iterate that follows `x`; when the row is done, the last iterate, which was
            not evaluated.
    """

    ahead: Tensor

    @property
    def adv(self) -> Tensor:
        """The success if there is one, else the last iterate; under `stop=last` the last iterate."""
        if self.stop == "best":
            return self.chosen
        return pick(self.done & ~self.broken, self.ahead, self.x)


AnyPgd = TypeVar("AnyPgd", bound=PgdState)


@dataclass(frozen=True)
class Pgd(Attack):
    """Ascent with a fixed step; under `stop=last` it returns the last iterate, whatever came before.

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

    @property
    def passes(self) -> tuple[int, int]:
        """One gradient a step; the canonical pass evaluates the last iterate."""
        return self.steps, self.steps

    def start(self, rows: Rows, threat: Threat) -> PgdState:
        """A random point of the ball, clipped into the box, or the image itself."""
        images = rows.images
        x = geometry.uniform_start(images, threat, rows.noise) if self.random_start else images.clone()
        return begin(rows, threat, x)

    def step(self, state: PgdState, oracle: Oracle) -> PgdState:
        """Evaluate the next iterate and compute the one that follows it."""
        evaluation = evaluate(self.loss, state, oracle)
        move = geometry.direction(evaluation.gradient, state.threat)
        move.mul_(step_length(self.step_size, state.threat))
        return advanced(state, evaluation, move, self.steps)


def begin(rows: Rows, threat: Threat, x: Tensor) -> PgdState:
    """Rows that will evaluate `x` first."""
    return PgdState(**initial(rows, threat, x), **nothing_chosen(x), ahead=x.clone())


def evaluate(loss: losses.Name, state: PgdState, oracle: Oracle) -> Evaluation:
    """The loss and its gradient at the next iterate."""

    def objective(logits: Tensor) -> Tensor:
        return losses.LOSSES[losses.effective(loss, logits.shape[1])](logits, state.labels, state.targets)

    return oracle.gradient(state.ahead, objective)


def advanced(state: AnyPgd, evaluation: Evaluation, move: Tensor, steps: int) -> AnyPgd:
    """The state after an evaluation, with the projected move as the iterate that follows.

    Args:
        state: before it.
        evaluation: of `state.ahead`.
        move: (S, 3, H, W); its memory is written.
        steps: moves of a trajectory.
    """
    changes: dict[str, Any] = {}
    if state.stop != "last":
        wrong = misclassified(evaluation.logits, state.labels)
        changes = best_iterate(state, state.ahead, evaluation.values, wrong)
    iteration = state.iteration + 1
    return dataclasses.replace(
        state,
        x=state.ahead,
        ahead=geometry.project(move.add_(state.ahead), state.images, state.threat),
        iteration=iteration,
        done=iteration >= steps + (state.stop == "best"),
        **progress(state, evaluation.values),
        **changes,
        nonfinite=~evaluation.finite,
        zero_gradients=state.zero_gradients + evaluation.zero,
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
