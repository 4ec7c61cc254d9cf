"""AMMKD: distillation from two teachers on clean images, weighted so that no step raises either loss.

Source   Li et al. 2025, arXiv:2509.00039. Read: the abstract (two CLIP teachers, class vectors computed once,
         divergences, weights by treating the two losses as a multi-objective problem in gradient space). Not
         read: the equations. The two-task MGDA below is our derivation from that sentence.
Threat   none: not an adversarial defense.
Departs  the fusion of image and text features is left out. Other departures are unknown, since the equations
         were not read.
Symbols  x image; S student; first, second the teachers; g_t gradient of teacher t's loss with respect to the
         student's embedding of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field

from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import TINY, kl

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch


@dataclass(frozen=True)
class Ammkd(Defense):
    """lambda L_1 + (1 - lambda) L_2, with L_t = mean_i T^2 KL(softmax(Z_t(x_i)/T) || softmax(Z_S(x_i)/T)).

    lambda = <g_2, g_2 - g_1> / |g_1 - g_2|^2, cut to [0, 1], gives the shortest vector between g_1 and g_2;
    both losses fall along it. Equal gradients give lambda = 1/2.

    Attributes:
        temperature: T; 1 by default, our choice.
    """

    temperature: Annotated[float, Field(gt=0)] = 1.0

    teachers: ClassVar[tuple[str, ...]] = ("first", "second")
    adversarial: ClassVar[bool] = False

    def passes(self) -> Passes:
        """The student and both teachers on x; the gradients in embedding space run no tower."""
        return Passes(1, {"first": 1, "second": 1})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Logits (B, C) of both teachers on the images, under `first` and `second`."""
        return {role: roles.logits(role, batch.images) for role in self.teachers}

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The weighted sum of the class docstring; no gradient flows through lambda."""
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
