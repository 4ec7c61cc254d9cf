"""Clean: cross-entropy fine-tuning without an adversary; how MMT-ARD's clean teacher is made.

Source   the released code of Li et al. 2025, arXiv:2511.17448: its trainer with the attack disabled.
Threat   none.
Departs  nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from robustbench_vlm.defenses.losses import ce
from robustbench_vlm.errors import TrainingError
from robustbench_vlm.types import Passes, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective, Roles, Step


@dataclass(frozen=True)
class Clean:
    """Zero-shot cross-entropy on clean images."""

    teachers: ClassVar[tuple[str, ...]] = ()
    needs_text: ClassVar[bool] = True
    adversarial: ClassVar[bool] = False

    def passes(self) -> Passes:
        """The student on x."""
        return Passes(1)

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Nothing: there is no teacher."""
        del roles, batch
        return {}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """There is no adversary.

        Raises:
            TrainingError: always.
        """
        del roles, batch, targets
        raise TrainingError("clean: asked for an inner objective, which it does not have")

    def outer(self, roles: Roles, step: Step) -> Terms:
        """L = (1/B) sum_i CE(Z_S(x_i), y_i)."""
        loss = ce(roles.logits("student", step.batch.images), step.batch.labels).mean()
        return Terms(total=loss, parts={"ce_clean": loss.detach()})


plugin = Clean
