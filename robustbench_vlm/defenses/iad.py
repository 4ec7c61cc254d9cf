"""IAD: introspective adversarial distillation; the student trusts the teacher as far as it is right on x'.

Source   Zhu et al. 2022, arXiv:2106.04928, and its released code (IAD-I.py), the variant with one teacher.
Threat   any norm that `engine.geometry` knows; the released attack is cross-entropy, 10 steps, from a
         start outside the box, student in train mode (`[inner] start = "unclipped"`, `mode = "train"`).
Departs  made for CIFAR logits; here zero-shot logits replace them. The released code runs the student on x
         two more times, without effect on the loss.
Symbols  x clean image, x' adversarial image, y label; S student, R robust teacher;
         a_i = P_R(x'_i)[y_i]^beta, the trust.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import ce, kl, of_label, student_logits

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective


@dataclass(frozen=True)
class Iad(Defense):
    """mean_i KL(P_R(x_i) || P_S(x'_i)) + mean_i (1 - a_i) KL(P_S(x_i) || P_S(x'_i)).

    Attributes:
        form: `released`, as above; `weighted`, with the first term multiplied by a_i too, as others quote
            the paper (which was not read).
        beta: exponent of the trust; 0.1 in the released code.
        begin: share of the run up to which a_i = 1; epoch 60 of 200 in the released code.
        temperature: T of the teacher's term, which is multiplied by T^2; 1 in the released code, 30 in
            AdaIAD.
    """

    form: Literal["released", "weighted"] = "released"
    beta: Annotated[float, Field(ge=0)] = 0.1
    begin: Annotated[float, Field(ge=0, le=1)] = 0.3
    temperature: Annotated[float, Field(gt=0)] = 1.0

    teachers: ClassVar[tuple[str, ...]] = ("robust",)

    def passes(self) -> Passes:
        """Student and teacher, each on x and x'."""
        return Passes(2, {"robust": 2})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Logits (B, C) of the robust teacher on the clean images, under `robust`."""
        return {"robust": roles.logits("robust", batch.images)}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """CE(Z_S(x'_i), y_i), (B,)."""
        del targets
        return lambda adv: ce(roles.logits("student", adv), batch.labels)

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The sum of the class docstring; the second term has a gradient through both predictions."""
        t, labels = self.temperature, step.batch.labels
        with torch.no_grad():
            right = of_label(roles.logits("robust", step.adv).softmax(dim=-1), labels)
            trust = right.pow(self.beta) if step.progress >= self.begin else torch.ones_like(right)
        adv, clean = student_logits(roles, step.adv, step.batch.images)
        teacher = t**2 * kl(step.targets["robust"] / t, adv / t)
        if self.form == "weighted":
            teacher = trust * teacher
        itself = (1 - trust) * kl(clean, adv)
        parts = {"kl_adv": teacher.mean(), "kl_self": itself.mean(), "trust": trust.mean()}
        return Terms(teacher.mean() + itself.mean(), {name: value.detach() for name, value in parts.items()})


plugin = Iad
