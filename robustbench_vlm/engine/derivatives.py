"""Derivatives of a model against what it computes: close to a point, and along a segment.

Close to a point the directional derivative <g, v> of the margin is compared with central differences along v.
An honest network passes; rounding, JPEG or a detached part does not:

- Every step is below a tenth of an 8-bit step. A quantiser, whatever gradient it claims, mostly does not move
  at all there, and otherwise jumps.
- The images are first moved by random parts of eight 8-bit steps towards the inside of the box. Equal
  neighbouring pixels, and pixels at 0 or 1, sit on kinks of max-pooling and clamping, where no gradient is
  right in every direction.
- The competitor in the margin is fixed. ReLU kinks within one step spoil one image at one step: four steps
  are tried and the best of them counts.
- v is +1 or -1 in every pixel at random, which also finds a part of the gradient that is missing. Along it a
  margin changes by about ||g||_2 only, which rounding drowns in large networks; then just as many signs as
  are needed are taken from g. Errors are relative to the larger of the expected slope and the measured rise,
  and what rounding explains is taken off. So a gradient that is wrong *and* small does not escape: the rise
  shows that there is something to compare with.

Along a segment the integral of the gradient is compared with the rise of the margin from end to end (the
fundamental theorem of calculus). The rise is large there, so neither 16-bit arithmetic nor a large offset of
the logits hides it, and jumps between the ends count: those of activations that are not continuous, or of a
model that knows its images. The integral is a sum of few terms, so only large errors mean something.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustbench_vlm import rng
from robustbench_vlm.engine.probe import Probe
from robustbench_vlm.engine.row_ops import spread

GRID = 1 / 255
"""Step of an 8-bit quantiser."""
AWAY = 8 * GRID
"""Distance by which images are moved off ties and kinks, and length of short segments in each pixel."""
STEPS = tuple(0.08 * GRID / 4**k for k in range(4))
"""Lengths of the differences in each pixel."""
UNITS = 16
"""Rounding of a float32 logit within one batch, in units of the last place of the largest one."""
DROWNED = 0.1
"""Share of rounding in a difference above which the difference tells nothing."""
DROWNED_RISE = 0.25
"""The same for the rise along a segment."""
FINER = 4
"""Factor by which parts of a segment are made finer where the first ones give an error."""


@dataclass(frozen=True)
class Points:
    """Images at which derivatives are compared.

    Attributes:
        images: (m, 3, H, W) float32 in [0, 1].
        labels: (m,) int64.
        keys: m names, from which points and directions are drawn.
        seed: part of the name of the noise.
    """

    images: Tensor
    labels: Tensor
    keys: Sequence[str]
    seed: int

    def draw(self, part: str) -> Tensor:
        """(m, 3, H, W) float32 uniform on [0, 1), by key."""
        names = [f"{self.seed}/{key}/derivatives/{part}" for key in self.keys]
        shape = tuple(self.images.shape[1:])
        return torch.from_numpy(np.stack([rng.uniform(name, shape) for name in names])).to(self.images.device)

    @property
    def off_ties(self) -> Tensor:
        """The images, moved by at most `AWAY` and one step; every second one to pixels of 8 bits.

        The others are moved by at least one step into the box.
        """
        inside = STEPS[0] + (1 - 2 * STEPS[0]) * self.images
        moved = torch.lerp(inside, self.draw("point"), AWAY)
        moved[1::2] = (moved[1::2] / GRID).round() * GRID
        return moved


def local_errors(probe: Probe, points: Points, noise: float) -> Tensor:
    """Relative errors of <g, v> close to points, (m,) float64; infinite where nothing can be compared.

    Every second point has pixels of 8 bits. Errors may be larger there: pixels are equal, or at 0 or 1.

    Args:
        probe: the model.
        points: where; their gradient is not zero.
        noise: by how much equal calls were seen to differ in a logit.
    """
    if not len(points.keys) or probe.low:  # rounding to 16 bits is coarser than any of the steps
        return torch.empty(0, dtype=torch.float64)
    moved = points.off_ties
    labels = points.labels
    rivals = _rivals(probe.logits(moved), labels)
    gradients, logits = probe.margin_gradients(moved, labels, rivals)
    g = gradients.double().flatten(1)
    noise = max(noise, probe.rounding(logits, UNITS))
    v, size = _directions(g, points, noise)
    steps = torch.tensor(STEPS, dtype=torch.float64, device=g.device)
    rises = _differences(probe, moved, v, labels, rivals) / (2 * steps)
    slopes, rounding = (g * v).sum(1, keepdim=True), noise / steps
    scale = torch.maximum(rises.abs(), size)
    missed = ((rises - slopes).abs() - rounding).clamp(min=0) / scale
    drowned = (rounding > DROWNED * scale) | ~missed.isfinite()
    return missed.masked_fill(drowned, torch.inf).amin(1)


def _rivals(logits: Tensor, labels: Tensor) -> Tensor:
    """(m,) int64 the largest class beside the label."""
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)


def _directions(g: Tensor, points: Points, noise: float) -> tuple[Tensor, Tensor]:
    """Directions (m, d) of +1 and -1, and (m, 1) the slope to be expected along each."""
    length, total = g.norm(dim=1, keepdim=True), g.abs().sum(1, keepdim=True)
    wanted = noise / (DROWNED * STEPS[1])  # so that two steps can be read
    share = ((wanted**2 - length**2).clamp(min=0).sqrt() / total).clamp(max=1).nan_to_num(nan=0.0)
    signs, chosen = (points.draw(part).flatten(1) for part in ("sign", "share"))
    random = torch.where(signs < 0.5, -1.0, 1.0).double()
    v = torch.where((chosen < share) & (g != 0), g.sign(), random)
    return v, ((share * total) ** 2 + length**2).sqrt()


def _differences(probe: Probe, images: Tensor, v: Tensor, labels: Tensor, rivals: Tensor) -> Tensor:
    """(m, steps) float64 changes of the margin from x - h v to x + h v."""
    move = v.view_as(images).float()
    ends = torch.stack([images + sign * h * move for h in STEPS for sign in (1, -1)], 1)
    count = ends.shape[1]
    values = probe.margins(
        ends.flatten(0, 1), labels.repeat_interleave(count), rivals.repeat_interleave(count)
    )
    pairs = values.view(len(images), len(STEPS), 2)
    return pairs[..., 0] - pairs[..., 1]


@dataclass(frozen=True)
class Segments:
    """Straight lines in image space.

    Attributes:
        starts, ends: (m, 3, H, W).
        labels: (m,) int64 true classes of the starts.
        parts: number of points at which the gradient is evaluated, the middles of equal parts.
    """

    starts: Tensor
    ends: Tensor
    labels: Tensor
    parts: int


def path_errors(probe: Probe, lines: Sequence[Segments], noise: float, bound: float) -> list[Tensor]:
    """Relative errors of integrals along segments, (m,) float64 each; infinite where nothing can be compared.

    Segments of which half miss by more than `bound` are integrated again with finer parts: that makes the
    error of a curved function vanish, and leaves that of a wrong gradient.

    Args:
        probe: the model.
        lines: segments.
        noise: by how much equal calls were seen to differ in a logit.
        bound: median error above which segments are integrated again.
    """
    errors = _path_errors(probe, lines, noise)
    again = [i for i, found in enumerate(errors) if median(found) > bound]
    if again:
        finer = [dataclasses.replace(lines[i], parts=FINER * lines[i].parts) for i in again]
        for i, found in zip(again, _path_errors(probe, finer, noise), strict=True):
            errors[i] = found
    return errors


def median(errors: Tensor) -> float:
    """The median of the finite ones, 0 if there are none."""
    finite = errors[errors.isfinite()]
    return float(finite.median()) if len(finite) else 0.0


def _path_errors(probe: Probe, lines: Sequence[Segments], noise: float) -> list[Tensor]:
    """As `path_errors`, with the parts that the segments have; all gradients are taken in common calls."""
    starts, ends, labels = (
        torch.cat([getattr(line, name) for line in lines]) for name in ("starts", "ends", "labels")
    )
    if not len(starts):
        return [torch.empty(0, dtype=torch.float64) for _ in lines]
    parts = torch.cat([torch.full((len(line.starts),), line.parts) for line in lines])
    logits = probe.logits(torch.cat([starts, ends]))
    rivals = _rivals(logits[len(starts) :], labels)
    before, after = (
        part.double().gather(1, rivals[:, None]) - part.double().gather(1, labels[:, None])
        for part in torch.split(logits, len(starts))
    )
    rises = (after - before)[:, 0]
    index = torch.repeat_interleave(torch.arange(len(starts)), parts)
    share = torch.cat([(torch.arange(int(count)) + 0.5) / count for count in parts])
    index, share, parts = (tensor.to(starts.device) for tensor in (index, share, parts))
    between = torch.lerp(starts[index], ends[index], spread(share.float(), starts))
    gradients, _ = probe.margin_gradients(between, labels[index], rivals[index])
    slopes = (gradients.double() * (ends - starts)[index].double()).flatten(1).sum(1) / parts[index]
    zero = torch.zeros(len(starts), dtype=torch.float64, device=starts.device)
    integrals, lengths = zero.index_add(0, index, slopes), zero.index_add(0, index, slopes.abs())
    noise = 2 * max(noise, probe.rounding(logits, UNITS, 1))
    scale = torch.maximum(rises.abs(), lengths)
    missed = ((rises - integrals).abs() - noise).clamp(min=0) / scale
    missed = missed.masked_fill((noise > DROWNED_RISE * scale) | ~missed.isfinite(), torch.inf)
    return list(torch.split(missed, [len(line.starts) for line in lines]))
