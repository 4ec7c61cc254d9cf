"""Is the model what attacks take it for? Examinations on a handful of its own images, before any attack.

Attacks assume a deterministic function that treats every row alone, gives logits, and has the gradient that
it claims. Where that does not hold a robust accuracy means something else than it says, so a failed
examination becomes a flag of the result. All calls have the one fixed shape of the canonical pass; all random
numbers are keyed by image. What is measured depends on the model, its images and the seed alone, and not on
the order in which the images come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustbench_vlm import rng
from robustbench_vlm.engine import canonical, gradient_check, losses
from robustbench_vlm.engine.interface import Evaluation, Oracle, spread
from robustbench_vlm.errors import AttackError
from robustbench_vlm.types import Classify

Level = Literal["pass", "warn", "fail"]

SHARE = 0.01  # of the images, above which a missing gradient or a saturated softmax is no accident
REPEATS = 5  # times that one call is made
ULPS = 64  # what another row or another kernel may change, in units of the last place of the largest logit
NEAR = 10  # a clean margin below so many times a change could change sides
SUMS_TO_ONE = 1e-5  # by how much rows of probabilities may miss 1

DERIVATIVES = 8  # images whose derivatives are compared with differences
AGREEMENT = 0.05  # how far half of them may be off, relative to the size of the gradient

MODAL = (
    nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._NormBase,
    nn.RReLU,
)
"""Layers that compute something else in training mode."""


@dataclass(frozen=True)
class Check:
    """What one examination found.

    Attributes:
        name: the same for ever; a failed one stands among the flags of a result.
        level: `fail` says that the number does not mean what it says, `warn` that care is needed.
        value: the number behind it; None where it could not be measured.
        bound: what it is held against.
        sentence: what that means.
    """

    name: str
    level: Level
    value: float | None
    bound: float
    sentence: str


@dataclass(frozen=True)
class Examined:
    """All examinations of a model on one data set, and the model calls that they took."""

    checks: tuple[Check, ...]
    forwards: int
    gradients: int

    @property
    def failed(self) -> list[str]:
        """Names of the failed ones."""
        return [check.name for check in self.checks if check.level == "fail"]

    @property
    def record(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class _Sample:
    """Images in one batch of the fixed shape; the first `n` rows are examined, the others copies.

    Attributes:
        oracle: the model, its calls counted.
        keys: of the n images.
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
        """What rounding may change in a logit from one call to another."""
        return gradient_check.ulps(self.logits[: self.n], ULPS)

    @property
    def right(self) -> Tensor:
        """(n,) bool: finite and classified correctly, so that it can be attacked."""
        logits, labels = self.logits[: self.n], self.labels[: self.n]
        return logits.isfinite().all(1) & (logits.argmax(1) == labels)

    def say(self, images: Tensor) -> Tensor:
        """Canonical logits of images, in as few calls as the shape allows."""

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
    sample = _begin(classify, images[index], labels[index], tuple(keys[i] for i in looked_at), rows)
    again = _random_output(sample)
    company = _batch_dependent(sample, again.value or 0.0)
    found = [again, company, _probabilities(sample)]
    if white_box:
        noise = max(again.value or 0.0, company.value or 0.0)
        found += _gradients(sample, seed, noise, only_ce=only_ce)
    found += [_training_mode(classify), _state_changed(state, _state(classify))]
    calls = sample.oracle.calls
    return Examined(tuple(found), calls.forwards, calls.gradients)


def chosen(keys: Sequence[str], rows: int, seed: int) -> list[int]:
    """Positions of the images that `examine` looks at."""
    return sorted(range(len(keys)), key=lambda i: rng.rank(seed, keys[i]))[:rows]


def _begin(classify: Classify, images: Tensor, labels: Tensor, keys: tuple[str, ...], rows: int) -> _Sample:
    oracle, batch = Oracle(classify), canonical.padded(images, rows)
    oracle.calls.forwards += 1
    return _Sample(
        oracle, batch, canonical.padded(labels, rows), keys, canonical.logits(classify, batch, rows)
    )


def _check(name: str, level: Level, value: float | None, bound: float, sentence: str) -> Check:
    """Three digits tell enough, and are the same on every machine where the last bits are not."""
    return Check(
        name, level, None if value is None else float(f"{value:.3g}"), float(f"{bound:.3g}"), sentence
    )


def _change(sample: _Sample, other: Tensor, rows: Tensor) -> float:
    """Largest change of a logit in `rows` of `other` (rows, C), where both are finite."""
    moved = (other - sample.logits)[rows].abs()
    return float(moved.nan_to_num(nan=0.0, posinf=0.0).max()) if len(rows) else 0.0


def _near(sample: _Sample, change: float) -> int:
    """Images whose clean margin is so small that `change` could change sides."""
    margins = losses.correct_margin(sample.logits[: sample.n], sample.labels[: sample.n])
    return int((margins.abs() < NEAR * change).sum())


# --- one function: deterministic, row by row, logits --------------------------------------------------------


