"""RSLAD: robust soft label adversarial distillation; the soft labels of a robust teacher in attack and loss.

Source   Zi, Zhao, Ma, Jiang 2021, arXiv:2108.07969, and its released code (rslad_loss.py).
Threat   any norm that `engine.geometry` knows; the released attack is 10 steps from x + 0.001 N(0, 1),
         student in eval mode (`[inner] start = "gaussian"`).
Departs  made for CIFAR logits; here zero-shot logits replace them. The released log(p + 1e-5) occurs
         in the entropy of the teacher only; it has no gradient and is left out.
Symbols  x clean image, x' adversarial image; S student, R robust teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import Reduction, kl, reduced, student_logits

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective


@dataclass(frozen=True)
class Rslad(Defense):
    """adv_share KL(P_R(x) || P_S(x')) + (1 - adv_share) KL(P_R(x) || P_S(x)); no hard label.

    Attributes:
        adv_share: 5/6 in the released code.
        factor: multiplies the whole loss; in the released code 1 for CIFAR-10 and 10 for CIFAR-100, since a
            mean over ten times as many classes is ten times smaller.
        reduction: of the divergences; `elementmean` in the released code.
    """

    adv_share: Annotated[float, Field(gt=0, lt=1)] = 5 / 6
    factor: Annotated[float, Field(gt=0)] = 1.0
    reduction: Reduction = "batchmean"

    teachers: ClassVar[tuple[str, ...]] = ("robust",)

    def passes(self) -> Passes:
        """The student on x and x', the teacher on x."""
        return Passes(2, {"robust": 1})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Logits (B, C) of the robust teacher on the clean images, under `robust`."""
        return {"robust": roles.logits("robust", batch.images)}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """KL(P_R(x_i) || P_S(x'_i)), (B,)."""
        del batch
        return lambda adv: kl(targets["robust"], roles.logits("student", adv))

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The sum of the class docstring."""
        robust = step.targets["robust"]
        students = student_logits(roles, step.adv, step.batch.images)
        kl_adv, kl_clean = (
            reduced(kl(robust, student), robust.shape[1], self.reduction) for student in students
        )
        total = self.factor * (self.adv_share * kl_adv + (1 - self.adv_share) * kl_clean)
        return Terms(total, {"kl_adv": kl_adv.detach(), "kl_clean": kl_clean.detach()})


plugin = Rslad
