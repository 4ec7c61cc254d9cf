"""Single-teacher adversarial distillation: the baseline of the MMT-ARD paper.

Source   the released code of Li et al. 2025, arXiv:2511.17448: its `_origin` trainer, which runs one robust
         teacher on the clean images only.
Threat   any norm that `engine.geometry` knows.
Departs  the released code also runs the student on x before x', for its log, in train mode. That forward
         changes nothing but the running statistics of batch norms, so only a student that has them takes it.
         The code refuses all students but ViT-B-32 and ViT-L-14, and fixes s = 100, where each model has its
         own logit scale here.
Symbols  x clean image, x' adversarial image; S student, R robust teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import kl

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective


@dataclass(frozen=True)
class SingleTeacher(Defense):
    """KL(P_R(x) || P_S(x')): the student on x' matches the prediction of the robust teacher on x."""

    teachers: ClassVar[tuple[str, ...]] = ("robust",)

    def passes(self) -> Passes:
        """The student on x', the teacher on x; a student with batch norms runs on x too."""
        return Passes(1, {"robust": 1}, student_batch_norm=1)

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Logits (B, C) of the robust teacher on the clean images, under `robust`."""
        return {"robust": roles.logits("robust", batch.images)}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """KL(P_R(x_i) || P_S(x'_i)), (B,)."""
        del batch
        return lambda adv: kl(targets["robust"], roles.logits("student", adv))

    def outer(self, roles: Roles, step: Step) -> Terms:
        """L = (1/B) sum_i KL(P_R(x_i) || P_S(x'_i))."""
        if not roles.student.rows_apart:  # batch norms in train mode
            with torch.no_grad():
                roles.student(step.batch.images)
        loss = kl(step.targets["robust"], roles.logits("student", step.adv)).mean()
        return Terms(total=loss, parts={"kl_adv": loss.detach()})


plugin = SingleTeacher
