"""Checks of the image gradient: is there one, is it finite, and is it that of what the model computes?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustbench_vlm.engine import derivatives, losses
from robustbench_vlm.engine.check_record import Check, Level, check
from robustbench_vlm.engine.check_sample import CheckSample
from robustbench_vlm.engine.derivatives import Points, Segments
from robustbench_vlm.engine.oracle import Evaluation
from robustbench_vlm.errors import AttackError

SHARE = 0.01
"""Share of the images above which a missing gradient or a saturated softmax is no accident."""
AGREEMENT = 0.05
"""Relative error above which a derivative is wrong."""
ON_GRID = 0.5
"""The same where all pixels are of 8 bits, since equal neighbours and pixels at 0 or 1 sit on kinks."""
WRONG = 0.1
"""Share of images with wrong derivatives above which the gradient is wrong."""
PATH_AGREEMENT = 0.3
"""Median relative error of integrals along segments above which the gradient is wrong."""
UNITS = 1000
"""Rounding of a float32 logit between calls with and without a gradient, in units of the last place."""
LEAST_POINTS = 4
"""Points at which derivatives are compared, however few images there are; if there are as many."""
LEAST_LINES = 2
"""The same for segments of each kind."""

MISMATCH = "gradient-mismatch"


def checks(sample: CheckSample, seed: int, noise: float, *, only_ce: bool) -> list[Check]:
    """All checks that need image gradients of margin and cross-entropy; a single one if there are none.

    Args:
        sample: model and images.
        seed: of points and directions.
        noise: by how much equal calls were seen to differ in a logit.
        only_ce: whether the attacks know no loss but cross-entropy.
    """

    def objectives(labels: Tensor, logits: Tensor) -> Tensor:
        both = (losses.attack_margin, losses.cross_entropy)
        return torch.stack([loss(logits, labels, labels) for loss in both], 1)

    try:
        margin, ce = sample.probe.gradients(sample.images, sample.labels, objectives)
    except AttackError as error:
        return [check("no-gradient", "fail", 1.0, SHARE, str(error))]
    n = sample.n
    finite = (margin.finite & ce.finite)[:n]
    ill = float((~finite).float().mean())
    flat = float((margin.zero[:n] & finite).float().mean())
    return [
        check("no-gradient", "pass", 0.0, SHARE, "the logits depend on the image"),
        check(
            "non-finite",
            "fail" if ill > 0 else "pass",
            ill,
            0.0,
            f"a logit or gradient is NaN or infinite on {ill:.0%} of {n} images",
        ),
        check(
            "zero-gradient",
            "fail" if flat > SHARE else "pass",
            flat,
            SHARE,
            f"the gradient of the margin is exactly zero on {flat:.0%} of {n} images",
        ),
        _saturated(sample, ce.zero & ~margin.zero, only_ce=only_ce),
        _mismatch(sample, margin, seed, noise),
    ]


def _saturated(sample: CheckSample, lost: Tensor, *, only_ce: bool) -> Check:
    """Whether p_y rounds to 1, so that cross-entropy no longer lowers the true logit.

    Args:
        sample: model and images.
        lost: (m,) bool, the gradient of cross-entropy is exactly zero and that of the margin is not.
        only_ce: whether this decides; a chain with a margin-type loss needs no cross-entropy.
    """
    right = sample.right
    sure = sample.logits[: sample.n].softmax(1).gather(1, sample.labels[: sample.n, None])[:, 0] == 1
    share = float((sure | lost[: sample.n])[right].float().mean()) if bool(right.any()) else 0.0
    level: Level = "pass" if share <= SHARE else "fail" if only_ce else "warn"
    instead = "" if level == "pass" else ": rely on margin or DLR losses"
    found = f"cross-entropy is saturated in float32 on {share:.0%} of the images that can be attacked"
    return check("saturated", level, share, SHARE, found + instead)


def _mismatch(sample: CheckSample, margin: Evaluation, seed: int, noise: float) -> Check:
    """Whether the gradient is that of the margin, for the images that have one."""
    usable = (margin.finite & ~margin.zero)[: sample.n].nonzero().squeeze(1)
    if noise > sample.rounding or not len(usable):  # other checks fail then, and this one cannot be made
        return check(MISMATCH, "warn", None, AGREEMENT, "no derivative could be compared: see other checks")
    apart, bound = sample.change(margin.logits), sample.probe.rounding(sample.logits[: sample.n], UNITS)
    if apart > bound:
        found = f"a logit changes by {apart:.2g} when a gradient is asked for"
        return check(MISMATCH, "fail", apart, bound, found)
    local = derivatives.local_errors(sample.probe, _points(sample, usable, seed), noise)
    lines = _segments(sample, margin, usable)
    along = derivatives.path_errors(sample.probe, lines, noise, PATH_AGREEMENT)
    return judged(local, along)


def judged(local: Tensor, along: Sequence[Tensor]) -> Check:
    """The verdict on the gradient.

    Args:
        local: (m,) relative errors of single derivatives, every second one at a point with pixels of 8 bits;
            infinite where nothing could be compared.
        along: the same of integrals along segments of several kinds.
    """
    bounds = torch.full_like(local, AGREEMENT)
    bounds[1::2] = ON_GRID
    near, far = local[local.isfinite()], [errors[errors.isfinite()] for errors in along]
    worst = max(map(derivatives.median, along))
    wrong = float((local > bounds)[local.isfinite()].double().mean()) if len(near) else 0.0
    compared = len(near) + sum(map(len, far))
    if not compared:
        found = "no derivative could be compared with differences of the logits, which rounding drowns"
        return check(MISMATCH, "fail", None, AGREEMENT, found)
    if wrong > WRONG:
        error = float(near.quantile(1 - WRONG / 2))
        found = f"derivatives miss the differences of the margin by {error:.0%}: quantised or detached input?"
        return check(MISMATCH, "fail", error, AGREEMENT, found)
    if worst > PATH_AGREEMENT:
        found = f"the gradient along a line misses the change of the margin by {worst:.0%}: masked gradient?"
        return check(MISMATCH, "fail", worst, PATH_AGREEMENT, found)
    error = float(near.median()) if len(near) else worst
    found = f"derivatives agree with differences of the margin on {max(len(near), *map(len, far))} images"
    return check(MISMATCH, "pass", error, AGREEMENT if len(near) else PATH_AGREEMENT, found)


def _points(sample: CheckSample, usable: Tensor, seed: int) -> Points:
    """At most half of the images, so that their differences need few calls."""
    chosen = usable[: max(LEAST_POINTS, sample.n // 2)]
    keys = [sample.keys[i] for i in chosen.tolist()]
    return Points(sample.images[chosen], sample.labels[chosen], keys, seed)


def _segments(sample: CheckSample, margin: Evaluation, usable: Tensor) -> list[Segments]:
    """Short segments along the sign of the gradient, and long ones to an image of another class."""
    chosen = usable[: max(LEAST_LINES, sample.n // 8)]
    starts, labels = sample.images[chosen], sample.labels[chosen]
    short = (starts + derivatives.AWAY * margin.gradient[chosen].sign()).clamp(0, 1)
    others = sample.labels[None, : sample.n] != labels[:, None]
    paired = others.any(1)
    partners = others.int().argmax(1)[paired]
    return [
        Segments(starts, short, labels, 2),
        Segments(starts[paired], sample.images[partners], labels[paired], 6),
    ]
