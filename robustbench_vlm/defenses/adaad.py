"""AdaAD: adaptive adversarial distillation; the attack looks for where teacher and student differ most.

Source   AdaAD (CVPR 2023) in its released code, boyellow/AdaAD (AT_helper.py, main.py).
Threat   any norm that `engine.geometry` knows; the released attack is 10 steps from x + 0.001 N(0, 1),
         student in eval mode (`[inner] start = "gaussian"`), and differentiates through the teacher at every
         step.
Departs  made for CIFAR logits; here zero-shot logits replace them. With alpha = 1 no model is run on the
         clean images; the released code runs them and gives them weight 0.
Symbols  x clean image, x' adversarial image; S student, R robust teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field

from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import Reduction, kl, reduced, student_logits

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective


@dataclass(frozen=True)
class AdaAd(Defense):
    """alpha KL(P_R(x') || P_S(x')) + (1 - alpha) KL(P_R(x) || P_S(x)).

    Attributes:
        alpha: share of the adversarial term; 1 in the released code.
        reduction: of the divergences; `elementmean` on CIFAR-10, `batchmean` on CIFAR-100 as released.
    """

    alpha: Annotated[float, Field(gt=0, le=1)] = 1.0
    reduction: Reduction = "batchmean"

    teachers: ClassVar[tuple[str, ...]] = ("robust",)

    def passes(self) -> Passes:
        """Student and teacher on x', and on x if alpha < 1; every attack step runs the teacher too."""
        each = 1 if self.alpha == 1 else 2
        return Passes(each, {"robust": each}, attacked=("robust",))

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Logits (B, C) of the robust teacher on the clean images, under `robust`; nothing with alpha = 1."""
        return {"robust": roles.logits("robust", batch.images)} if self.alpha < 1 else {}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """KL(P_R(x'_i) || P_S(x'_i)), (B,), with gradient through both models."""
        del batch, targets
        return lambda adv: kl(roles.logits("robust", adv), roles.logits("student", adv))

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The sum of the class docstring."""
        with torch.no_grad():
            robust = roles.logits("robust", step.adv)
        classes = robust.shape[1]
        images = (step.adv, step.batch.images) if self.alpha < 1 else (step.adv,)
        students = student_logits(roles, *images)
        kl_adv = reduced(kl(robust, students[0]), classes, self.reduction)
        parts, total = {"kl_adv": kl_adv.detach()}, self.alpha * kl_adv
        if self.alpha < 1:
            kl_clean = reduced(kl(step.targets["robust"], students[1]), classes, self.reduction)
            parts["kl_clean"], total = kl_clean.detach(), total + (1 - self.alpha) * kl_clean
        return Terms(total, parts)


plugin = AdaAd