def _random_output(sample: _Sample) -> Check:
    every = torch.arange(sample.n, device=sample.images.device)
    change = max(_change(sample, sample.say(sample.images), every) for _ in range(REPEATS - 1))
    near, bound = _near(sample, change), sample.rounding
    close = f"{near} of {sample.n} margins are near that"
    if change > bound:
        level: Level = "fail"
        said = f"{REPEATS} equal calls differ by up to {change:.2g} in a logit; {close}"
    else:
        level = "warn" if near else "pass"
        said = f"{REPEATS} equal calls agree to {change:.2g} in every logit"
    return _check("random-output", level, change, bound, said)


def _batch_dependent(sample: _Sample, random: float) -> Check:
    """The same images in other rows, and between other images: every second row is turned into its negative.

    Of a random model only what clearly exceeds its randomness counts.
    """
    rows, device = len(sample.images), sample.images.device
    every = torch.arange(sample.n, device=device)
    turn = rows // 2 + 1
    moved = sample.say(sample.images.roll(turn, 0)).roll(-turn, 0)
    odd = torch.arange(rows, device=device) % 2 == 1
    strangers = torch.where(spread(odd, sample.images), 1 - sample.images, sample.images)
    beside = sample.say(strangers)
    change = max(_change(sample, moved, every), _change(sample, beside, every[::2]))
    near, bound = _near(sample, change), max(sample.rounding, 4 * random)
    close = f"{near} of {sample.n} margins are near that"
    if change > bound:
        level: Level = "fail"
        said = f"other rows or neighbours change a logit by up to {change:.2g}; {close}"
    else:
        level = "warn" if near and change > random else "pass"
        said = f"other rows and neighbours change no logit by more than {change:.2g}"
    return _check("batch-dependent", level, change, bound, said)


def _probabilities(sample: _Sample) -> Check:
    said = sample.logits[: sample.n]
    inside = bool(((said >= 0) & (said <= 1)).all())
    gap = float((said.sum(1) - 1).abs().nan_to_num(nan=torch.inf).max())
    if inside and gap <= SUMS_TO_ONE:
        sentence = "the outputs are probabilities: give logits, a softmax hides the gradient"
        return _check("probabilities", "fail", gap, SUMS_TO_ONE, sentence)
    return _check("probabilities", "pass", min(gap, 1e30), SUMS_TO_ONE, "the outputs are no probabilities")


# --- gradients ----------------------------------------------------------------------------------------------


def _gradients(sample: _Sample, seed: int, noise: float, *, only_ce: bool) -> list[Check]:
    """The examinations that need image gradients of margin and cross-entropy; one if there are none."""
    try:
        margin, ce = sample.oracle.gradients(
            sample.images,
            lambda z: torch.stack(
                [f(z, sample.labels, sample.labels) for f in (losses.attack_margin, losses.cross_entropy)], 1
            ),
        )
    except AttackError as error:
        return [_check("no-gradient", "fail", 1.0, SHARE, str(error))]
    n = sample.n
    finite = (margin.finite & ce.finite)[:n]
    ill = float((~finite).float().mean())
    flat = float((margin.zero[:n] & finite).float().mean())
    return [
        _check("no-gradient", "pass", 0.0, SHARE, "the logits depend on the image"),
        _check(
            "non-finite",
            "fail" if ill > 0 else "pass",
            ill,
            0.0,
            f"a logit or gradient is NaN or infinite on {ill:.0%} of {n} images",
        ),
        _check(
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
    """Where p_y rounds to 1 cross-entropy no longer pushes the true logit down, and soon nothing at all.

    `lost` (rows,) says where its gradient is exactly zero and the margin's is not. A chain with a margin-type
    loss does without, so there it is a warning only.
    """
    right = sample.right
    sure = sample.logits[: sample.n].softmax(1).gather(1, sample.labels[: sample.n, None])[:, 0] == 1
    share = float((sure | lost[: sample.n])[right].float().mean()) if bool(right.any()) else 0.0
    level: Level = "pass" if share <= SHARE else "fail" if only_ce else "warn"
    instead = "" if level == "pass" else ": rely on margin or DLR losses"
    said = f"cross-entropy is saturated in float32 on {share:.0%} of the images that can be attacked{instead}"
    return _check("saturated", level, share, SHARE, said)


def _gradient_mismatch(sample: _Sample, margin: Evaluation, seed: int, noise: float) -> Check:
    """Of the images that have a gradient: is it that of the margin?"""
    usable = (margin.finite & ~margin.zero)[: sample.n].nonzero().squeeze(1)[:DERIVATIVES]
    errors = gradient_check.errors(
        sample.oracle,
        sample.say,
        sample.images[usable],
        sample.labels[usable],
        [sample.keys[i] for i in usable.tolist()],
        rows=len(sample.images),
        seed=seed,
        noise=noise,
    )
    if not errors:
        said = "no derivative could be compared"
        return _check("gradient-mismatch", "warn", None, AGREEMENT, said)
    error = sorted(errors)[len(errors) // 2]
    if error > AGREEMENT:
        why = "quantised, rounded or detached input?"
        said = f"derivatives miss the differences of the margin by {error:.0%}: {why}"
        return _check("gradient-mismatch", "fail", error, AGREEMENT, said)
    said = f"derivatives agree with differences of the margin on {len(errors)} images"
    return _check("gradient-mismatch", "pass", error, AGREEMENT, said)


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
    return _check("training-mode", level, float(len(modal) or len(active)), 0.0, said)


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
    return _check("state-changed", level, float(len(names)), 0.0, said)
