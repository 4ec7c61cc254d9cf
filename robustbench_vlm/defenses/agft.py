"""AGFT: the softened clean prediction of the original model replaces the label, in attack and loss.

Source   arXiv:2603.29410 and its released code, YuboCui/AGFT (train.py).
Threat   any norm that `engine.geometry` knows; the released attack is 2 steps, student in eval mode.
Departs  nothing in the loss. In the setting, the recipe `paper-agft` has the code's sentence with its full
         stop, its class names (the TeCoA list) and its bilinear resize. The cosine schedule of the code is
         timm's; here it is that of all recipes.
Symbols  x clean image, x' adversarial image; S student, 0 frozen original (`anchor`); s_t `scale`, which
         replaces the models' own logit scale in training only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import soft_ce

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective


@dataclass(frozen=True)
class Agft(Defense):
    """Soft cross-entropy to p_i = softmax(gamma s_t cos(e_0(x_i), W)).

    Attributes:
        scale: s_t; 180 in the released code, against the 100 of the weights, which evaluation uses.
        gamma: softening of the target; 0.4 in the released code, so the target's scale is 72.
    """

    scale: Annotated[float, Field(gt=0)] = 180.0
    gamma: Annotated[float, Field(gt=0)] = 0.4

    teachers: ClassVar[tuple[str, ...]] = ("anchor",)

    def passes(self) -> Passes:
        """The student on x', the original on x."""
        return Passes(1, {"anchor": 1})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Softened probabilities (B, C) of the original on the clean images, under `soft`."""
        return {"soft": self._soft(roles, "anchor", batch.images)}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """-sum_c p_ic log P_S(x'_i)_c, (B,); no label is used."""
        del batch
        return lambda adv: soft_ce(targets["soft"], self._logits(roles, adv))

    def outer(self, roles: Roles, step: Step) -> Terms:
        """L = -(1/B) sum_i sum_c p_ic log P_S(x'_i)_c."""
        loss = soft_ce(step.targets["soft"], self._logits(roles, step.adv)).mean()
        return Terms(total=loss, parts={"soft_ce_adv": loss.detach()})

    def loss_at_agreement(self, roles: Roles, batch: Batch) -> Tensor | float:
        """The soft cross-entropy of the student to its own softened prediction: the scales still differ."""
        return soft_ce(self._soft(roles, "student", batch.images), self._logits(roles, batch.images)).mean()

    def _soft(self, roles: Roles, role: str, images: Tensor) -> Tensor:
        cosines = roles.cosines(role, roles.encoder(role)(images))
        return (self.gamma * self.scale * cosines).softmax(dim=-1)

    def _logits(self, roles: Roles, images: Tensor) -> Tensor:
        return self.scale * roles.cosines("student", roles.student(images))


plugin = Agft
