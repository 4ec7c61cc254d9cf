"""Auto-PGD on a model that is random: each gradient is the mean over several draws of it.

Athalye et al., "Synthesizing robust adversarial examples" (ICML 2018), as AutoAttack's version `rand` does
it: prediction and loss, and so best point and step length, are those of the last draw alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from robustbench_vlm.attacks.apgd import Apgd, ApgdState
from robustbench_vlm.engine.interface import Alone, Attack, Evaluation, Oracle, Rows
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat


@dataclass(frozen=True)
class EotState(ApgdState):
    """The rows.

    Attributes:
        draws: model calls of each evaluation.
    """

    draws: int

    @property
    def forwards(self) -> Tensor:
        """(S,) as many an evaluation as there are draws."""
        return self.draws * self.iteration

    @property
    def backwards(self) -> Tensor:
        """(S,) likewise."""
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

    def cost(self, n_classes: int) -> tuple[int, int]:
        """`eot` gradients where Auto-PGD has one."""
        forwards, backwards = super().cost(n_classes)
        return self.eot * forwards, self.eot * backwards

    @property
    def _budget(self) -> tuple[object, ...]:
        return *super()._budget, self.eot

    def join(self, other: Attack) -> Attack | None:
        """Only with its equal: the draws of a random model are not to depend on who stands beside."""
        return Alone.join(self, other)

    def start(self, rows: Rows, threat: Threat) -> EotState:
        """As Auto-PGD."""
        return EotState(**vars(super().start(rows, threat)), draws=self.eot)

    def _look(self, state: ApgdState, x: Tensor, oracle: Oracle) -> Evaluation:
        """The evaluation of `x`: the last one, with the mean of all gradients."""
        seen = super()._look(state, x, oracle)
        total, finite = seen.gradient, seen.finite
        for _ in range(self.eot - 1):
            seen = super()._look(state, x, oracle)
            total, finite = total + seen.gradient, finite & seen.finite
        mean = total / self.eot
        return dataclasses.replace(
            seen, gradient=mean, finite=finite, zero=mean.flatten(1).abs().amax(1) == 0
        )


plugin = ApgdEot
