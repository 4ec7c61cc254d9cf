"""Examinations of a model on a few of its own images, before any attack: is it what attacks assume?

Attacks assume a deterministic function that treats every row independently of the others, returns logits, and
whose gradient is that of what it computes. If an assumption is wrong, a robust accuracy does not mean what it
claims, so a failed examination becomes a flag of the result. All calls have the fixed shape of the canonical
pass, and all random numbers are keyed by image. The results depend on the model, its images and the seed
alone, not on the order of the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_vlm import rng
from robustbench_vlm.engine import canonical, gradient_check, losses, module_checks
from robustbench_vlm.engine.check_record import Check, Level, check
from robustbench_vlm.engine.check_record import Examined as Examined
from robustbench_vlm.engine.oracle import Evaluation, Oracle
from robustbench_vlm.engine.row_ops import spread
from robustbench_vlm.errors import AttackError
from robustbench_vlm.types import Classify

SHARE = 0.01  # share of the images above which missing gradients or saturation fail
REPEATS = 5  # how often the same call is made
ULPS = 64  # allowed change from row to row or kernel to kernel, in last places of the largest logit
NEAR = 10  # a clean margin is near a change if it is below NEAR times the change
SUMS_TO_ONE = 1e-5  # allowed distance of a sum of probabilities from 1

DERIVATIVES = 8  # number of images whose derivatives are compared with differences
AGREEMENT = 0.05  # allowed median error of those derivatives, relative to the size of the gradient


@dataclass(frozen=True)
class _Sample:
    """Images in one batch of the fixed shape; the first `n` rows are examined, the others are copies.

    Attributes:
        oracle: the model; counts its calls.
        images: (rows, 3, H, W).
        labels: (rows,) int64.
        keys: names of the n images.
        logits: (rows, C) of the first call.
    """

    oracle: Oracle
    images: Tensor
    labels: Tensor
    keys: tuple[str, ...]
    logits: Tensor

    @property
    def n(self) -> int:
        return len(self.keys)

    @property
    def rounding(self) -> float:
        """Allowed change of a logit from one call to another."""
        return gradient_check.ulps(self.logits[: self.n], ULPS)

    @property
    def right(self) -> Tensor:
        """(n,) bool: the image can be attacked, since it is finite and classified correctly."""
        logits, labels = self.logits[: self.n], self.labels[: self.n]
        return logits.isfinite().all(1) & (logits.argmax(1) == labels)

    def canonical_logits(self, images: Tensor) -> Tensor:
        """(m, 3, H, W) -> (m, C) canonical logits, in as few calls as the shape allows."""

        def counted(batch: Tensor) -> Tensor:
            self.oracle.calls.forwards += 1
            return self.oracle.classify(batch)

        return canonical.logits(counted, images, len(self.images))


def examine(
    classify: Classify,
    images: Tensor,
    labels: Tensor,
    keys: Sequence[str],
    *,
    rows: int,
    seed: int,
    white_box: bool = True,
    only_ce: bool = False,
) -> Examined:
    """Run every examination of one model on its own images: some 10 calls, more if `rows` is below 64.

    Args:
        classify: (B, 3, H, W) in [0, 1] -> logits (B, C), the function that attacks are given.
        images: (N, 3, H, W) float32 in [0, 1], on the model's device. At most `rows` of them are used: those
            whose hashes of seed and key are smallest.
        labels: (N,) int64.
        keys: N distinct names.
        rows: number of rows of every call.
        seed: of the choice of images and of random directions.
        white_box: whether the chain takes gradients; if not, they are not examined.
        only_ce: whether cross-entropy is the only loss of the chain, so that saturation fails.

    Raises:
        AttackError: the model returns anything but logits (rows, C).
    """
    positions = chosen(keys, rows, seed)
    index = torch.tensor(positions, device=images.device)
    before = module_checks.checksums(classify)
    sample = _begin(classify, images[index], labels[index], tuple(keys[i] for i in positions), rows)
    repeated = _random_output(sample)
    regrouped = _batch_dependent(sample, repeated.value or 0.0)
    found = [repeated, regrouped, _probabilities(sample)]
    if white_box:
        noise = max(repeated.value or 0.0, regrouped.value or 0.0)
        found += _gradients(sample, seed, noise, only_ce=only_ce)
    found.append(module_checks.training_mode(classify))
    found.append(module_checks.state_changed(before, module_checks.checksums(classify)))
    calls = sample.oracle.calls
    return Examined(tuple(found), calls.forwards, calls.gradients)


def chosen(keys: Sequence[str], rows: int, seed: int) -> list[int]:
    """Positions of the images that `examine` uses."""
    return sorted(range(len(keys)), key=lambda i: rng.rank(seed, keys[i]))[:rows]


def _begin(classify: Classify, images: Tensor, labels: Tensor, keys: tuple[str, ...], rows: int) -> _Sample:
    oracle, batch = Oracle(classify), canonical.padded(images, rows)
    oracle.calls.forwards += 1
    return _Sample(
        oracle, batch, canonical.padded(labels, rows), keys, canonical.logits(classify, batch, rows)
    )


def _change(sample: _Sample, other: Tensor, rows: Tensor) -> float:
    """Largest change of a logit, from the first call to `other` (rows, C), in `rows`; finite ones only."""
    moved = (other - sample.logits)[rows].abs()
    return float(moved.nan_to_num(nan=0.0, posinf=0.0).max()) if len(rows) else 0.0


def _near(sample: _Sample, change: float) -> int:
    """Number of images whose clean margin is so small that `change` could change their prediction."""
    margins = losses.correct_margin(sample.logits[: sample.n], sample.labels[: sample.n])
    return int((margins.abs() < NEAR * change).sum())


# --- a deterministic function of each row, whose outputs are logits ---------------------------------------


def _random_output(sample: _Sample) -> Check:
    every = torch.arange(sample.n, device=sample.images.device)
    change = max(_change(sample, sample.canonical_logits(sample.images), every) for _ in range(REPEATS - 1))
    near, bound = _near(sample, change), sample.rounding
    close = f"{near} of {sample.n} margins are near that"
    if change > bound:
        level: Level = "fail"
        sentence = f"{REPEATS} equal calls differ by up to {change:.2g} in a logit; {close}"
    else:
        level = "warn" if near else "pass"
        sentence = f"{REPEATS} equal calls agree to {change:.2g} in every logit"
    return check("random-output", level, change, bound, sentence)


def _batch_dependent(sample: _Sample, random: float) -> Check:
    """The same images in other rows, and beside other images (every second row becomes its negative).

    For a random model only a change well above its randomness counts.
    """
    rows, device = len(sample.images), sample.images.device
    every = torch.arange(sample.n, device=device)
    turn = rows // 2 + 1
    moved = sample.canonical_logits(sample.images.roll(turn, 0)).roll(-turn, 0)
    odd = torch.arange(rows, device=device) % 2 == 1
    mixed = torch.where(spread(odd, sample.images), 1 - sample.images, sample.images)
    regrouped = sample.canonical_logits(mixed)
    change = max(_change(sample, moved, every), _change(sample, regrouped, every[::2]))
    near, bound = _near(sample, change), max(sample.rounding, 4 * random)
    close = f"{near} of {sample.n} margins are near that"
    if change > bound:
        level: Level = "fail"
        sentence = f"other rows or neighbours change a logit by up to {change:.2g}; {close}"
    else:
        level = "warn" if near and change > random else "pass"
        sentence = f"other rows and neighbours change no logit by more than {change:.2g}"
    return check("batch-dependent", level, change, bound, sentence)


def _probabilities(sample: _Sample) -> Check:
    outputs = sample.logits[: sample.n]
    inside = bool(((outputs >= 0) & (outputs <= 1)).all())
    gap = float((outputs.sum(1) - 1).abs().nan_to_num(nan=torch.inf).max())
    if inside and gap <= SUMS_TO_ONE:
        sentence = "the outputs are probabilities: give logits, a softmax hides the gradient"
        return check("probabilities", "fail", gap, SUMS_TO_ONE, sentence)
    return check("probabilities", "pass", min(gap, 1e30), SUMS_TO_ONE, "the outputs are no probabilities")


# --- gradients ----------------------------------------------------------------------------------------------


def _gradients(sample: _Sample, seed: int, noise: float, *, only_ce: bool) -> list[Check]:
    """The examinations of the image gradients of margin and cross-entropy, or that there are none."""
    try:
        margin, ce = sample.oracle.gradients(
            sample.images,
            lambda z: torch.stack(
                [f(z, sample.labels, sample.labels) for f in (losses.attack_margin, losses.cross_entropy)], 1
            ),
        )
    except AttackError as error:
        return [check("no-gradient", "fail", 1.0, SHARE, str(error))]
    n = sample.n
    finite = (margin.finite & ce.finite)[:n]
    nonfinite = float((~finite).float().mean())
    flat = float((margin.zero[:n] & finite).float().mean())
    return [
        check("no-gradient", "pass", 0.0, SHARE, "the logits depend on the image"),
        check(
            "non-finite",
            "fail" if nonfinite > 0 else "pass",
            nonfinite,
            0.0,
            f"a logit or gradient is NaN or infinite on {nonfinite:.0%} of {n} images",
        ),
        check(
            "zero-gradient",
            "fail" if flat > SHARE else "pass",
            flat,
            SHARE,
            f"the gradient of the margin is exactly zero on {flat:.0%} of {n} images",
        ),
        _saturated(sample, ce.zero & ~margin.zero, only_ce=only_ce),
        _gradient_mismatch(sample, margin, seed, noise),
    ]


def _saturated(sample: _Sample, lost: Tensor, *, only_ce: bool) -> Check:
    """Cross-entropy stops pushing the true logit down where p_y rounds to 1, and soon has no gradient at all.

    A chain that also has a margin-type loss does not depend on it, so there saturation is a warning only.

    Args:
        sample: images and logits.
        lost: (rows,) bool, the gradient of cross-entropy is exactly zero and that of the margin is not.
        only_ce: whether the chain has no other loss.
    """
    right = sample.right
    sure = sample.logits[: sample.n].softmax(1).gather(1, sample.labels[: sample.n, None])[:, 0] == 1
    share = float((sure | lost[: sample.n])[right].float().mean()) if bool(right.any()) else 0.0
    level: Level = "pass" if share <= SHARE else "fail" if only_ce else "warn"
    instead = "" if level == "pass" else ": rely on margin or DLR losses"
    sentence = (
        f"cross-entropy is saturated in float32 on {share:.0%} of the images that can be attacked{instead}"
    )
    return check("saturated", level, share, SHARE, sentence)


def _gradient_mismatch(sample: _Sample, margin: Evaluation, seed: int, noise: float) -> Check:
    """Compare the gradient of the margin with differences of the margin, on images that have a gradient."""
    usable = (margin.finite & ~margin.zero)[: sample.n].nonzero().squeeze(1)[:DERIVATIVES]
    errors = gradient_check.errors(
        sample.oracle,
        sample.canonical_logits,
        sample.images[usable],
        sample.labels[usable],
        [sample.keys[i] for i in usable.tolist()],
        rows=len(sample.images),
        seed=seed,
        noise=noise,
    )
    if not errors:
        sentence = "no derivative could be compared"
        return check("gradient-mismatch", "warn", None, AGREEMENT, sentence)
    error = sorted(errors)[len(errors) // 2]
    if error > AGREEMENT:
        why = "quantised, rounded or detached input?"
        sentence = f"derivatives miss the differences of the margin by {error:.0%}: {why}"
        return check("gradient-mismatch", "fail", error, AGREEMENT, sentence)
    sentence = f"derivatives agree with differences of the margin on {len(errors)} images"
    return check("gradient-mismatch", "pass", error, AGREEMENT, sentence)
