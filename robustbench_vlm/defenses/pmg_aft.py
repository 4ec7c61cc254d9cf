"""PMG-AFT: TeCoA, held near the frozen original on adversarial images and near its own clean prediction.

Source   Wang et al. 2024, arXiv:2401.04350. `paper`: the form that the re-implementation in YuboCui/AGFT
         (train.py) states as the paper's, read there, not in the paper. `released`: the authors' PMG_AFT.py.
Threat   any norm that `attacks.geometry` knows; the released attack is cross-entropy, K = 2, student in train
         mode (`[inner] mode = "train"`).
Departs  the released code lets gradients flow into the frozen model's weights, where nobody uses them, and
         normalises with ImageNet statistics; both are left out.
Symbols  x clean image, x' adversarial image, y label; S student, 0 frozen original (`anchor`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from robustbench_vlm.defenses.losses import at_once, ce, kl, reduced
from robustbench_vlm.types import Passes, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective, Roles, Step


@dataclass(frozen=True)
class PmgAft:
    """CE(x') + general_weight KL(P_0(x') || P_S(x')) + clean_weight KL(P_S(x) || P_S(x')).

    Attributes:
        form: `paper`, logits with the models' own scale and means over the batch; `released`, bare cosines
            as logits (the code normalises the scaled text again, which cancels the scale) in attack and loss,
            divergences summed over the batch.
        general_weight: alpha; 1 in paper and released code.
        clean_weight: beta; 1 in paper and released code.
    """

    form: Literal["paper", "released"] = "paper"
    general_weight: Annotated[float, Field(ge=0)] = 1.0
    clean_weight: Annotated[float, Field(ge=0)] = 1.0

    teachers: ClassVar[tuple[str, ...]] = ("anchor",)
    needs_text: ClassVar[bool] = True
    adversarial: ClassVar[bool] = True

    def passes(self) -> Passes:
        """The student on x and x', the original on x'."""
        return Passes(2, {"anchor": 1})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Nothing: the original is asked about x', which is not there yet."""
        del roles, batch
        return {}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """CE(Z_S(x'_i), y_i), (B,), for the adversary to maximise."""
        del targets
        return lambda adv: ce(self._logits(roles, "student", adv), batch.labels)

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The three terms; the clean one has a gradient through both of its predictions."""
        with torch.no_grad():
            original = self._logits(roles, "anchor", step.adv)
        adv, clean = at_once(
            roles.student, lambda x: self._logits(roles, "student", x), step.adv, step.batch.images
        )
        robust = ce(adv, step.batch.labels).mean()
        how: Literal["sum", "batchmean"] = "sum" if self.form == "released" else "batchmean"
        general = reduced(kl(original, adv), adv.shape[1], how)
        near = reduced(kl(clean, adv), adv.shape[1], how)
        total = robust + self.general_weight * general + self.clean_weight * near
        parts = {"ce_adv": robust, "kl_general": general, "kl_clean": near}
        return Terms(total, {name: value.detach() for name, value in parts.items()})

    def _logits(self, roles: Roles, role: str, images: Tensor) -> Tensor:
        if self.form == "released":
            return roles.cosines(role, roles.encoder(role)(images))
        return roles.logits(role, images)


plugin = PmgAft
