"""Momentum iterative FGSM: steps along a decaying sum of normalised gradients.

Dong et al., "Boosting adversarial attacks with momentum" (CVPR 2018), algorithm 1: each gradient is divided
by its L1 norm before it is added; the step is along the sign of the sum, in L2 along its unit vector. Of a
gradient that is exactly zero nothing is added, where the formula says 0/0.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_vlm.attacks.pgd import PgdState, advanced, begin, look, step_length
from robustbench_vlm.engine import geometry, losses
from robustbench_vlm.engine.interface import Alone, Oracle, Rows, spread
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat

LEAST = 1e-30  # below any norm that a gradient in float32 has, unless it is zero


@dataclass(frozen=True)
class MomentumState(PgdState):
    """MI-FGSM's rows.

    Attributes:
        momentum: (S, 3, H, W) decayed sum of the gradients so far, each of unit L1 norm.
    """

    momentum: Tensor


@dataclass(frozen=True)
class MiFgsm(Alone):
    """MI-FGSM from the image itself; judged as PGD is.

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
    def restarts(self) -> int:
        """There is one trajectory."""
        return 1

    def ranks(self, n_classes: int) -> int:  # noqa: ARG002 - the same for every number of classes
        """Untargeted."""
        return 0

    def substitutions(self, n_classes: int) -> list[str]:
        """DLR with 2 classes becomes the margin."""
        return losses.few_classes(self.loss, 0, n_classes)

    def cost(self, n_classes: int) -> tuple[int, int]:  # noqa: ARG002 - the same for every number of classes
        """One gradient a step; the last iterate is judged by the canonical pass."""
        return self.steps, self.steps

    def start(self, rows: Rows, threat: Threat) -> MomentumState:
        """The image itself, at rest."""
        images = rows.images
        return MomentumState(**vars(begin(rows, threat, images.clone())), momentum=torch.zeros_like(images))

    def step(self, state: MomentumState, oracle: Oracle) -> MomentumState:
        """Evaluate the next iterate and compute the one that follows it."""
        seen = look(self.loss, state, oracle)
        size = seen.gradient.abs().flatten(1).sum(1).clamp(min=LEAST)
        momentum = seen.gradient / spread(size, seen.gradient) + self.decay * state.momentum
        move = geometry.direction(momentum, state.threat).mul_(step_length(self.step_size, state.threat))
        return dataclasses.replace(advanced(state, seen, move, self.steps), momentum=momentum)


plugin = MiFgsm
