"""Clean: cross-entropy fine-tuning without an attack; it makes the clean teacher of MMT-ARD.

Source   the released code of Li et al. 2025, arXiv:2511.17448: its trainer with the attack disabled.
Threat   none.
Departs  nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import ce

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch


@dataclass(frozen=True)
class Clean(Defense):
    """Zero-shot cross-entropy on clean images."""

    adversarial: ClassVar[bool] = False

    def passes(self) -> Passes:
        """The student on x."""
        return Passes(1)

    def outer(self, roles: Roles, step: Step) -> Terms:
        """L = (1/B) sum_i CE(Z_S(x_i), y_i)."""
        loss = ce(roles.logits("student", step.batch.images), step.batch.labels).mean()
        return Terms(total=loss, parts={"ce_clean": loss.detach()})

    def loss_at_agreement(self, roles: Roles, batch: Batch) -> Tensor | float:
        """The whole loss: there is neither teacher nor attack."""
        return ce(roles.logits("student", batch.images), batch.labels).mean()


plugin = Clean
