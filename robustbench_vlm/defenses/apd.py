"""APD: adversarial prompt distillation; the student's prompts learn from a teacher tuned on clean images.

Source   Luo et al. 2024, arXiv:2411.15244. Read: the abstract (bimodal prompts, distillation from a clean,
         non-robust teacher CLIP that is tuned at the same time). Not read: the equations. Inferred by us:
         the form and the weight of every term below. The prompts themselves are set in the recipe
         (`[prompts]`); the numbers of `paper-apd` are those of the same group's prompt trainer,
         xinwong/Multimodal-Adversarial-Prompt-Tuning.
Threat   any norm that `engine.geometry` knows; the attack maximises cross-entropy, according to summaries of
         the paper.
Departs  that trainer makes half of every batch adversarial; here the whole batch is.
Symbols  x clean image, x' adversarial image, y label; S student, T teacher (`clean`), both frozen except for
         their prompts; sg stop-gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import ce, kl

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective


@dataclass(frozen=True)
class Apd(Defense):
    """KL(sg P_T(x) || P_S(x')) + label_weight CE(P_S(x'), y) + CE(P_T(x), y), each a mean over the batch.

    The stop-gradient leaves the last term as the only one that trains the teacher.

    Attributes:
        label_weight: weight of the student's cross-entropy; 1 by default, inferred.
    """

    label_weight: Annotated[float, Field(ge=0)] = 1.0

    teachers: ClassVar[tuple[str, ...]] = ("clean",)
    learners: ClassVar[tuple[str, ...]] = ("clean",)

    def passes(self) -> Passes:
        """The student on x', the teacher on x; both learn."""
        return Passes(1, {"clean": 1}, learners=("clean",))

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """CE(Z_S(x'_i), y_i), (B,)."""
        del targets
        return lambda adv: ce(roles.logits("student", adv), batch.labels)

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The sum of the class docstring."""
        labels = step.batch.labels
        teacher = roles.logits("clean", step.batch.images)
        student = roles.logits("student", step.adv)
        apart = kl(teacher.detach(), student).mean()
        label, tuned = ce(student, labels).mean(), ce(teacher, labels).mean()
        total = apart + self.label_weight * label + tuned
        parts = {"kl_adv": apart, "ce_adv": label, "ce_teacher": tuned}
        return Terms(total, {name: value.detach() for name, value in parts.items()})

    def loss_at_agreement(self, roles: Roles, batch: Batch) -> Tensor | float:
        """The cross-entropy of the shared model on clean images, once as student and once as teacher."""
        return (1 + self.label_weight) * ce(roles.logits("student", batch.images), batch.labels).mean()


plugin = Apd
