"""B-MTARD: MTARD in which a temperature per teacher brings both teachers to equal entropy.

Source   Zhao et al. 2024, arXiv:2306.16170, and its released code, zhaoshiji123/MTARD-extension
         (resnet18_mtard_cifar10.py, read for the order within a step: losses and entropies at the present
         temperatures first, then new temperatures, then the weights that this step uses).
Threat   any norm that `engine.geometry` knows; the released attack is cross-entropy, 10 steps, from
         x + 0.001 N(0, 1), student in eval mode (`[inner] start = "gaussian"`).
Departs  made for CIFAR logits; here zero-shot logits, scale included, replace them. Epochs become
         shares of the run. Entropies are exact, without the released log(p + 1e-5).
Symbols  x clean image, x' adversarial image; S student, R robust teacher, K clean teacher (C counts
         classes); T_R, T_K their temperatures; H batch-mean entropy of a teacher at its temperature.
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
    entropy,
    kl,
    rate_at,
    reduced,
    student_logits,
)

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective


@dataclass(frozen=True)
class BMtard(Defense):
    """w_R KL(softmax(Z_R(x')/T_R) || P_S(x')) + w_K KL(softmax(Z_K(x)/T_K) || P_S(x)).

    Both weights move by the rule of `mtard`, are cut at 0 and are scaled to sum to one. Temperatures move by
    T_R <- T_R - r_T sign(H_R/H_K - 1) and T_K <- T_K - r_T sign(H_K/H_R - 1), and are clamped to a range.

    Attributes:
        rate: r of the weights; 0.025 in the released code.
        exponent: b of the weights; 1 in the released code.
        temperature_rate: r_T; 0.001 in the released code.
        coldest: smallest temperature, at which both start; 1 in the released code.
        hottest: largest temperature; 10 in the released code.
        drops: shares of the run at which both rates fall to a tenth; epochs 215, 260 and 285 of 300.
        reduction: of the divergences; `elementmean` in the released code.
    """

    rate: Annotated[float, Field(ge=0, le=1)] = 0.025
    exponent: Annotated[float, Field(ge=0)] = 1.0
    temperature_rate: Annotated[float, Field(ge=0)] = 0.001
    coldest: Annotated[float, Field(gt=0)] = 1.0
    hottest: Annotated[float, Field(gt=0)] = 10.0
    drops: tuple[float, ...] = DROPS
    reduction: Reduction = "batchmean"

    teachers: ClassVar[tuple[str, ...]] = ("robust", "clean")

    def __post_init__(self) -> None:
        if self.hottest < self.coldest:
            raise ValueError(f"hottest = {self.hottest} is below coldest = {self.coldest}")

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
        """The weighted sum; carries `weight`, `first` loss and `temperature`, each (robust, clean)."""
        with torch.no_grad():
            robust = roles.logits("robust", step.adv)
        start = torch.full((2,), self.coldest, dtype=robust.dtype, device=robust.device)
        t = step.carry.get("temperature", start)
        robust, clean = robust / t[0], step.targets["clean"] / t[1]
        classes = robust.shape[1]
        students = student_logits(roles, step.adv, step.batch.images)
        kl_adv = reduced(kl(robust, students[0]), classes, self.reduction)
        kl_clean = reduced(kl(clean, students[1]), classes, self.reduction)
        now = torch.stack([kl_adv, kl_clean])
        first = step.carry.get("first", now.detach())
        before = step.carry.get("weight", torch.full_like(first, 0.5))
        rate = rate_at(self.rate, step.progress, self.drops)
        weight = balanced(before, now.detach(), first, rate, self.exponent).clamp(min=0)
        weight = weight / weight.sum()
        gap = torch.sign(entropy(robust).mean() - entropy(clean).mean())
        move = rate_at(self.temperature_rate, step.progress, self.drops) * torch.stack([gap, -gap])
        carry = {
            "weight": weight,
            "first": first,
            "temperature": (t - move).clamp(self.coldest, self.hottest),
        }
        parts = {"kl_adv": kl_adv, "kl_clean": kl_clean, "w_robust": weight[0], "w_clean": weight[1]}
        parts |= {"t_robust": t[0], "t_clean": t[1]}
        return Terms((weight * now).sum(), {name: value.detach() for name, value in parts.items()}, carry)


plugin = BMtard
