"""MTARD: one robust and one clean teacher, balanced by how much of each loss is left to learn.

Source   MTARD (ECCV 2022) in its released code, zhaoshiji123/MTARD.
Threat   any norm that `attacks.geometry` knows; the released attack is cross-entropy, K = 10, from
         x + 0.001 N(0, 1), student in eval mode (`[inner] start = "gaussian"`); one adversary serves both.
Departs  made for CIFAR logits; the zero-shot logits take their place. Epochs become shares of the run.
Symbols  x clean image, x' adversarial image; S student, R robust teacher, K clean teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field

from robustbench_vlm.defenses.losses import Reduction, at_once, balanced, ce, kl, rate_at, reduced
from robustbench_vlm.types import Passes, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective, Roles, Step

DROPS = (215 / 300, 260 / 300, 285 / 300)  # epochs of the released code at which rates fall to a tenth


@dataclass(frozen=True)
class Mtard:
    """w_R L_R + w_K L_K, with L_R = KL(P_R(x') || P_S(x')) and L_K = KL(P_K(x) || P_S(x)).

    Every step, before the loss is taken, w_K <- w_K - r (w_K - l_K^b / (l_K^b + l_R^b)) and w_R = 1 - w_K,
    with l the loss over that of the first step; both weights start at 1/2.

    Attributes:
        rate: r; 0.025 in the released code.
        exponent: b; 1 in the released code.
        drops: shares of the run after each of which the rate is a tenth; epochs 215, 260 and 285 of 300.
        factor: of the whole loss; 1 for CIFAR-10, 10 for CIFAR-100 in the released code.
        reduction: of the divergences; `elementmean` in the released code.
    """

    rate: Annotated[float, Field(ge=0, le=1)] = 0.025
    exponent: Annotated[float, Field(ge=0)] = 1.0
    drops: tuple[float, ...] = DROPS
    factor: Annotated[float, Field(gt=0)] = 1.0
    reduction: Reduction = "batchmean"

    teachers: ClassVar[tuple[str, ...]] = ("robust", "clean")
    needs_text: ClassVar[bool] = True
    adversarial: ClassVar[bool] = True

    def passes(self) -> Passes:
        """The student on x and x', the robust teacher on x', the clean one on x."""
        return Passes(2, {"robust": 1, "clean": 1})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """The clean teacher on the clean images: {"clean": logits (B, C)}."""
        return {"clean": roles.logits("clean", batch.images)}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """CE(Z_S(x'_i), y_i), (B,), for the adversary to maximise."""
        del targets
        return lambda adv: ce(roles.logits("student", adv), batch.labels)

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The two terms of the class; carries {"weight": (w_R, w_K), "first": (L_R, L_K) of step 0}."""
        with torch.no_grad():
            robust = roles.logits("robust", step.adv)
        classes = robust.shape[1]
        adv, clean = at_once(roles.student, lambda x: roles.logits("student", x), step.adv, step.batch.images)
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
