"""Projected gradient ascent of any objective: the inner maximisation of adversarial training.

It uses the steps and projections of the attacks, without verdicts and without refilling: a training step
needs the last iterate of every image, misclassified or not. It equals PGD in RobustVLM's training, except
that the momentum 0.9 on signs of that code is left out; it moves only pixels whose gradient is exactly zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustbench_vlm.engine import geometry
from robustbench_vlm.errors import AttackError
from robustbench_vlm.threat import Threat
from robustbench_vlm.types import Objective


def ascend(
    objective: Objective,
    images: Tensor,
    threat: Threat,
    *,
    steps: int,
    step_size: float,
    start: Tensor | None = None,
) -> Tensor:
    """The last iterate of projected ascent on `objective`.

    Args:
        objective: adversarial images (B, 3, H, W) -> (B,), which is maximised. Its sum is differentiated, so
            each image's gradient is its own.
        images: (B, 3, H, W) float32 in [0, 1], the centres of the balls.
        threat: ball and radius.
        steps: gradient steps; each takes one forward and one backward with respect to the images alone.
        step_size: length of a step in pixel units.
        start: (B, 3, H, W) first iterate, for example `geometry.uniform_start`; the images if None.

    Returns:
        (B, 3, H, W) detached, in ball and box. Parameters receive no gradient.

    Raises:
        AttackError: a gradient is not finite, or the objective does not depend on the images.
    """
    x = (images if start is None else start).detach()
    lower, upper = geometry.bounds(images.detach(), threat)
    worst = torch.zeros((), device=images.device)
    for _ in range(steps):
        leaf = x.requires_grad_()
        with torch.enable_grad():
            values = objective(leaf)
        if not values.requires_grad:
            raise AttackError("the objective gives no gradient with respect to the images")
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        worst = torch.maximum(worst, gradient.abs().amax())
        move = geometry.direction(gradient, threat).mul_(step_size).add_(leaf.detach())
        linf = threat.norm == "linf"
        x = move.clamp_(lower, upper) if linf else geometry.project(move, images.detach(), threat)
    if not torch.isfinite(worst):  # read once, at the end: reading waits for the device
        raise AttackError("the gradient of the inner maximisation is not finite")
    return x
