"""TRADES: cross-entropy on clean images, and a penalty for predictions that change under attack.

Source   Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan 2019 (ICML), arXiv:1901.08573: the surrogate loss of Section
         4 and its Algorithm 1. The form of every term is that of the released code, yaodongyu/TRADES
         (trades.py).
Threat   any norm that `engine.geometry` knows; the released attack maximises the penalty, 10 steps from
         x + 0.001 N(0, 1), student in eval mode (`[inner] start = "gaussian"`).
Departs  made for CIFAR logits; here zero-shot logits replace them. The released code runs the student on x
         again in every attack step and once more for the penalty; here `targets` runs it once before the
         attack, and the logits of the cross-entropy serve the penalty. Without batch norm and dropout the
         numbers are the same.
Symbols  x clean image, x' adversarial image, y label; S student; beta the 1/lambda of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import ce, kl, student_logits

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective


@dataclass(frozen=True)
class Trades(Defense):
    """mean_i CE(P_S(x_i), y_i) + beta mean_i KL(P_S(x_i) || P_S(x'_i)); no teacher.

    Attributes:
        beta: weight of the penalty, 1/lambda; 6 gives the most robust CIFAR-10 model of the paper, and 1 is
            the default of the released functions.
    """

    beta: Annotated[float, Field(ge=0)] = 6.0

    def passes(self) -> Passes:
        """The student on x and x' with gradient, and on x without gradient before the attack."""
        return Passes(2, student_no_grad=1)

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Logits (B, C) of the student on the clean images, under `clean`."""
        return {"clean": roles.logits("student", batch.images)}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """KL(P_S(x_i) || P_S(x'_i)), (B,); no gradient flows through P_S(x_i)."""
        del batch
        return lambda adv: kl(targets["clean"], roles.logits("student", adv))

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The sum of the class docstring; the penalty has a gradient through both predictions."""
        clean, adv = student_logits(roles, step.batch.images, step.adv)
        natural, penalty = ce(clean, step.batch.labels).mean(), kl(clean, adv).mean()
        parts = {"ce_clean": natural.detach(), "kl_adv": penalty.detach()}
        return Terms(natural + self.beta * penalty, parts)

    def loss_at_agreement(self, roles: Roles, batch: Batch) -> Tensor | float:
        """The cross-entropy: both predictions of the penalty are the same."""
        return ce(roles.logits("student", batch.images), batch.labels).mean()


plugin = Trades
