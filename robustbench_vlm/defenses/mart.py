"""MART: misclassification-aware adversarial training; samples that the student gets wrong weigh more.

Source   Wang, Zou, Yi, Bailey, Ma, Gu 2020 (ICLR), openreview rklOg6EFwS: the boosted cross-entropy and the
         loss built on it, in the form of the released code, YisenWang/MART (mart.py).
Threat   any norm that `engine.geometry` knows; the released attack maximises cross-entropy, 10 steps from
         x + 0.001 N(0, 1), student in eval mode (`[inner] start = "gaussian"`).
Departs  made for CIFAR logits; here zero-shot logits replace them. The released code computes
         log(1.0001 - p_k + 1e-12) and 1.0000001 - p_y; here the constants are left out, and log(1 - p_k) is
         computed from log-probabilities. Where p_k approaches 1, the released term is bounded by 9.2 and
         this one grows with the logits, as cross-entropy does.
Symbols  x clean image, x' adversarial image, y label; S student; p = P_S, k the most probable wrong class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch.nn import functional as F  # noqa: N812 - the customary name

from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import ce, kl, of_label, student_logits

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective


@dataclass(frozen=True)
class Mart(Defense):
    """mean_i BCE(p(x'_i), y_i) + beta mean_i KL(p(x_i) || p(x'_i)) (1 - p_y(x_i)); no teacher.

    BCE(p, y) = -log p_y - log(1 - max_{k != y} p_k). The gradient flows through both predictions and through
    the weight 1 - p_y(x), as in the released code.

    Attributes:
        beta: weight of the second term, the lambda of the paper; 5 in the released train_resnet.py, 6 in
            train_wideresnet.py and as the default of the released loss.
    """

    beta: Annotated[float, Field(ge=0)] = 5.0

    def passes(self) -> Passes:
        """The student on x and x'."""
        return Passes(2)

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """CE(Z_S(x'_i), y_i), (B,)."""
        del targets
        return lambda adv: ce(roles.logits("student", adv), batch.labels)

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The sum of the class docstring."""
        labels = step.batch.labels
        clean, adv = student_logits(roles, step.batch.images, step.adv)
        boosted = boosted_ce(adv, labels).mean()
        unsure = 1 - of_label(clean.softmax(dim=-1), labels)
        penalty = (kl(clean, adv) * unsure).mean()
        parts = {"bce_adv": boosted, "kl_weighted": penalty, "weight": unsure.mean()}
        return Terms(boosted + self.beta * penalty, {name: value.detach() for name, value in parts.items()})

    def loss_at_agreement(self, roles: Roles, batch: Batch) -> Tensor | float:
        """The boosted cross-entropy on clean images: both predictions of the second term are the same."""
        return boosted_ce(roles.logits("student", batch.images), batch.labels).mean()


def boosted_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Boosted cross-entropy -log p_y - log(1 - max_{k != y} p_k) of logits (B, C) and labels (B,): (B,).

    1 - p_k is computed as the sum of all other probabilities, so its logarithm stays finite and exact where
    p_k rounds to 1.
    """
    log_p = F.log_softmax(logits, dim=-1)
    wrong = log_p.detach().scatter(1, labels[:, None], -torch.inf).argmax(dim=-1, keepdim=True)
    others = log_p.scatter(1, wrong, -torch.inf)
    return -of_label(log_p, labels) - others.logsumexp(dim=-1)


plugin = Mart
