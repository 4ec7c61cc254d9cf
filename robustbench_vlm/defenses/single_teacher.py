"""Single-teacher adversarial distillation: the baseline that MMT-ARD compares itself with.

Source   the released code of Li et al. 2025, arXiv:2511.17448: its `_origin` trainer, in which one robust
         teacher sees the clean image only.
Threat   any norm that `attacks.geometry` knows.
Departs  the released code also runs the student on x, for its log; that forward is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from robustbench_vlm.defenses.losses import kl
from robustbench_vlm.types import Passes, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective, Roles, Step


@dataclass(frozen=True)
class SingleTeacher:
    """Match the robust teacher's clean prediction on the adversarial image."""

    teachers: ClassVar[tuple[str, ...]] = ("robust",)
    needs_text: ClassVar[bool] = True
    adversarial: ClassVar[bool] = True

    def passes(self) -> Passes:
        """The student on x', the teacher on x."""
        return Passes(1, {"robust": 1})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """The robust teacher on the clean images: {"robust": logits (B, C)}."""
        return {"robust": roles.logits("robust", batch.images)}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """KL(P_R(x_i) || P_S(x'_i)), (B,), for the adversary to maximise."""
        del batch
        return lambda adv: kl(targets["robust"], roles.logits("student", adv))

    def outer(self, roles: Roles, step: Step) -> Terms:
        """L = (1/B) sum_i KL(P_R(x_i) || P_S(x'_i))."""
        loss = kl(step.targets["robust"], roles.logits("student", step.adv)).mean()
        return Terms(total=loss, parts={"kl_adv": loss.detach()})


plugin = SingleTeacher
