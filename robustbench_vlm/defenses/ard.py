"""ARD: adversarially robust distillation; the student on x' matches the teacher's softened prediction on x.

Source   Goldblum, Fowl, Feizi, Goldstein 2020, arXiv:1905.09747, and its released code (main.py).
Threat   any norm that `engine.geometry` knows; the released attack is cross-entropy, 10 steps, from a
         start outside the box, student in train mode (`[inner] start = "unclipped"`, `mode = "train"`).
Departs  made for CIFAR logits; here zero-shot logits, scale included, replace them, and the temperature
         divides them. That choice is ours.
Symbols  x clean image, x' adversarial image, y label; S student, R robust teacher; T temperature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import Reduction, ce, kl, reduced

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective


@dataclass(frozen=True)
class Ard(Defense):
    """alpha T^2 KL(softmax(Z_R(x)/T) || softmax(Z_S(x')/T)) + (1 - alpha) CE(Z_S(x), y).

    Attributes:
        temperature: T; 30 in the released code.
        alpha: share of the distillation term; 1 in the released code, so the label term is absent there.
        reduction: of the divergence; `elementmean` in the released code.
    """

    temperature: Annotated[float, Field(gt=0)] = 30.0
    alpha: Annotated[float, Field(gt=0, le=1)] = 1.0
    reduction: Reduction = "batchmean"

    teachers: ClassVar[tuple[str, ...]] = ("robust",)

    def passes(self) -> Passes:
        """The student on x', and on x if alpha < 1; the teacher on x."""
        return Passes(1 if self.alpha == 1 else 2, {"robust": 1})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """The robust teacher on the clean images: {"robust": logits (B, C)}."""
        return {"robust": roles.logits("robust", batch.images)}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """CE(Z_S(x'_i), y_i), (B,)."""
        del targets
        return lambda adv: ce(roles.logits("student", adv), batch.labels)

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The sum of the class docstring."""
        t, adv = self.temperature, roles.logits("student", step.adv)
        apart = reduced(kl(step.targets["robust"] / t, adv / t), adv.shape[1], self.reduction)
        total: Tensor = self.alpha * t**2 * apart
        parts = {"kl_adv": apart.detach()}
        if self.alpha < 1:
            label = ce(roles.logits("student", step.batch.images), step.batch.labels).mean()
            total = total + (1 - self.alpha) * label
            parts["ce_clean"] = label.detach()
        return Terms(total, parts)

    def loss_at_agreement(self, roles: Roles, batch: Batch) -> Tensor | float:
        """The label term."""
        return (1 - self.alpha) * ce(roles.logits("student", batch.images), batch.labels).mean()


plugin = Ard
