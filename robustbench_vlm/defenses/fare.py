"""FARE: pull the adversarial embedding back to where the original encoder put the clean one.

Source   Schlarmann, Singh, Croce, Hein 2024, arXiv:2402.12336, the FARE loss.
Threat   any norm that `attacks.geometry` knows.
Departs  nothing; embeddings are compared as the tower gives them, summed over dimensions, not unit length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from robustbench_vlm.defenses.losses import l2, require_one_space
from robustbench_vlm.types import Passes, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective, Roles, Step


@dataclass(frozen=True)
class Fare:
    """The anchored embedding loss; needs no labels and no text."""

    teachers: ClassVar[tuple[str, ...]] = ("anchor",)
    needs_text: ClassVar[bool] = False
    adversarial: ClassVar[bool] = True

    def require(self, roles: Roles) -> None:
        """Both towers embed into the same space."""
        require_one_space(roles, "anchor")

    def passes(self) -> Passes:
        """The student on x', the original on x."""
        return Passes(1, {"anchor": 1})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Where the frozen original puts the clean images: {"anchor": (B, D)}."""
        return {"anchor": roles.teachers["anchor"](batch.images)}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """||z_S(x'_i) - z_0(x_i)||^2, (B,), for the adversary to maximise."""
        del batch  # the objective is unsupervised
        return lambda adv: l2(roles.student(adv), targets["anchor"])

    def outer(self, roles: Roles, step: Step) -> Terms:
        """L = (1/B) sum_i ||z_S(x'_i) - z_0(x_i)||^2."""
        drift = l2(roles.student(step.adv), step.targets["anchor"]).mean()
        return Terms(total=drift, parts={"l2_adv": drift.detach()})


plugin = Fare
