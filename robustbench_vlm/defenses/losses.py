"""Losses per sample, never reduced: each defense writes its own mean, where a reader looks for it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the customary name


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy -log softmax(z)_y of logits (B, C) and labels (B,): (B,)."""
    return F.cross_entropy(logits, labels, reduction="none")


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


def of_label(values: Tensor, labels: Tensor) -> Tensor:
    """The entry of each row's own label: (B, C) and (B,) -> (B,)."""
    return values.gather(1, labels[:, None])[:, 0]
