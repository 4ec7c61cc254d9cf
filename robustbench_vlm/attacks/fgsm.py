"""Fast gradient sign method: one step of the radius from the image itself.

Goodfellow, Shlens & Szegedy, "Explaining and harnessing adversarial examples" (ICLR 2015). In L2 the step is
along the unit gradient, the fast gradient method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from robustbench_vlm.attacks.pgd import Pgd, PgdState
from robustbench_vlm.engine import losses
from robustbench_vlm.engine.interface import Alone, Oracle, Rows
from robustbench_vlm.threat import Threat


@dataclass(frozen=True)
class Fgsm(Alone):
    """One step of PGD, as long as the radius and without a random start.

    Attributes:
        loss: a name of `losses.LOSSES` that aims at no class.
    """

    loss: losses.Name

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    def __post_init__(self) -> None:
        losses.require_untargeted("fgsm", self.loss)

    @property
    def _step(self) -> Pgd:
        return Pgd(self.loss, 1, "eps", 1, random_start=False)

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
        """One gradient; the canonical pass judges the step."""
        return 1, 1

    def start(self, rows: Rows, threat: Threat) -> PgdState:
        """The image itself."""
        return self._step.start(rows, threat)

    def step(self, state: PgdState, oracle: Oracle) -> PgdState:
        """The gradient at the image, and the step."""
        return self._step.step(state, oracle)


plugin = Fgsm
