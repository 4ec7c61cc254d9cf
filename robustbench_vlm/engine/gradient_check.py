"""Whether the gradient of a model is the gradient of what it computes: derivatives against differences.

The directional derivative <g, v> of the margin is compared with central differences along v. An honest
network passes, and rounding, JPEG or a detached part does not, for these reasons:

- Every step is below a tenth of an 8-bit step. A quantiser, whatever gradient it claims, mostly does not
  change at all there, and otherwise jumps.
- The images are first moved by random parts of eight 8-bit steps towards the inside of the box. Equal
  neighbouring pixels, and pixels at 0 or 1, are on kinks of max-pooling and clamping, where no gradient is
  right in every direction.
- The other class of the margin is fixed. A ReLU kink within a step spoils one image at one step length: the
  best of four step lengths counts, and the caller takes the median over the images.
- v is +1 or -1 in every pixel at random, which also finds a part of the gradient that is missing. Along it a
  margin changes by about ||g||_2 only, which in large networks is less than rounding. Then as many of the
  signs as necessary are taken from g. Errors are relative to the expected slope, and the part that rounding
  explains is subtracted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from robustbench_vlm import rng
from robustbench_vlm.engine import canonical, losses
from robustbench_vlm.engine.oracle import Oracle

GRID = 1 / 255  # the step of an 8-bit quantiser
AWAY = 8 * GRID  # how far the images are moved off ties and kinks
STEPS = tuple(0.08 * GRID / 4**k for k in range(4))  # half lengths of the differences, in each pixel
NOISE = 16  # rounding of a logit within one batch, in units in the last place of the largest logit
DROWNED = 0.1  # a difference is not used if rounding may be a larger share of it

Logits = Callable[[Tensor], Tensor]
"""(n, 3, H, W) -> (n, C) canonical logits, for any n."""


def ulps(logits: Tensor, count: int) -> float:
    """`count` units in the last place of the largest logit, in float32."""
    largest = logits.abs().nan_to_num(nan=0.0, posinf=0.0).max()
    return count * torch.finfo(torch.float32).eps * float(largest)


def errors(
    oracle: Oracle,
    canonical_logits: Logits,
    images: Tensor,
    labels: Tensor,
    keys: Sequence[str],
    *,
    rows: int,
    seed: int,
    noise: float,
) -> list[float]:
    """Relative errors of <g, v>, one for each image; none for images where rounding is too large.

    Args:
        oracle: calls the model.
        canonical_logits: of any number of images.
        images: (m, 3, H, W) that have gradients, m at most `rows`.
        labels: (m,) int64.
        keys: m names, from which points and directions are drawn.
        rows: number of rows of every call.
        seed: part of the noise's name.
        noise: largest difference of a logit between equal calls.
    """
    if not keys:
        return []
    moved = _off_ties(images, keys, seed)
    rivals = canonical_logits(moved).scatter(1, labels[:, None], -torch.inf).argmax(1)
    right, wrong = canonical.padded(labels, rows), canonical.padded(rivals, rows)
    evaluation = oracle.gradient(
        canonical.padded(moved, rows), lambda logits: losses.targeted_margin(logits, right, wrong)
    )
    g = evaluation.gradient[: len(keys)].double().flatten(1)
    noise = max(noise, ulps(evaluation.logits[: len(keys)], NOISE))
    v, size = _directions(g, keys, seed, noise)
    steps = torch.tensor(STEPS, dtype=torch.float64, device=g.device)
    rises = _differences(canonical_logits, moved, v, labels, rivals) / (2 * steps)
    slopes, rounding = (g * v).sum(1, keepdim=True), noise / steps
    missed = ((rises - slopes).abs() - rounding).clamp(min=0) / torch.maximum(rises.abs(), size)
    missed = missed.masked_fill(rounding > DROWNED * size, torch.inf).amin(1)
    return [error for error in missed.tolist() if error < torch.inf]  # neither drowned nor NaN


def _draw(part: str, shape: torch.Size, keys: Sequence[str], seed: int) -> Tensor:
    """(m, ...) uniform numbers on [0, 1): for each of m keys, of `shape` without its first dimension."""
    names = [f"{seed}/{key}/derivatives/{part}" for key in keys]
    return torch.from_numpy(np.stack([rng.uniform(name, tuple(shape[1:])) for name in names]))


def _off_ties(images: Tensor, keys: Sequence[str], seed: int) -> Tensor:
    """The images, moved by at least one step into the box, and by at most `AWAY` and one step."""
    inside = STEPS[0] + (1 - 2 * STEPS[0]) * images
    return torch.lerp(inside, _draw("point", images.shape, keys, seed).to(images.device), AWAY)


def _directions(g: Tensor, keys: Sequence[str], seed: int, noise: float) -> tuple[Tensor, Tensor]:
    """(m, d) directions of +1 and -1, and (m, 1) the expected slope along each."""
    length, total = g.norm(dim=1, keepdim=True), g.abs().sum(1, keepdim=True)
    wanted = noise / (DROWNED * STEPS[1])  # so that at least two step lengths can be used
    share = ((wanted**2 - length**2).clamp(min=0).sqrt() / total).clamp(max=1)
    signs, chosen = (_draw(part, g.shape, keys, seed).to(g.device) for part in ("sign", "share"))
    v = torch.where(chosen < share, g.sign(), torch.where(signs < 0.5, -1.0, 1.0).double())
    return v, ((share * total) ** 2 + length**2).sqrt()


def _differences(
    canonical_logits: Logits, images: Tensor, v: Tensor, labels: Tensor, rivals: Tensor
) -> Tensor:
    """(m, steps) float64 changes of the margin from x - h v to x + h v."""
    move = v.view_as(images).float()
    points = torch.stack([images + sign * h * move for h in STEPS for sign in (1, -1)], 1)
    count = points.shape[1]
    logits = canonical_logits(points.flatten(0, 1)).double()
    values = losses.targeted_margin(logits, labels.repeat_interleave(count), rivals.repeat_interleave(count))
    pairs = values.view(len(images), len(STEPS), 2)
    return pairs[..., 0] - pairs[..., 1]
