"""Balls and boxes: random starts, steps, projections, and the distance by which an image is outside.

Pixels are float32 in [0, 1]; norms are over all entries of one image. Points are projected onto the ball
first and clipped to the box second: clipping moves a point towards every point of the box, so also towards
the centre of the ball, and cannot leave the ball again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustbench_vlm.engine import l1
from robustbench_vlm.engine.noise import Noise
from robustbench_vlm.engine.row_ops import spread
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat

TINY = 1e-12


def radius(threat: Threat) -> float:
    """The radius as a float."""
    return float(threat.eps)


def bounds(images: Tensor, threat: Threat) -> tuple[Tensor, Tensor]:
    """Lower and upper limit of every pixel: ball and box for Linf, the box alone for other norms."""
    if threat.norm == "linf":
        eps = radius(threat)
        return (images - eps).clamp_(min=0), (images + eps).clamp_(max=1)
    return torch.zeros_like(images), torch.ones_like(images)


def length(delta: Tensor) -> Tensor:
    """(S, ...) -> (S,) L2 norm of each row."""
    size: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    return size


def project(x: Tensor, images: Tensor, threat: Threat) -> Tensor:
    """Each row of `x` onto the ball around `images`, then into the box."""
    if threat.norm == "linf":
        lower, upper = bounds(images, threat)
        return x.clamp(lower, upper)
    delta = x - images
    if threat.norm == "l1":
        return l1.onto(delta, images, radius(threat))
    size = length(delta)
    delta = delta.div_(spread(size + TINY, delta)).mul_(spread(size.clamp(max=radius(threat)), delta))
    return delta.add_(images).clamp_(0, 1)


def direction(gradient: Tensor, threat: Threat) -> Tensor:
    """Steepest ascent of unit size: the sign for Linf (sign(0) = 0), the unit gradient for L2.

    Raises:
        InputError: L1, where steepest ascent changes a single pixel; `apgd_l1` steps along several.
    """
    if threat.norm == "linf":
        return gradient.sign()
    _require_dense(threat)
    return gradient / spread(length(gradient) + TINY, gradient)


def slack(threat: Threat) -> float:
    """What float32 rounding may add to a distance: 1e-6 for Linf, else 1e-5 of the radius, at least 1e-6."""
    return threat.slack


def excess(x: Tensor, images: Tensor, threat: Threat) -> Tensor:
    """(S,) float64: by how much each row is outside ball or box, the larger of both; at most 0 inside.

    NaN pixels count as infinitely far outside.
    """
    wide = x.double()
    delta = (wide - images.double()).flatten(1)
    size = distance(delta, threat.norm)
    flat = wide.flatten(1)
    box = torch.maximum(-flat.amin(1), flat.amax(1) - 1)
    return torch.maximum(size - float(threat.eps), box).nan_to_num(nan=torch.inf)


def distance(delta: Tensor, norm: str) -> Tensor:
    """(S, d) -> (S,) the norm of each row, in the precision of `delta`."""
    if norm == "linf":
        return delta.abs().amax(1)
    return delta.abs().sum(1) if norm == "l1" else delta.square().sum(1).sqrt()


def uniform_start(images: Tensor, threat: Threat, noise: Noise, *, box: bool = True) -> Tensor:
    """PGD's start: Linf uniform in the ball; L2 a uniform direction with a uniform length.

    Args:
        images: (n, 3, H, W).
        threat: ball to start in.
        noise: of the n rows.
        box: whether to clip into [0, 1]. RobustVLM's training does not clip before its first forward.
    """
    shape, eps = tuple(images.shape[1:]), radius(threat)
    if threat.norm == "linf":
        move = noise.uniform(shape).mul_(2).sub_(1).mul_(eps)
    else:
        _require_dense(threat)
        draw = noise.normal(shape)
        reach = eps * noise.uniform((1,), "length").double()[:, 0] / (_size(draw) + TINY)
        move = draw.mul_(spread(reach.float(), draw))
    start = images + move.to(images.device)
    return project(start, images, threat) if box else start


def surface_start(images: Tensor, threat: Threat, noise: Noise) -> Tensor:
    """APGD's start: noise scaled so that it touches the ball's surface, then clipped into the box.

    L1: standard normal noise projected onto ball and box, which leaves few of its entries.
    """
    shape = tuple(images.shape[1:])
    if threat.norm == "l1":
        return l1.onto(noise.normal(shape).to(images.device), images, radius(threat))
    if threat.norm == "linf":
        draw = noise.uniform(shape).mul_(2).sub_(1)
        size = draw.flatten(1).abs().amax(1) + TINY
    else:
        draw = noise.normal(shape)
        size = (_size(draw) + TINY).float()
    return (images + radius(threat) * draw.div_(spread(size, draw)).to(images.device)).clamp_(0, 1)


def _size(draw: Tensor) -> Tensor:
    """(n,) L2 norms, summed in float64, so that float32 results do not depend on batch or thread count."""
    return draw.double().flatten(1).square().sum(1).sqrt()


def _require_dense(threat: Threat) -> None:
    """Refuse L1: steps and starts here change every pixel."""
    if threat.norm == "l1":
        raise InputError("norm 'l1'", "no dense step or start", "linf or l2")
