"""Auto-PGD on a model that is random: each gradient is the mean over several draws of it.

Athalye et al., "Synthesizing robust adversarial examples" (ICML 2018), in the way of AutoAttack's version
`rand`: prediction and loss, and so best point and step length, are those of the last draw alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from robustbench_vlm.attacks.apgd import Apgd, ApgdState
from robustbench_vlm.engine.interface import Attack, Rows
from robustbench_vlm.engine.oracle import Evaluation, Oracle
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat


@dataclass(frozen=True)
class EotState(ApgdState):
    """The rows of Auto-PGD with the mean of several gradients.

    Attributes:
        draws: model calls of each evaluation.
    """

    draws: int

    @property
    def forwards(self) -> Tensor:
        """(S,) one for each draw of each evaluation."""
        return self.draws * self.iteration

    @property
    def backwards(self) -> Tensor:
        """(S,) one for each draw of each evaluation."""
        return self.draws * self.iteration


@dataclass(frozen=True)
class ApgdEot(Apgd):
    """Auto-PGD with the mean of `eot` gradients.

    Attributes:
        eot: draws of the model for each gradient; 1 gives `apgd`.
    """

    eot: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eot < 1:
            raise InputError("apgd-eot.eot", str(self.eot), "at least 1")

    @property
    def passes(self) -> tuple[int, int]:
        """`eot` gradients where Auto-PGD has one."""
        forwards, gradients = super().passes
        return self.eot * forwards, self.eot * gradients

    def shares_rows(self, other: Attack) -> bool:
        """Only with its equal: the draws of a random model must not depend on rows of other stages."""
        return Attack.shares_rows(self, other)

    def start(self, rows: Rows, threat: Threat) -> EotState:
        """A random point that touches the ball's surface, as for Auto-PGD."""
        return EotState(**vars(super().start(rows, threat)), draws=self.eot)

    def _evaluate(self, state: ApgdState, x: Tensor, oracle: Oracle) -> Evaluation:
        """The last of `eot` evaluations of `x`, with the mean of their gradients."""
        evaluation = super()._evaluate(state, x, oracle)
        total, finite = evaluation.gradient, evaluation.finite
        for _ in range(self.eot - 1):
            evaluation = super()._evaluate(state, x, oracle)
            total, finite = total + evaluation.gradient, finite & evaluation.finite
        mean = total / self.eot
        zero = mean.flatten(1).abs().amax(1) == 0
        return dataclasses.replace(evaluation, gradient=mean, finite=finite, zero=zero)


plugin = ApgdEot
