"""MTARD: a robust and a clean teacher, weighted by how far each of their losses still is from zero.

Source   MTARD (ECCV 2022) in its released code, zhaoshiji123/MTARD.
Threat   any norm that `engine.geometry` knows; the released attack is cross-entropy, 10 steps, from
         x + 0.001 N(0, 1), student in eval mode (`[inner] start = "gaussian"`); both terms use one attack.
Departs  made for CIFAR logits; here zero-shot logits replace them. Epochs become shares of the run. The
         released divergences have log(p + 1e-5) in the entropy of the teacher, which shifts them by a
         constant without a gradient; it enters the balance of the losses there, and is left out here.
Symbols  x clean image, x' adversarial image; S student, R robust teacher, K clean teacher (C counts classes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field

from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import (
    DROPS,
    Reduction,
    balanced,
    ce,
    kl,
    rate_at,
    reduced,
    student_logits,
)

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective


@dataclass(frozen=True)
class Mtard(Defense):
    """w_R L_R + w_K L_K, with L_R = KL(P_R(x') || P_S(x')) and L_K = KL(P_K(x) || P_S(x)).

    Before each step's loss is computed, w_K <- w_K - r (w_K - l_K^b / (l_K^b + l_R^b)) and w_R = 1 - w_K,
    where l is a loss divided by its value at the first step. Both weights start at 1/2.

    Attributes:
        rate: r; 0.025 in the released code.
        exponent: b; 1 in the released code.
        drops: shares of the run at which the rate falls to a tenth; epochs 215, 260 and 285 of 300.
        factor: multiplies the whole loss; 1 for CIFAR-10, 10 for CIFAR-100 in the released code.
        reduction: of the divergences; `elementmean` in the released code.
    """

    rate: Annotated[float, Field(ge=0, le=1)] = 0.025
    exponent: Annotated[float, Field(ge=0)] = 1.0
    drops: tuple[float, ...] = DROPS
    factor: Annotated[float, Field(gt=0)] = 1.0
    reduction: Reduction = "batchmean"

    teachers: ClassVar[tuple[str, ...]] = ("robust", "clean")

    def passes(self) -> Passes:
        """The student on x and x', the robust teacher on x', the clean one on x."""
        return Passes(2, {"robust": 1, "clean": 1})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Logits (B, C) of the clean teacher on the clean images, under `clean`."""
        return {"clean": roles.logits("clean", batch.images)}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """CE(Z_S(x'_i), y_i), (B,)."""
        del targets
        return lambda adv: ce(roles.logits("student", adv), batch.labels)

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The weighted sum; carries `weight` (w_R, w_K) and `first` (L_R, L_K) of step 0."""
        with torch.no_grad():
            robust = roles.logits("robust", step.adv)
        classes = robust.shape[1]
        adv, clean = student_logits(roles, step.adv, step.batch.images)
        kl_adv = reduced(kl(robust, adv), classes, self.reduction)
        kl_clean = reduced(kl(step.targets["clean"], clean), classes, self.reduction)
        now = self.factor * torch.stack([kl_adv, kl_clean])
        first = step.carry.get("first", now.detach())
        before = step.carry.get("weight", torch.full_like(first, 0.5))
        weight = balanced(
            before, now.detach(), first, rate_at(self.rate, step.progress, self.drops), self.exponent
        )
        parts = {"kl_adv": kl_adv, "kl_clean": kl_clean, "w_robust": weight[0], "w_clean": weight[1]}
        carry = {"weight": weight, "first": first}
        return Terms((weight * now).sum(), {name: value.detach() for name, value in parts.items()}, carry)


plugin = Mtard
