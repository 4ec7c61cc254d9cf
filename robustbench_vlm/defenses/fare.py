"""FARE: the student embeds the adversarial image where the original encoder embeds the clean one.

Source   Schlarmann, Singh, Croce, Hein 2024, arXiv:2402.12336, the FARE loss.
Threat   any norm that `engine.geometry` knows.
Departs  nothing. Embeddings are compared without normalisation, and squares are summed over dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import require_one_space, squared_distance

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective


@dataclass(frozen=True)
class Fare(Defense):
    """Squared distance to the clean embedding of the original; uses no labels and no text."""

    teachers: ClassVar[tuple[str, ...]] = ("anchor",)
    needs_text: ClassVar[bool] = False

    def require(self, roles: Roles) -> None:
        """Student and original must have embeddings of the same width."""
        require_one_space(roles, "anchor")

    def passes(self) -> Passes:
        """The student on x', the original on x."""
        return Passes(1, {"anchor": 1})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Embeddings (B, D) of the original on the clean images, under `anchor`."""
        return {"anchor": roles.teachers["anchor"](batch.images)}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """||z_S(x'_i) - z_0(x_i)||^2, (B,)."""
        del batch
        return lambda adv: squared_distance(roles.student(adv), targets["anchor"])

    def outer(self, roles: Roles, step: Step) -> Terms:
        """L = (1/B) sum_i ||z_S(x'_i) - z_0(x_i)||^2."""
        drift = squared_distance(roles.student(step.adv), step.targets["anchor"]).mean()
        return Terms(total=drift, parts={"l2_adv": drift.detach()})


plugin = Fare
