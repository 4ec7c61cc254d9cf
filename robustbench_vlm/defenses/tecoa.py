"""TeCoA: text-guided adversarial fine-tuning, adversarial training with the zero-shot cross-entropy.

Source   Mao et al. 2023, arXiv:2212.07016, and the edition of Schlarmann et al. 2024, arXiv:2402.12336. Both
         have the same loss: frozen class sentences of the original text tower, unit embeddings, the model's
         logit scale (100). What differs is data: recipe `paper-tecoa-original` (ViT-B-32, SGD, K = 2, eps
         1/255, clipped start, student in train mode while attacked) and `paper-tecoa` (ViT-L-14, AdamW,
         K = 10, eps 2/255, start outside the box, eval mode).
Threat   any norm that `attacks.geometry` knows.
Departs  text is encoded once, not in every forward (the same numbers, several times faster).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from robustbench_vlm.defenses.losses import ce
from robustbench_vlm.types import Passes, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective, Roles, Step


@dataclass(frozen=True)
class TeCoA:
    """Cross-entropy of the zero-shot logits on adversarial images; no teacher."""

    teachers: ClassVar[tuple[str, ...]] = ()
    needs_text: ClassVar[bool] = True
    adversarial: ClassVar[bool] = True

    def passes(self) -> Passes:
        """The student on x'."""
        return Passes(1)

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Nothing: there is no teacher."""
        del roles, batch
        return {}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """CE(Z_S(x'_i), y_i), (B,), for the adversary to maximise."""
        del targets
        return lambda adv: ce(roles.logits("student", adv), batch.labels)

    def outer(self, roles: Roles, step: Step) -> Terms:
        """L = (1/B) sum_i CE(Z_S(x'_i), y_i)."""
        loss = ce(roles.logits("student", step.adv), step.batch.labels).mean()
        return Terms(total=loss, parts={"ce_adv": loss.detach()})


plugin = TeCoA
