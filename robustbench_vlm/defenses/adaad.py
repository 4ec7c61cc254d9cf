"""AdaAD: adaptive adversarial distillation; the adversary looks for where teacher and student differ most.

Source   AdaAD (CVPR 2023) in its released code, boyellow/AdaAD (AT_helper.py, main.py).
Threat   any norm that `attacks.geometry` knows; the released attack is K = 10 from x + 0.001 N(0, 1), student
         in eval mode (`[inner] start = "gaussian"`), and differentiates through the teacher at every step.
Departs  made for CIFAR logits; the zero-shot logits take their place. With alpha = 1 the clean images are not
         run, which the released code does for nothing.
Symbols  x clean image, x' adversarial image; S student, R robust teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field

from robustbench_vlm.defenses.losses import Reduction, at_once, kl, reduced
from robustbench_vlm.types import Passes, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective, Roles, Step


@dataclass(frozen=True)
class AdaAd:
    """alpha KL(P_R(x') || P_S(x')) + (1 - alpha) KL(P_R(x) || P_S(x)).

    Attributes:
        alpha: share of the adversarial term; 1 in the released code.
        reduction: of the divergences; `elementmean` on CIFAR-10, `batchmean` on CIFAR-100 as released.
    """

    alpha: Annotated[float, Field(gt=0, le=1)] = 1.0
    reduction: Reduction = "batchmean"

    teachers: ClassVar[tuple[str, ...]] = ("robust",)
    needs_text: ClassVar[bool] = True
    adversarial: ClassVar[bool] = True

    def passes(self) -> Passes:
        """Student and teacher on x', and on x if alpha < 1; the teacher in every attack step too."""
        both = 1 if self.alpha == 1 else 2
        return Passes(both, {"robust": both}, attacked=("robust",))

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """With alpha < 1 the robust teacher on the clean images: {"robust": logits (B, C)}."""
        return {"robust": roles.logits("robust", batch.images)} if self.alpha < 1 else {}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """KL(P_R(x'_i) || P_S(x'_i)), (B,), for the adversary to maximise; gradient through both."""
        del batch, targets
        return lambda adv: kl(roles.logits("robust", adv), roles.logits("student", adv))

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The two terms of the class."""
        with torch.no_grad():
            robust = roles.logits("robust", step.adv)
        classes = robust.shape[1]
        images = (step.adv, step.batch.images) if self.alpha < 1 else (step.adv,)
        students = at_once(roles.student, lambda x: roles.logits("student", x), *images)
        kl_adv = reduced(kl(robust, students[0]), classes, self.reduction)
        parts, total = {"kl_adv": kl_adv.detach()}, self.alpha * kl_adv
        if self.alpha < 1:
            kl_clean = reduced(kl(step.targets["robust"], students[1]), classes, self.reduction)
            parts["kl_clean"], total = kl_clean.detach(), total + (1 - self.alpha) * kl_clean
        return Terms(total, parts)


plugin = AdaAd
