"""Sim-CLIP: unsupervised; the adversarial embedding points where the clean one does.

Source   Hossain, Imteaj 2024, arXiv:2407.14971. `released`: speedlab-git/SimCLIP, read. `paper`: the Siamese
         loss as summaries of the paper give it; the paper itself was not read.
Threat   any norm that `attacks.geometry` knows; the attack maximises the squared distance, not the angle.
Departs  the released loss has a second half, -1/2 cos(z_0(x), sg z_S(x')), without any gradient, since its
         clean branch is the frozen original; that half is left out.
Symbols  x clean image, x' adversarial image; z_S student, z_0 frozen original (`anchor`); sg stop-gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from robustbench_vlm.defenses.losses import at_once, cosine, l2, require_one_space
from robustbench_vlm.types import Passes, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective, Roles, Step


@dataclass(frozen=True)
class SimClip:
    """Cosine to the clean embedding; needs no labels and no text.

    Attributes:
        form: `released`, -1/2 cos(z_S(x'), z_0(x)), the original as the clean branch; `paper`,
            -1/2 [cos(z_S(x'), sg z_S(x)) + cos(z_S(x), sg z_S(x'))], the student as its own clean branch,
            in which the original is only what the attack moves away from.
    """

    form: Literal["released", "paper"] = "released"

    teachers: ClassVar[tuple[str, ...]] = ("anchor",)
    needs_text: ClassVar[bool] = False
    adversarial: ClassVar[bool] = True

    def require(self, roles: Roles) -> None:
        """Both towers embed into the same space."""
        require_one_space(roles, "anchor")

    def passes(self) -> Passes:
        """The student on x', in the paper's form on x too; the original on x."""
        return Passes(1 if self.form == "released" else 2, {"anchor": 1})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Where the frozen original puts the clean images: {"anchor": (B, D)}."""
        return {"anchor": roles.teachers["anchor"](batch.images)}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """||z_S(x'_i) - z_0(x_i)||^2, (B,), for the adversary to maximise."""
        del batch  # the objective is unsupervised
        return lambda adv: l2(roles.student(adv), targets["anchor"])

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The mean over the batch of the form's loss."""
        if self.form == "released":
            adv = roles.student(step.adv)
            near = cosine(adv, step.targets["anchor"]).mean()
            return Terms(-0.5 * near, {"cosine": near.detach()})
        adv, clean = at_once(roles.student, roles.student, step.adv, step.batch.images)
        near = (cosine(adv, clean.detach()) + cosine(clean, adv.detach())).mean()
        return Terms(-0.5 * near, {"cosine": near.detach() / 2})


plugin = SimClip
