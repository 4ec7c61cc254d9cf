"""Sim-CLIP: unsupervised; the adversarial embedding gets the direction of the clean one.

Source   Hossain, Imteaj 2024, arXiv:2407.14971. `released`: speedlab-git/SimCLIP, read. `paper`: the Siamese
         loss as summaries of the paper state it; the paper itself was not read.
Threat   any norm that `engine.geometry` knows; the attack maximises the squared distance, not the angle.
Departs  the released loss has a second half, -1/2 cos(z_0(x), sg z_S(x')). Its clean branch is the frozen
         original, so it has no gradient; it is left out.
Symbols  x clean image, x' adversarial image; z_S student, z_0 frozen original (`anchor`); sg stop-gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import cosine, in_one_forward, require_one_space, squared_distance

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective


@dataclass(frozen=True)
class SimClip(Defense):
    """Cosine to the clean embedding; uses no labels and no text.

    Attributes:
        form: `released`, -1/2 cos(z_S(x'), z_0(x)), whose clean branch is the original; `paper`,
            -1/2 [cos(z_S(x'), sg z_S(x)) + cos(z_S(x), sg z_S(x'))], whose clean branch is the student. In
            `paper` the original enters the attack only.
    """

    form: Literal["released", "paper"] = "released"

    teachers: ClassVar[tuple[str, ...]] = ("anchor",)
    needs_text: ClassVar[bool] = False

    def require(self, roles: Roles) -> None:
        """Student and original must have embeddings of the same width."""
        require_one_space(roles, "anchor")

    def passes(self) -> Passes:
        """The student on x', in the paper's form on x too; the original on x."""
        return Passes(1 if self.form == "released" else 2, {"anchor": 1})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Embeddings (B, D) of the original on the clean images, under `anchor`."""
        return {"anchor": roles.teachers["anchor"](batch.images)}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """||z_S(x'_i) - z_0(x_i)||^2, (B,)."""
        del batch
        return lambda adv: squared_distance(roles.student(adv), targets["anchor"])

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The mean over the batch of the form's loss."""
        if self.form == "released":
            adv = roles.student(step.adv)
            near = cosine(adv, step.targets["anchor"]).mean()
            return Terms(-0.5 * near, {"cosine": near.detach()})
        adv, clean = in_one_forward(roles.student, roles.student, step.adv, step.batch.images)
        near = (cosine(adv, clean.detach()) + cosine(clean, adv.detach())).mean()
        return Terms(-0.5 * near, {"cosine": near.detach() / 2})

    def loss_at_agreement(self, roles: Roles, batch: Batch) -> Tensor | float:
        """Minus one half for every cosine of the form, which is 1."""
        del roles, batch
        return -0.5 if self.form == "released" else -1.0


plugin = SimClip
