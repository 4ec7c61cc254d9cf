"""IAD: introspective adversarial distillation; the teacher is trusted as far as it is right on x'.

Source   Zhu et al. 2022, arXiv:2106.04928, and its released code (IAD-I.py), the variant with one teacher.
Threat   any norm that `attacks.geometry` knows; the released attack is cross-entropy, K = 10, from a start
         outside the box, student in train mode (`[inner] start = "unclipped"`, `mode = "train"`).
Departs  made for CIFAR logits; the zero-shot logits take their place. The released code runs the student on x
         twice more than it needs.
Symbols  x clean image, x' adversarial image, y label; S student, R robust teacher;
         a_i = P_R(x'_i)[y_i]^beta, the trust.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from robustbench_vlm.defenses.losses import at_once, ce, kl, of_label
from robustbench_vlm.types import Passes, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective, Roles, Step


@dataclass(frozen=True)
class Iad:
    """mean_i KL(P_R(x_i) || P_S(x'_i)) + mean_i (1 - a_i) KL(P_S(x_i) || P_S(x'_i)).

    Attributes:
        form: `released`, as above; `weighted`, the first term times a_i too, as the paper is usually quoted
            (not read there).
        beta: exponent of the trust; 0.1 in the released code.
        begin: share of the run before which a_i = 1; epoch 60 of 200 in the released code.
        temperature: T of the teacher's term, which is then times T^2; 1 in the released code, 30 in AdaIAD.
    """

    form: Literal["released", "weighted"] = "released"
    beta: Annotated[float, Field(ge=0)] = 0.1
    begin: Annotated[float, Field(ge=0, le=1)] = 0.3
    temperature: Annotated[float, Field(gt=0)] = 1.0

    teachers: ClassVar[tuple[str, ...]] = ("robust",)
    needs_text: ClassVar[bool] = True
    adversarial: ClassVar[bool] = True

    def passes(self) -> Passes:
        """The student on x and x', the teacher likewise."""
        return Passes(2, {"robust": 2})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """The robust teacher on the clean images: {"robust": logits (B, C)}."""
        return {"robust": roles.logits("robust", batch.images)}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """CE(Z_S(x'_i), y_i), (B,), for the adversary to maximise."""
        del targets
        return lambda adv: ce(roles.logits("student", adv), batch.labels)

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The two terms of the class; the second has a gradient through both of its predictions."""
        t, labels = self.temperature, step.batch.labels
        with torch.no_grad():
            right = of_label(roles.logits("robust", step.adv).softmax(dim=-1), labels)
            trust = right.pow(self.beta) if step.progress >= self.begin else torch.ones_like(right)
        adv, clean = at_once(roles.student, lambda x: roles.logits("student", x), step.adv, step.batch.images)
        teacher = t**2 * kl(step.targets["robust"] / t, adv / t)
        if self.form == "weighted":
            teacher = trust * teacher
        itself = (1 - trust) * kl(clean, adv)
        parts = {"kl_adv": teacher.mean(), "kl_self": itself.mean(), "trust": trust.mean()}
        return Terms(teacher.mean() + itself.mean(), {name: value.detach() for name, value in parts.items()})


plugin = Iad
