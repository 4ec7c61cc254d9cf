"""Momentum iterative FGSM: steps along a decaying sum of normalised gradients.

Dong et al., "Boosting adversarial attacks with momentum" (CVPR 2018), algorithm 1: each gradient is divided
by its L1 norm before it is added; the step is along the sign of the sum, in L2 along its unit vector. A
gradient that is exactly zero adds nothing, where the formula gives 0/0.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_vlm.attacks.pgd import PgdState, advanced, begin, evaluate, step_length
from robustbench_vlm.engine import geometry, losses
from robustbench_vlm.engine.interface import Attack, Rows
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.engine.row_ops import spread
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat

LEAST = 1e-30  # below the L1 norm of every float32 gradient that is not zero


@dataclass(frozen=True)
class MomentumState(PgdState):
    """The rows of MI-FGSM.

    Attributes:
        momentum: (S, 3, H, W) decayed sum of the gradients so far, each of unit L1 norm.
    """

    momentum: Tensor


@dataclass(frozen=True)
class MiFgsm(Attack):
    """MI-FGSM from the image itself; it returns the iterate that PGD would return.

    Attributes:
        loss: a name of `losses.LOSSES` that aims at no class.
        steps: gradient steps.
        step_size: `eps/N` as a share of the radius, or a length such as `1/255`.
        decay: factor of the sum at each step; 0 gives the iterative FGSM.
    """

    loss: losses.Name
    steps: int
    step_size: str
    decay: float

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    def __post_init__(self) -> None:
        losses.require_untargeted("mi-fgsm", self.loss)
        if self.steps < 1 or not 0 <= self.decay <= 1:
            raise InputError(
                "mi-fgsm", f"steps {self.steps}, decay {self.decay}", "at least 1 step, and decay in [0, 1]"
            )
        step_length(self.step_size, Threat("linf", Fraction(1, 255)))

    @property
    def passes(self) -> tuple[int, int]:
        """One gradient a step; the canonical pass evaluates the last iterate."""
        return self.steps, self.steps

    def start(self, rows: Rows, threat: Threat) -> MomentumState:
        """The image itself, without momentum."""
        images = rows.images
        return MomentumState(**vars(begin(rows, threat, images.clone())), momentum=torch.zeros_like(images))

    def step(self, state: MomentumState, oracle: Oracle) -> MomentumState:
        """Evaluate the next iterate and compute the one that follows it."""
        evaluation = evaluate(self.loss, state, oracle)
        gradient = evaluation.gradient
        size = gradient.abs().flatten(1).sum(1).clamp(min=LEAST)
        momentum = gradient / spread(size, gradient) + self.decay * state.momentum
        move = geometry.direction(momentum, state.threat).mul_(step_length(self.step_size, state.threat))
        return dataclasses.replace(advanced(state, evaluation, move, self.steps), momentum=momentum)


plugin = MiFgsm
