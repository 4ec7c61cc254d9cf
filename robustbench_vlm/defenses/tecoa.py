"""TeCoA: text-guided adversarial fine-tuning, adversarial training with the zero-shot cross-entropy.

Source   Mao et al. 2023, arXiv:2212.07016, and the edition of Schlarmann et al. 2024, arXiv:2402.12336. Both
         have the same loss: frozen class sentences of the original text tower, unit embeddings, the model's
         logit scale (100). They differ in the settings: recipe `paper-tecoa-original` (ViT-B-32, SGD, 2
         steps, eps 1/255, clipped start, student attacked in train mode) and `paper-tecoa` (ViT-L-14, AdamW,
         10 steps, eps 2/255, start outside the box, eval mode).
Threat   any norm that `engine.geometry` knows.
Departs  text is encoded once, not in every forward (the same numbers, several times faster). In the original
         code, gradients that the attack leaves in the weights stay there for the update, unscaled, while the
         loss is scaled by 65536 for fp16; here the attack leaves none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import ce

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective


@dataclass(frozen=True)
class TeCoA(Defense):
    """CE(Z_S(x'), y): cross-entropy of the zero-shot logits on adversarial images, without a teacher."""

    def passes(self) -> Passes:
        """The student on x'."""
        return Passes(1)

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """CE(Z_S(x'_i), y_i), (B,)."""
        del targets
        return lambda adv: ce(roles.logits("student", adv), batch.labels)

    def outer(self, roles: Roles, step: Step) -> Terms:
        """L = (1/B) sum_i CE(Z_S(x'_i), y_i)."""
        loss = ce(roles.logits("student", step.adv), step.batch.labels).mean()
        return Terms(total=loss, parts={"ce_adv": loss.detach()})

    def loss_at_agreement(self, roles: Roles, batch: Batch) -> Tensor | float:
        """The whole loss, on clean images."""
        return ce(roles.logits("student", batch.images), batch.labels).mean()


plugin = TeCoA
