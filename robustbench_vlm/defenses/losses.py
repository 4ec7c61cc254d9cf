"""Losses per sample, never reduced: each defense writes its own mean, where a reader looks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the customary name

from robustbench_vlm.errors import InputError

if TYPE_CHECKING:
    from robustbench_vlm.types import Encoder, Roles

Reduction = Literal["batchmean", "elementmean", "sum"]
"""How (B,) divergences over C classes become one number: their mean; that divided by C, the mean over batch
*and* classes; their sum. The three differ by factors C and B and are what this literature mixes up most."""

TINY = 1e-12
FIRST = 1e-8  # a first loss below it is rounding: the student started as its teacher


def reduced(values: Tensor, classes: int, reduction: Reduction) -> Tensor:
    """Per-sample divergences (B,) over `classes` as one number."""
    if reduction == "sum":
        return values.sum()
    return values.mean() / (classes if reduction == "elementmean" else 1)


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy -log softmax(z)_y of logits (B, C) and labels (B,): (B,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def soft_ce(probabilities: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy -sum_c p_c log softmax(z)_c of probabilities and logits (B, C): (B,)."""
    return -(probabilities * F.log_softmax(logits, dim=-1)).sum(dim=-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(z) in nats, of logits (B, C): (B,)."""
    return soft_ce(logits.softmax(dim=-1), logits)


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(P_T || P_S) = sum_c P_T (log P_T - log P_S) of two logit tensors (B, C): (B,)."""
    return kl_terms(teacher, student).sum(dim=-1)


def kl_terms(teacher: Tensor, student: Tensor) -> Tensor:
    """The summands P_T (log P_T - log P_S) of the divergence, per class: (B, C)."""
    log_teacher, log_student = F.log_softmax(teacher, dim=-1), F.log_softmax(student, dim=-1)
    return log_teacher.exp() * (log_teacher - log_student)


def l2(embeddings: Tensor, anchor: Tensor) -> Tensor:
    """Squared Euclidean distance of un-normalised embeddings (B, D): (B,)."""
    return (embeddings - anchor).square().sum(dim=-1)


def cosine(embeddings: Tensor, anchor: Tensor) -> Tensor:
    """Cosine of two embeddings (B, D): (B,)."""
    return F.cosine_similarity(embeddings, anchor, dim=-1)


def of_label(values: Tensor, labels: Tensor) -> Tensor:
    """The entry of each row's own label: (B, C) and (B,) -> (B,)."""
    return values.gather(1, labels[:, None])[:, 0]


def at_once(encoder: Encoder, call: Callable[[Tensor], Tensor], *images: Tensor) -> tuple[Tensor, ...]:
    """What `call` gives for each of several batches of images: from one forward of `encoder` over them all.

    Where rows of a forward see each other (batch norm in train mode), from one forward each, as the
    literature does.
    """
    if not encoder.rows_apart:
        return tuple(call(batch) for batch in images)
    return torch.split(call(torch.cat(images)), [len(batch) for batch in images])


def balanced(weight: Tensor, now: Tensor, first: Tensor, rate: float, exponent: float) -> Tensor:
    """One step of MTARD's loss balance: every loss's weight moves towards its share of what is left to learn.

    Args:
        weight: (T,) the weights before.
        now: (T,) the losses of this batch.
        first: (T,) those of the first batch.
        rate: r of w <- w - r (w - share).
        exponent: b of share_t = l_t^b / sum l^b, with l = now / first.

    Returns:
        (T,), not renormalised; sums to one when `weight` does.
    """
    left = (now.clamp(min=0) / first.clamp(min=FIRST)).pow(exponent)
    share = torch.where(left.sum() > 0, left / left.sum().clamp(min=TINY), 1 / len(left))
    return weight - rate * (weight - share)


def rate_at(rate: float, progress: float, drops: tuple[float, ...]) -> float:
    """`rate`, a tenth of it after every share of the run in `drops`."""
    return rate * 0.1 ** sum(progress >= drop for drop in drops)


def grey(encoder: Encoder, like: Tensor | None = None) -> Tensor:
    """One grey image (1, 3, size, size), to ask `encoder` for the shape of what it gives."""
    size = encoder.image_size
    made = torch.full((1, 3, size, size), 0.5)
    return made if like is None else made.to(like)


def require_one_space(roles: Roles, role: str) -> None:
    """Refuse a teacher whose embeddings cannot be compared with the student's.

    Raises:
        InputError: embeddings of another width.
    """
    widths = []
    with torch.no_grad():
        for encoder in (roles.student, roles.teachers[role]):
            weight = next(iter(encoder.parameters())) if isinstance(encoder, torch.nn.Module) else None
            widths.append(encoder(grey(encoder, weight)).shape[-1])
    if widths[0] != widths[1]:
        found = f"embeddings of {widths[1]} dimensions, the student's have {widths[0]}"
        raise InputError(f"teacher {role}", found, "a model of the student's embedding space")
