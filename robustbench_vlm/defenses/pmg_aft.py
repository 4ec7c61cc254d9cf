"""PMG-AFT: TeCoA with two penalties, for leaving the frozen original on x' and the own prediction on x.

Source   Wang et al. 2024, arXiv:2401.04350. `paper`: the form that the re-implementation in YuboCui/AGFT
         (train.py) states as that of the paper, which itself was not read. `released`: the authors'
         PMG_AFT.py.
Threat   any norm that `engine.geometry` knows; the released attack is cross-entropy, 2 steps, student in
         train mode (`[inner] mode = "train"`).
Departs  the released code computes gradients of the frozen model's weights, which nothing uses, and
         normalises with ImageNet statistics; both are left out.
Symbols  x clean image, x' adversarial image, y label; S student, 0 frozen original (`anchor`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import ce, in_one_forward, kl, reduced

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective


@dataclass(frozen=True)
class PmgAft(Defense):
    """CE(x') + general_weight KL(P_0(x') || P_S(x')) + clean_weight KL(P_S(x) || P_S(x')).

    Attributes:
        form: `paper`, logits with the models' own scale, means over the batch; `released`, cosines as logits
            in attack and loss (the code normalises the scaled text again, which cancels the scale), and
            divergences summed over the batch.
        general_weight: alpha; 1 in paper and released code.
        clean_weight: beta; 1 in paper and released code.
    """

    form: Literal["paper", "released"] = "paper"
    general_weight: Annotated[float, Field(ge=0)] = 1.0
    clean_weight: Annotated[float, Field(ge=0)] = 1.0

    teachers: ClassVar[tuple[str, ...]] = ("anchor",)

    def passes(self) -> Passes:
        """The student on x and x', the original on x'."""
        return Passes(2, {"anchor": 1})

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """CE(Z_S(x'_i), y_i), (B,)."""
        del targets
        return lambda adv: ce(self._logits(roles, "student", adv), batch.labels)

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The sum of the class docstring; the last term has a gradient through both predictions."""
        with torch.no_grad():
            original = self._logits(roles, "anchor", step.adv)
        adv, clean = in_one_forward(
            roles.student, lambda x: self._logits(roles, "student", x), step.adv, step.batch.images
        )
        robust = ce(adv, step.batch.labels).mean()
        how: Literal["sum", "batchmean"] = "sum" if self.form == "released" else "batchmean"
        general = reduced(kl(original, adv), adv.shape[1], how)
        near = reduced(kl(clean, adv), adv.shape[1], how)
        total = robust + self.general_weight * general + self.clean_weight * near
        parts = {"ce_adv": robust, "kl_general": general, "kl_clean": near}
        return Terms(total, {name: value.detach() for name, value in parts.items()})

    def loss_at_agreement(self, roles: Roles, batch: Batch) -> Tensor | float:
        """The cross-entropy, with the logits of the form."""
        return ce(self._logits(roles, "student", batch.images), batch.labels).mean()

    def _logits(self, roles: Roles, role: str, images: Tensor) -> Tensor:
        if self.form == "released":
            return roles.cosines(role, roles.encoder(role)(images))
        return roles.logits(role, images)


plugin = PmgAft
