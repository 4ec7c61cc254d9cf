"""Smaller shapes for the end of a run, where few images are left: only those that give the same bits.

The numbers of a row may depend on the shape of the call that it is in, so calls have one fixed shape. But
where a model gives the very same bits in a call of half the rows, idle rows need not be paid for. No library
promises that, so each model is asked, on its own images, in the run that is about to use it.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from robustbench_vlm.attacks import canonical, losses
from robustbench_vlm.attacks.interface import AnyState, Oracle, Seen, take

Leg = TypeVar("Leg")

LEAST = 8  # rows, and their multiples: whole vectors, and on a CPU the cost of a row is that of a full call


def halves(rows: int) -> list[int]:
    """The shapes that may be tried, largest first."""
    found = []
    while rows % (2 * LEAST) == 0:
        rows //= 2
        found.append(rows)
    return found


def equal(oracle: Oracle, images: Tensor, labels: Tensor, rows: int, *, gradients: bool) -> list[int]:
    """Those of `halves(rows)` in which logits and image gradients have the bits of the full shape.

    A shape counts only if all larger ones do. Costs about two calls of the full shape.

    Args:
        oracle: the model as attacks see it.
        images: (n, 3, H, W), of which as many as fill a call are looked at.
        labels: (n,) int64.
        rows: the full shape.
        gradients: whether gradients are asked for as well.
    """
    images, labels = canonical.padded(images[:rows], rows), canonical.padded(labels[:rows], rows)
    whole = _look(oracle, images, labels, gradients=gradients)
    found: list[int] = []
    for shape in halves(rows):
        at = slice(rows - shape, rows) if len(found) % 2 else slice(shape)
        part = _look(oracle, images[at], labels[at], gradients=gradients)
        # equal compares values: NaN differs from itself, and then nothing is taken for equal
        if not all(torch.equal(a[at], b) for a, b in zip(whole, part, strict=True)):
            break
        found.append(shape)
    return found


def _look(oracle: Oracle, images: Tensor, labels: Tensor, *, gradients: bool) -> list[Tensor]:
    """Logits without gradient and, where asked for, logits with it and the gradient."""
    found = [oracle.logits(images)]
    if gradients:
        seen: Seen = oracle.gradient(images, lambda logits: losses.cross_entropy(logits, labels, labels))
        found += [seen.logits, seen.gradient]
    return found


def fit(state: AnyState, slots: dict[int, Leg], shape: int) -> AnyState:
    """A state of `shape` rows, those in `slots` first; `slots` follows them.

    Args:
        state: of any number of rows.
        slots: what each row that is busy works on; at most `shape` of them.
        shape: rows to come; those beside the busy ones hold copies.
    """
    busy = sorted(slots)
    fitted = take(state, [*busy, *[0] * (shape - len(busy))])
    legs = [slots.pop(slot) for slot in busy]
    slots.update(enumerate(legs))
    return fitted
