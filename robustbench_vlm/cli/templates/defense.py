"""TODO: one line that says what this defense does; `vlmrob list defenses` prints it.

Source   TODO: paper and equation.
Threat   any norm that the inner attack of a recipe knows.
Departs  TODO: what differs from the source, and why; or nothing.
Symbols  Z_S: zero-shot logits of the student, its logit scale times the cosines of images with class
         sentences; x: clean images; x': adversarial images; y: labels; B: batch size; w: `clean_weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import ce

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective


@dataclass(frozen=True)
class MyDefense(Defense):
    """Cross-entropy on adversarial images, plus a weighted cross-entropy on clean ones.

    Attributes:
        clean_weight: factor of the clean cross-entropy; 0 leaves it out. Every field of this class is a key
            of the `[defense]` table of a recipe, and `--set defense.clean_weight=1.0` changes it.
    """

    clean_weight: float = 0.5

    teachers: ClassVar[tuple[str, ...]] = ()  # roles that `[teachers]` of a recipe fills, such as "robust"
    needs_text: ClassVar[bool] = True  # the loss uses labels and class sentences
    adversarial: ClassVar[bool] = True  # there is an inner attack, so a recipe needs `[inner]`

    def passes(self) -> Passes:
        """Forward passes of the student in `outer`: one on x', and one on x if that counts."""
        return Passes(student=2 if self.clean_weight else 1)

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Outputs of models on clean images, computed once a step without gradient: none here."""
        del roles, batch
        return {}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """CE(Z_S(x'_i), y_i), (B,): what the inner attack maximises."""
        del targets
        return lambda adv: ce(roles.logits("student", adv), batch.labels)

    def outer(self, roles: Roles, step: Step) -> Terms:
        """L = (1/B) sum_i CE(Z_S(x'_i), y_i) + w CE(Z_S(x_i), y_i): what the student minimises."""
        labels = step.batch.labels
        robust = ce(roles.logits("student", step.adv), labels).mean()
        parts = {"ce_adv": robust.detach()}
        total = robust
        if self.clean_weight:
            clean = ce(roles.logits("student", step.batch.images), labels).mean()
            parts["ce_clean"] = clean.detach()
            total = robust + self.clean_weight * clean
        return Terms(total=total, parts=parts)

    def loss_at_agreement(self, roles: Roles, batch: Batch) -> Tensor | float:
        """The loss without attack, and with teachers that equal the student; 0 for pure distillation."""
        clean = ce(roles.logits("student", batch.images), batch.labels).mean()
        return (1 + self.clean_weight) * clean


plugin = MyDefense
