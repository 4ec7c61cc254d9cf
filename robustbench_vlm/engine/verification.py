"""What the canonical pass says about images: which may be attacked at all, and what attacks made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from robustbench_vlm.engine import canonical, geometry, losses
from robustbench_vlm.threat import Threat
from robustbench_vlm.types import Classify, Finding


@dataclass(frozen=True)
class Opinion:
    """On one image that is said to be adversarial.

    Attributes:
        prediction: its class.
        margin: true logit minus the largest other.
        finite: whether all its logits are.
        excess: by how much it is outside ball or box; at most 0 inside.
    """

    prediction: int
    margin: float
    finite: bool
    excess: float


def opinions(
    classify: Classify, adv: Tensor, images: Tensor, labels: Tensor, threat: Threat, rows: int
) -> list[Opinion]:
    """Of the canonical pass on `adv` (n, 3, H, W), made of `images` (n, 3, H, W) with `labels` (n,)."""
    found = canonical.logits(classify, adv, rows)
    columns = (
        found.argmax(1).tolist(),
        losses.judge(found, labels).tolist(),
        found.isfinite().all(1).tolist(),
        geometry.excess(adv, images, threat).tolist(),
    )
    return [Opinion(*facts) for facts in zip(*columns, strict=True)]


def attackable(
    clean: Tensor,
    images: Tensor,
    labels: Tensor,
    keys: Sequence[str],
    stages: Sequence[str],
    on_finding: Callable[[Finding], None],
) -> list[int]:
    """Positions of the images that are right when clean; the others are reported at once, without attack.

    Args:
        clean: (N, C) canonical logits of the images.
        images: (N, 3, H, W).
        labels: (N,) int64.
        keys: name of each image.
        stages: name of the stage in which each image is reported.
        on_finding: a misclassified image counts as broken; one with a non-finite logit has an error.
    """
    margins, finite = losses.judge(clean, labels).tolist(), clean.isfinite().all(1).tolist()
    predictions = clean.argmax(1).tolist()
    right = []
    for index, label in enumerate(labels.tolist()):
        if finite[index] and predictions[index] == label:
            right.append(index)
            continue
        stage = stages[index]
        error = "" if finite[index] else f"{stage}: a logit of the clean image is not finite"
        adv, key, said = images[index].detach().cpu().clone(), keys[index], predictions[index]
        on_finding(
            Finding(key, not error, adv, -1, 0, -1, 0, 0, said, margins[index], error=error, stage=stage)
        )
    return right


def wrong_classes(clean: Tensor, labels: Tensor) -> list[list[int]]:
    """The other classes of each image, most likely first: the order in which targets are tried."""
    ranking = clean.argsort(dim=1, descending=True, stable=True).tolist()
    return [[k for k in ranked if k != label] for ranked, label in zip(ranking, labels.tolist(), strict=True)]
