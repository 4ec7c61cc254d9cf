"""Fast gradient sign method: one step of the radius from the image itself.

Goodfellow, Shlens & Szegedy, "Explaining and harnessing adversarial examples" (ICLR 2015). In L2 the step is
along the unit gradient, the fast gradient method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from robustbench_vlm.attacks.pgd import Pgd, PgdState
from robustbench_vlm.engine import losses
from robustbench_vlm.engine.interface import Attack, Rows
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.threat import Threat


@dataclass(frozen=True)
class Fgsm(Attack):
    """One step of PGD, as long as the radius and without a random start.

    Attributes:
        loss: a name of `losses.LOSSES` that aims at no class.
    """

    loss: losses.Name

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    def __post_init__(self) -> None:
        losses.require_untargeted("fgsm", self.loss)

    @property
    def _pgd(self) -> Pgd:
        return Pgd(self.loss, 1, "eps", 1, random_start=False)

    @property
    def passes(self) -> tuple[int, int]:
        """One gradient; the canonical pass evaluates the iterate that follows."""
        return 1, 1

    def start(self, rows: Rows, threat: Threat) -> PgdState:
        """The image itself."""
        return self._pgd.start(rows, threat)

    def step(self, state: PgdState, oracle: Oracle) -> PgdState:
        """The gradient at the image, and the step."""
        return self._pgd.step(state, oracle)


plugin = Fgsm
