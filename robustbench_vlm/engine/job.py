"""Images as they are handed to an engine, and what must hold about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_vlm.engine.interface import Attack
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat


@dataclass(frozen=True)
class Block:
    """Some of the images of a run, so that the others need not be in memory.

    Attributes:
        images: (N, 3, H, W) float32 in [0, 1], on the model's device.
        labels: (N,) int64.
        keys: N names, distinct in the whole run.
        clean: (N, C) logits of the canonical pass.
        begin: the stage in which each image begins.
    """

    images: Tensor
    labels: Tensor
    keys: Sequence[str]
    clean: Tensor
    begin: Sequence[int]


def check(
    images: Tensor,
    labels: Tensor,
    keys: Sequence[str],
    stages: Sequence[tuple[str, Attack]],
    threat: Threat,
    rows: int,
    live: int,
    n_classes: int,
) -> None:
    """Refuse arguments of `run` that disagree.

    Raises:
        InputError: which, and why.
    """
    for name, attack in stages:
        if threat.norm not in attack.norms:
            kind = type(attack).__name__.lower()
            raise InputError(
                f"stage {name}, attack {kind}", f"norm {threat.norm!r}", " or ".join(attack.norms)
            )
    if not 1 <= live <= rows:
        raise InputError("live rows", str(live), f"1 to {rows}, the rows of every model call")
    if not len(images) == len(labels) == len(keys) or len(set(keys)) != len(keys):
        found = f"{len(images)} images, {len(labels)} labels, {len(set(keys))} distinct of {len(keys)} keys"
        raise InputError("attack", found, "as many labels and distinct keys as images")
    if not len(images):
        return
    if images.dtype != torch.float32 or not (images.min() >= 0 and images.max() <= 1):
        low, high = float(images.min()), float(images.max())
        raise InputError("images", f"{images.dtype} in [{low:.4g}, {high:.4g}]", "float32 pixels in [0, 1]")
    if int(labels.min()) < 0 or int(labels.max()) >= n_classes:
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise InputError("labels", found, f"0 to {n_classes - 1}, the classes of the model")


def checked(
    block: Block,
    *,
    stages: Sequence[tuple[str, Attack]],
    threat: Threat,
    rows: int,
    live: int,
    n_classes: int,
) -> Block:
    """The block, once it agrees with the other arguments of `run`.

    Raises:
        InputError: what does not.
    """
    check(block.images, block.labels, block.keys, stages, threat, rows, live, n_classes)
    return block


@dataclass(frozen=True)
class Cost:
    """What a run really took; unlike findings it depends on scheduling.

    Attributes:
        forwards: model calls without gradient, each of the fixed shape or, at the end, of a smaller one.
        gradients: model calls with an image gradient, likewise.
        canonical: calls of the canonical pass, the clean pass included.
        unconfirmed: successes that the canonical pass did not confirm; their rows went on.
    """

    forwards: int
    gradients: int
    canonical: int
    unconfirmed: int
