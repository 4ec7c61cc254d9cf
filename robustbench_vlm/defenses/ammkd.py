"""AMMKD: two teachers on clean images, weighed so that no step hurts either of them.

Source   Li et al. 2025, arXiv:2509.00039. Read: the abstract (two CLIP teachers, class vectors computed once,
         divergences, weights by treating the two losses as a multi-objective problem in gradient space). The
         equations were not to be had: the two-task MGDA below is its natural form, and ours.
Threat   none: not an adversarial defense.
Departs  what cannot be compared cannot be said; the fusion of image and text features is left out.
Symbols  x image; S student; first, second the teachers; g_t gradient of teacher t's loss with respect to the
         student's embedding of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field

from robustbench_vlm.defenses.losses import TINY, kl
from robustbench_vlm.errors import TrainingError
from robustbench_vlm.types import Passes, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective, Roles, Step


@dataclass(frozen=True)
class Ammkd:
    """lambda L_1 + (1 - lambda) L_2, with L_t = mean_i T^2 KL(softmax(Z_t(x_i)/T) || softmax(Z_S(x_i)/T)).

    lambda = <g_2, g_2 - g_1> / |g_1 - g_2|^2, cut to [0, 1]: the shortest vector between g_1 and g_2, along
    which both losses fall. Equal gradients leave lambda = 1/2.

    Attributes:
        temperature: T; 1, ours.
    """

    temperature: Annotated[float, Field(gt=0)] = 1.0

    teachers: ClassVar[tuple[str, ...]] = ("first", "second")
    needs_text: ClassVar[bool] = True
    adversarial: ClassVar[bool] = False

    def passes(self) -> Passes:
        """The student and both teachers on x; the gradients in embedding space cost no tower."""
        return Passes(1, {"first": 1, "second": 1})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Both teachers on the images: {"first": logits (B, C), "second": likewise}."""
        return {role: roles.logits(role, batch.images) for role in self.teachers}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """There is no adversary.

        Raises:
            TrainingError: always.
        """
        del roles, batch, targets
        raise TrainingError("ammkd: asked for an inner objective, which it does not have")

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The weighted sum of the class; lambda is a constant to the gradient."""
        t = self.temperature
        embeddings = roles.student(step.batch.images)
        logits = roles.student.logit_scale * roles.cosines("student", embeddings)
        losses = [t**2 * kl(step.targets[role] / t, logits / t).mean() for role in self.teachers]
        g1, g2 = (torch.autograd.grad(loss, embeddings, retain_graph=True)[0] for loss in losses)
        apart = (g1 - g2).square().sum()
        share = ((g2 * (g2 - g1)).sum() / apart.clamp(min=TINY)).clamp(0, 1)
        share = torch.where(apart > TINY, share, torch.full_like(share, 0.5))
        total = share * losses[0] + (1 - share) * losses[1]
        parts = {"kl_first": losses[0], "kl_second": losses[1], "lambda": share}
        return Terms(total, {name: value.detach() for name, value in parts.items()})


plugin = Ammkd
