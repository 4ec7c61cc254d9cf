"""Losses that attacks maximise, one value a sample: logits (S, C), labels (S,), targets (S,) -> (S,).

Margin-type losses scale with the logits, so sign steps do not change when logits are multiplied by a number;
cross-entropy saturates. DLR and its targeted form are those of Croce & Hein, "Reliable evaluation of
adversarial robustness with an ensemble of diverse parameter-free attacks" (ICML 2020), section 4; their
denominators are differentiated too. DLR needs 3 classes, targeted DLR 4; `effective` names the losses that
run where there are fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from robustbench_vlm.errors import InputError

Name = Literal["ce", "margin", "dlr", "targeted-dlr", "targeted-margin"]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

TINY = 1e-12


def _at(logits: Tensor, classes: Tensor) -> Tensor:
    """(S,) each row's logit of its class."""
    return logits.gather(1, classes[:, None]).squeeze(1)


def cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001 - one signature
    """-log softmax(z)_y."""
    return functional.cross_entropy(logits, labels, reduction="none")


def attack_margin(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001 - one signature
    """max_{k != y} z_k - z_y, positive where the image is misclassified (Carlini & Wagner 2017)."""
    # By index and not by maximum: at a tie the gradient goes to one class.
    best = logits.scatter(1, labels[:, None], -torch.inf).argmax(1)
    return _at(logits, best) - _at(logits, labels)


def dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Difference of logits ratio: -(z_y - z_other) / (z_(1) - z_(3) + 1e-12)."""
    top = logits.topk(3).values
    return attack_margin(logits, labels, targets) / (top[:, 0] - top[:, 2] + TINY)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)."""
    top = logits.topk(4).values
    gap = top[:, 0] - 0.5 * (top[:, 2] + top[:, 3])
    return -(_at(logits, labels) - _at(logits, targets)) / (gap + TINY)


def targeted_margin(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """z_t - z_y, which FAB linearises."""
    return _at(logits, targets) - _at(logits, labels)


LOSSES: dict[Name, Loss] = {
    "ce": cross_entropy,
    "margin": attack_margin,
    "dlr": dlr,
    "targeted-dlr": targeted_dlr,
    "targeted-margin": targeted_margin,
}


NAMES: tuple[Name, ...] = tuple(LOSSES)


def correct_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """(S,) z_y - max_{k != y} z_k, positive where the image is classified correctly."""
    return _at(logits, labels) - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def effective(name: Name, n_classes: int) -> Name:
    """The loss that runs for `n_classes`: a margin where the ratio is not defined."""
    if name == "dlr" and n_classes < 3:
        return "margin"
    if name == "targeted-dlr" and n_classes < 4:
        return "targeted-margin"
    return name


def of_rows(names: Sequence[Name], index: Tensor, logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """(S,) each row's own loss, or the one that runs in its place.

    Args:
        names: losses that rows may have.
        index: (S,) int64 position in `NAMES` of each row's loss; not read if there is one name.
        logits: (S, C).
        labels: (S,) int64.
        targets: (S,) int64, -1 where a row aims at none.
    """

    def value(name: Name) -> Tensor:
        return LOSSES[effective(name, logits.shape[1])](logits, labels, targets.clamp(min=0))

    values = value(names[0])
    for name in names[1:]:
        values = torch.where(index == NAMES.index(name), value(name), values)
    return values


def targeted(name: Name) -> bool:
    """Whether the loss aims at one class."""
    return name.startswith("targeted-")


def require_untargeted(attack: str, name: Name) -> None:
    """Refuse a loss that aims at a class.

    Raises:
        InputError: the attack has no targets.
    """
    if targeted(name):
        raise InputError(f"{attack}.loss", repr(name), "an untargeted loss", "use ce, margin or dlr")


def require_targets(attack: str, name: Name, targets: int) -> None:
    """Refuse a number of target classes that does not go with the loss.

    Raises:
        InputError: targets for an untargeted loss, or none for a targeted one.
    """
    if targeted(name) != (targets > 0):
        wanted = "at least 1 for a targeted loss, 0 for an untargeted one"
        raise InputError(f"{attack}.targets", f"{targets} with loss {name!r}", wanted)


def few_classes(name: Name | None, targets: int, n_classes: int) -> list[str]:
    """The sentences of `Attack.substitutions` for a loss, if there is one, and a number of target classes."""
    found = []
    if name is not None and effective(name, n_classes) != name:
        found.append(f"{name} -> {effective(name, n_classes)} (undefined for {n_classes} classes)")
    if targets > n_classes - 1:
        found.append(f"targets {targets} -> {n_classes - 1} ({n_classes} classes)")
    return found
