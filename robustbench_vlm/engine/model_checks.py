"""Examinations of a model on a few of its own images, before any attack: is it what attacks assume?

Attacks assume a deterministic function that treats every row independently of the others, returns logits, and
whose gradient is that of what it computes. If an assumption is wrong, a robust accuracy does not mean what it
claims, so a failed examination becomes a flag of the result. All random numbers are keyed by image. The
results depend on the model, its images and the seed alone, and on the shape of calls as far as the numbers of
the model do; not on the order of the images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustbench_vlm import rng
from robustbench_vlm.engine import gradient_check, module_checks
from robustbench_vlm.engine.check_record import Check, Level, check
from robustbench_vlm.engine.check_record import Examined as Examined
from robustbench_vlm.engine.check_sample import CheckSample
from robustbench_vlm.engine.row_ops import spread
from robustbench_vlm.types import Classify

SAMPLE = 64
"""Images that are used, if there are as many."""
REPEATS = 5
"""How often the same call is made."""
SUM = 1e-5
"""Largest relative difference between the sums of rows that are probabilities, or multiples of them."""
SPREAD = 0.01
"""Share of the sum by which an output of such a row has to change from image to image."""


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
    """Run every examination of one model on its own images: some 10 calls for each `rows` images.

    Args:
        classify: (B, 3, H, W) in [0, 1] -> logits (B, C), the function that attacks are given.
        images: (N, 3, H, W) float32 in [0, 1], on the model's device. At most `SAMPLE` of them are used:
            those whose hashes of seed and key are smallest.
        labels: (N,) int64.
        keys: N distinct names.
        rows: number of rows of every call.
        seed: of the choice of images and of random directions.
        white_box: whether the chain takes gradients; if not, they are not examined.
        only_ce: whether cross-entropy is the only loss of the chain, so that saturation fails.

    Raises:
        AttackError: the model returns anything but logits (rows, C).
    """
    positions = chosen(keys, seed)
    index = torch.tensor(positions, device=images.device)
    before = module_checks.checksums(classify)
    sample = CheckSample.of(classify, images[index], labels[index], [keys[i] for i in positions], rows)
    repeated = _random_output(sample)
    regrouped = _batch_dependent(sample, repeated.value or 0.0)
    found = [repeated, regrouped, _probabilities(sample)]
    if white_box:
        noise = max(repeated.value or 0.0, regrouped.value or 0.0)
        found += gradient_check.checks(sample, seed, noise, only_ce=only_ce)
    found.append(module_checks.training_mode(classify))
    found.append(module_checks.state_changed(before, module_checks.checksums(classify)))
    calls = sample.probe.oracle.calls
    return Examined(tuple(found), calls.forwards, calls.gradients)


def chosen(keys: Sequence[str], seed: int) -> list[int]:
    """Positions of the images that `examine` uses."""
    return sorted(range(len(keys)), key=lambda i: rng.rank(seed, keys[i]))[:SAMPLE]


# --- a deterministic function of each row, whose outputs are logits ---------------------------------------


def _random_output(sample: CheckSample) -> Check:
    change = max(sample.change(sample.probe.logits(sample.images)) for _ in range(REPEATS - 1))
    near, bound = sample.near(change), sample.rounding
    close = f"{near} of {sample.n} margins are near that"
    if change > bound:
        level: Level = "fail"
        sentence = f"{REPEATS} equal calls differ by up to {change:.2g} in a logit; {close}"
    else:
        level = "warn" if near else "pass"
        sentence = f"{REPEATS} equal calls agree to {change:.2g} in every logit"
    return check("random-output", level, change, bound, sentence)


def _batch_dependent(sample: CheckSample, random: float) -> Check:
    """The same images in other rows, and beside other images (every second row becomes its negative).

    For a random model only a change well above its randomness counts.
    """
    rows, device = len(sample.images), sample.images.device
    turn = rows // 2 + 1
    moved = sample.probe.logits(sample.images.roll(turn, 0)).roll(-turn, 0)
    odd = torch.arange(rows, device=device) % 2 == 1
    mixed = torch.where(spread(odd, sample.images), 1 - sample.images, sample.images)
    regrouped = sample.probe.logits(mixed)
    change = max(sample.change(moved), sample.change(regrouped, torch.arange(0, sample.n, 2, device=device)))
    near, bound = sample.near(change), max(sample.rounding, 4 * random)
    close = f"{near} of {sample.n} margins are near that"
    if change > bound:
        level: Level = "fail"
        sentence = f"other rows or neighbours change a logit by up to {change:.2g}; {close}"
    else:
        level = "warn" if near and change > random else "pass"
        sentence = f"other rows and neighbours change no logit by more than {change:.2g}"
    return check("batch-dependent", level, change, bound, sentence)


def _probabilities(sample: CheckSample) -> Check:
    """Whether the outputs are probabilities or a multiple: not negative, and with the same sum everywhere."""
    outputs = sample.logits[: sample.n].double()
    sums = outputs.sum(1)
    total = float(sums.median())
    one, constant = (float((sums - sum_).abs().nan_to_num(nan=torch.inf).max()) for sum_ in (1.0, total))
    changing = float((outputs.amax(0) - outputs.amin(0)).max()) > SPREAD * total
    multiple = constant <= SUM * total and changing
    gap = min(one, constant / total) if multiple else one
    if bool((outputs >= 0).all()) and (one <= SUM or multiple):
        sentence = "the outputs are probabilities: give logits, a softmax hides the gradient"
        return check("probabilities", "fail", gap, SUM, sentence)
    return check("probabilities", "pass", min(one, 1e30), SUM, "the outputs are no probabilities")
