"""APD: adversarial prompt distillation; prompts in both towers learn from a teacher tuned on clean images.

Source   Luo et al. 2024, arXiv:2411.15244. Read: the abstract (bimodal prompts, distillation from a clean,
         non-robust teacher CLIP that is tuned along). Not read: the equations. Inferred by us: the form of
         every term below and their weights. The prompts themselves are recipe data (`[prompts]`); the
         numbers of `paper-apd` are those of the same group's prompt trainer,
         xinwong/Multimodal-Adversarial-Prompt-Tuning.
Threat   any norm that `attacks.geometry` knows; cross-entropy, by summaries of the paper.
Departs  that trainer makes half of every batch adversarial; here all of it is.
Symbols  x clean image, x' adversarial image, y label; S student, T teacher (`clean`), both frozen but for
         their prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from robustbench_vlm.defenses.losses import ce, kl
from robustbench_vlm.types import Passes, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective, Roles, Step


@dataclass(frozen=True)
class Apd:
    """KL(sg P_T(x) || P_S(x')) + label_weight CE(P_S(x'), y) + CE(P_T(x), y), means; the last trains T alone.

    Attributes:
        label_weight: of the student's own cross-entropy; 1, inferred.
    """

    label_weight: Annotated[float, Field(ge=0)] = 1.0

    teachers: ClassVar[tuple[str, ...]] = ("clean",)
    learners: ClassVar[tuple[str, ...]] = ("clean",)
    needs_text: ClassVar[bool] = True
    adversarial: ClassVar[bool] = True

    def passes(self) -> Passes:
        """The student on x', the teacher on x; both learn."""
        return Passes(1, {"clean": 1}, learners=("clean",))

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Nothing: the teacher is asked with gradient, in the outer loss."""
        del roles, batch
        return {}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """CE(Z_S(x'_i), y_i), (B,), for the adversary to maximise."""
        del targets
        return lambda adv: ce(roles.logits("student", adv), batch.labels)

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The three terms of the class."""
        labels = step.batch.labels
        teacher = roles.logits("clean", step.batch.images)
        student = roles.logits("student", step.adv)
        apart = kl(teacher.detach(), student).mean()
        label, tuned = ce(student, labels).mean(), ce(teacher, labels).mean()
        total = apart + self.label_weight * label + tuned
        parts = {"kl_adv": apart, "ce_adv": label, "ce_teacher": tuned}
        return Terms(total, {name: value.detach() for name, value in parts.items()})


plugin = Apd
