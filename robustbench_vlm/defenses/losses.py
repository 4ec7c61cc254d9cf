"""Losses per sample. None is reduced here: each defense states its own mean over the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the customary name

from robustbench_vlm.errors import InputError

if TYPE_CHECKING:
    from robustbench_vlm.defenses.interface import Roles
    from robustbench_vlm.types import Encoder

Reduction = Literal["batchmean", "elementmean", "sum"]
"""How (B,) divergences over C classes become one number.

`batchmean`: their mean. `elementmean`: their mean divided by C, a mean over batch *and* classes. `sum`: their
sum. The three differ by factors C and B, and the literature often does not say which it uses.
"""

TINY = 1e-12
LEAST = 1e-6  # of a deviation, a first loss or a doubt, below which a quotient or a power is kept finite
FIRST = 1e-8  # a first loss below it is a rounding error: the student started as a copy of its teacher


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


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(P || Q) = sum_c P_c (log P_c - log Q_c), (B,), from the logits (B, C) of P and of Q."""
    return kl_terms(first, second).sum(dim=-1)


def kl_terms(first: Tensor, second: Tensor) -> Tensor:
    """The summands P_c (log P_c - log Q_c) of the divergence, (B, C), from the logits of P and of Q."""
    log_p, log_q = F.log_softmax(first, dim=-1), F.log_softmax(second, dim=-1)
    return log_p.exp() * (log_p - log_q)


def squared_distance(embeddings: Tensor, anchor: Tensor) -> Tensor:
    """Squared Euclidean distance of embeddings (B, D), not normalised: (B,)."""
    return (embeddings - anchor).square().sum(dim=-1)


def cosine(embeddings: Tensor, anchor: Tensor) -> Tensor:
    """Cosine of two embeddings (B, D): (B,)."""
    return F.cosine_similarity(embeddings, anchor, dim=-1)


def of_label(values: Tensor, labels: Tensor) -> Tensor:
    """The value of each row at its label: (B, C) and (B,) -> (B,)."""
    return values.gather(1, labels[:, None])[:, 0]


def in_one_forward(encoder: Encoder, call: Callable[[Tensor], Tensor], *images: Tensor) -> tuple[Tensor, ...]:
    """`call(batch)` for each of several batches of images, computed by one forward over all of them.

    Where the rows of a forward depend on each other (batch norm in train mode), each batch gets a forward of
    its own, as in the literature.

    Args:
        encoder: what `call` runs.
        call: images (n, 3, H, W) -> tensor with n rows.
        images: the batches.
    """
    if not encoder.rows_apart:
        return tuple(call(batch) for batch in images)
    rows = call(torch.cat(images))
    lengths = {len(batch) for batch in images}
    if len(lengths) == 1:  # an encoder may return more rows a batch: those of other processes, too
        return torch.chunk(rows, len(images))
    return torch.split(rows, [len(batch) for batch in images])


def student_logits(roles: Roles, *images: Tensor) -> tuple[Tensor, ...]:
    """Zero-shot logits (B, C) of the student on each of several batches of images; see `in_one_forward`."""
    return in_one_forward(roles.student, lambda x: roles.logits("student", x), *images)


def balanced(weight: Tensor, now: Tensor, first: Tensor, rate: float, exponent: float) -> Tensor:
    """One step of the loss balance of MTARD: weights move towards each loss's share of the remaining loss.

    Args:
        weight: (T,) the weights of T losses before the step.
        now: (T,) the losses of this batch.
        first: (T,) the losses of the first batch.
        rate: r of w <- w - r (w - share).
        exponent: b of share_t = l_t^b / sum l^b, with l = now / first.

    Returns:
        (T,) the weights after the step, not renormalised; they sum to one if `weight` does.
    """
    left = (now.clamp(min=0) / first.clamp(min=FIRST)).pow(exponent)
    share = torch.where(left.sum() > 0, left / left.sum().clamp(min=TINY), 1 / len(left))
    return weight - rate * (weight - share)


def pooled(values: Tensor, before: Tensor | None, momentum: float) -> Tensor:
    """Running mean and variance of values (B,), with their batch pooled in.

    The variance counts how far the mean of the batch is from the running mean, so that it is that of the
    values and not that within a batch: it does not depend on the batch size, and one value has one too.

    Args:
        values: (B,), B >= 1.
        before: what this function returned for the batch before; None for the first batch.
        momentum: decay m of both. Batch t counts by max(1 - m, 1 / t), so that the first ones weigh equally.

    Returns:
        (3,): mean, variance, number of batches.
    """
    mean, variance = values.mean(), values.var(correction=0)
    if before is None:
        return torch.stack([mean, variance, torch.ones_like(mean)])
    count = before[2] + 1
    rate = (1 / count).clamp(min=1 - momentum)
    apart = mean - before[0]
    spread = (1 - rate) * before[1] + rate * variance + rate * (1 - rate) * apart.square()
    return torch.stack([before[0] + rate * apart, spread, count])


def standardised(values: Tensor, running: Tensor) -> Tensor:
    """Values (B,) minus their running mean, divided by their running deviation; `running` is of `pooled`."""
    mean, variance, _ = running
    scores: Tensor = (values - mean) / variance.sqrt().clamp(min=LEAST)
    return scores


DROPS = (215 / 300, 260 / 300, 285 / 300)
"""Shares of the run, as epochs of the code of MTARD and B-MTARD, at which rates fall to a tenth."""


def rate_at(rate: float, progress: float, drops: tuple[float, ...]) -> float:
    """`rate`, divided by ten at each share of the run in `drops` that is reached."""
    return rate * 0.1 ** sum(progress >= drop for drop in drops)


def grey_image(encoder: Encoder, like: Tensor | None = None) -> Tensor:
    """One grey image (1, 3, size, size), to find out the shape of an encoder's output.

    Args:
        encoder: its `image_size` is taken.
        like: a tensor whose dtype and device the image gets.
    """
    size = encoder.image_size
    made = torch.full((1, 3, size, size), 0.5)
    return made if like is None else made.to(like)


def require_one_space(roles: Roles, role: str) -> None:
    """Refuse a teacher whose embeddings have another width than the student's.

    Raises:
        InputError: the widths differ.
    """
    widths = []
    with torch.no_grad():
        for encoder in (roles.student, roles.teachers[role]):
            weight = next(iter(encoder.parameters())) if isinstance(encoder, torch.nn.Module) else None
            widths.append(encoder(grey_image(encoder, weight)).shape[-1])
    if widths[0] != widths[1]:
        found = f"embeddings of {widths[1]} dimensions, the student's have {widths[0]}"
        raise InputError(f"teacher {role}", found, "a model of the student's embedding space")
