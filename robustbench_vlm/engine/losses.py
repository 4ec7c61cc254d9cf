"""What attacks maximise, per sample and never reduced: logits (S, C), labels (S,), targets (S,) -> (S,).

Margin-type losses are equivariant to the scale of the logits, so sign steps do not change with it;
cross-entropy saturates. DLR and its targeted form are those of Croce & Hein, "Reliable evaluation of
adversarial robustness with an ensemble of diverse parameter-free attacks" (ICML 2020), section 4; their
denominators are differentiated too. DLR needs 3 classes, targeted DLR 4; `effective` names their stand-ins.
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
    return logits.gather(1, classes[:, None]).squeeze(1)


def cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001 - one signature
    """-log softmax(z)_y."""
    return functional.cross_entropy(logits, labels, reduction="none")


def other(logits: Tensor, labels: Tensor) -> Tensor:
    """(S,) the largest logit beside the label's."""
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def attack_margin(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001 - one signature
    """max_{k != y} z_k - z_y (Carlini & Wagner 2017, without a floor)."""
    # by index and not by maximum: at a tie the gradient goes to one class
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
    """z_t - z_y, what FAB linearises."""
    return _at(logits, targets) - _at(logits, labels)


LOSSES: dict[Name, Loss] = {
    "ce": cross_entropy,
    "margin": attack_margin,
    "dlr": dlr,
    "targeted-dlr": targeted_dlr,
    "targeted-margin": targeted_margin,
}


NAMES: tuple[Name, ...] = tuple(LOSSES)


def effective(name: Name, n_classes: int) -> Name:
    """The loss that runs for `n_classes`: margins stand in where a ratio is not defined."""
    if name == "dlr" and n_classes < 3:
        return "margin"
    if name == "targeted-dlr" and n_classes < 4:
        return "targeted-margin"
    return name


def of_rows(names: Sequence[Name], index: Tensor, logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """(S,) each row's own loss, or its stand-in.

    Args:
        names: losses that rows may have.
        index: (S,) int64 position in `NAMES` of each row's loss; not looked at where there is one name.
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


def few_classes(name: Name, targets: int, n_classes: int) -> list[str]:
    """The sentences of `Attack.substitutions` for a loss and a number of target classes."""
    found = []
    if effective(name, n_classes) != name:
        found.append(f"{name} -> {effective(name, n_classes)} (undefined for {n_classes} classes)")
    if targets > n_classes - 1:
        found.append(f"targets {targets} -> {n_classes - 1} ({n_classes} classes)")
    return found


def correct_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """(S,) margin of correctness: true logit minus the largest other."""
    return _at(logits, labels) - other(logits, labels)
