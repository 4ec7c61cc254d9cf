"""Is the model what attacks take it for? Examinations on a handful of its own images, before any attack.

Attacks assume a deterministic function that treats every row alone, gives logits, and has the gradient that
it claims. Where that does not hold a robust accuracy means something else than it says, so a failed
examination becomes a flag of the result. All calls have the one fixed shape of the canonical pass; all random
numbers are keyed by image. What is measured depends on the model, its images and the seed alone, and not on
the order in which the images come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustbench_vlm import rng
from robustbench_vlm.engine import gradient_check
from robustbench_vlm.engine.check import Check, Examined, Level, check
from robustbench_vlm.engine.check_sample import CheckSample
from robustbench_vlm.engine.interface import spread
from robustbench_vlm.types import Classify

__all__ = ["Check", "Examined", "chosen", "examine"]

REPEATS = 5
"""Number of times that one call is made."""
SUM = 1e-5
"""Relative difference between the sums of rows up to which rows are probabilities, or multiples of them."""
SPREAD = 0.01
"""Share of the sum by which an output of such a row has to change from image to image."""

MODAL = (
    nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._NormBase,
    nn.RReLU,
)
"""Layers that compute something else in training mode."""


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
    """Every examination of one model on its own images, in some 10 calls (more where `rows` is below 64).

    Args:
        classify: (B, 3, H, W) in [0, 1] -> logits (B, C); as attacks are given it.
        images: (N, 3, H, W) float32 in [0, 1], on the model's device; at most `rows` of them are looked at,
            those whose hashes of seed and key are smallest.
        labels: (N,) int64.
        keys: N distinct names.
        rows: the fixed shape.
        seed: of choice and directions.
        white_box: whether the chain takes gradients; they are not examined otherwise.
        only_ce: whether it knows no other loss than cross-entropy, so that saturation decides.

    Raises:
        AttackError: the model returns anything but logits (rows, C).
    """
    looked_at = chosen(keys, rows, seed)
    index = torch.tensor(looked_at, device=images.device)
    state = _state(classify)
    sample = CheckSample.of(classify, images[index], labels[index], [keys[i] for i in looked_at], rows)
    again = _random_output(sample)
    company = _batch_dependent(sample, again.value or 0.0)
    found = [again, company, _probabilities(sample)]
    if white_box:
        noise = max(again.value or 0.0, company.value or 0.0)
        found += gradient_check.checks(sample, seed, noise, only_ce=only_ce)
    found += [_training_mode(classify), _state_changed(state, _state(classify))]
    calls = sample.probe.oracle.calls
    return Examined(tuple(found), calls.forwards, calls.gradients)


def chosen(keys: Sequence[str], rows: int, seed: int) -> list[int]:
    """Positions of the images that `examine` looks at."""
    return sorted(range(len(keys)), key=lambda i: rng.rank(seed, keys[i]))[:rows]


# --- one function: deterministic, row by row, logits --------------------------------------------------------


def _random_output(sample: CheckSample) -> Check:
    change = max(sample.change(sample.probe.logits(sample.images)) for _ in range(REPEATS - 1))
    near, bound = sample.near(change), sample.rounding
    close = f"{near} of {sample.n} margins are near that"
    if change > bound:
        level: Level = "fail"
        said = f"{REPEATS} equal calls differ by up to {change:.2g} in a logit; {close}"
    else:
        level = "warn" if near else "pass"
        said = f"{REPEATS} equal calls agree to {change:.2g} in every logit"
    return check("random-output", level, change, bound, said)


def _batch_dependent(sample: CheckSample, random: float) -> Check:
    """The same images in other rows, and between other images: every second row is turned into its negative.

    Of a random model only what clearly exceeds its randomness counts.
    """
    rows, device = len(sample.images), sample.images.device
    turn = rows // 2 + 1
    moved = sample.probe.logits(sample.images.roll(turn, 0)).roll(-turn, 0)
    odd = torch.arange(rows, device=device) % 2 == 1
    strangers = torch.where(spread(odd, sample.images), 1 - sample.images, sample.images)
    beside = sample.probe.logits(strangers)
    change = max(sample.change(moved), sample.change(beside, torch.arange(0, sample.n, 2, device=device)))
    near, bound = sample.near(change), max(sample.rounding, 4 * random)
    close = f"{near} of {sample.n} margins are near that"
    if change > bound:
        level: Level = "fail"
        said = f"other rows or neighbours change a logit by up to {change:.2g}; {close}"
    else:
        level = "warn" if near and change > random else "pass"
        said = f"other rows and neighbours change no logit by more than {change:.2g}"
    return check("batch-dependent", level, change, bound, said)


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


# --- the module itself --------------------------------------------------------------------------------------


def _training_mode(classify: Classify) -> Check:
    modules = list(classify.modules()) if isinstance(classify, nn.Module) else []
    active = [module for module in modules if module.training]
    modal = [module for module in active if isinstance(module, MODAL)]
    level: Level = "pass"
    said = "everything is in eval mode" if modules else "not a torch module: cannot be seen"
    if modal:
        kinds = ", ".join(sorted({type(module).__name__ for module in modal}))
        level, said = "fail", f"{len(modal)} layers are in training mode ({kinds}): call model.eval()"
    elif active:
        level = "warn"
        said = f"{len(active)} modules are in training mode, none of which is known to act otherwise"
    return check("training-mode", level, float(len(modal) or len(active)), 0.0, said)


def _state(classify: Classify) -> dict[str, int]:
    """A checksum of the bits of each parameter and buffer; nothing is copied off the device."""
    return {k: _bits(v) for k, v in classify.state_dict().items()} if isinstance(classify, nn.Module) else {}


def _bits(tensor: Any) -> int:  # noqa: ANN401 - a state may hold other things
    if not isinstance(tensor, Tensor) or not tensor.numel():
        return 0
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    return int(flat.view(kinds[flat.element_size()]).sum(dtype=torch.int64))


def _state_changed(before: dict[str, int], after: dict[str, int]) -> Check:
    names = [name for name in after if before.get(name) != after[name]]
    level: Level = "fail" if names else "pass"
    said = f"a call changes {', '.join(names[:3])}" if names else "calls change no parameter or buffer"
    return check("state-changed", level, float(len(names)), 0.0, said)
