"""The canonical pass over images: which of them may be attacked, and which adversarial images count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from robustbench_vlm.engine import canonical, geometry, losses
from robustbench_vlm.engine.job import Job, Model, OnFinding, PreparedBlock
from robustbench_vlm.errors import AttackError
from robustbench_vlm.types import Finding


@dataclass(frozen=True)
class Verification:
    """What the canonical pass computes for one adversarial image.

    Attributes:
        prediction: its class.
        margin: true logit minus the largest other.
        finite: whether all its logits are finite.
        excess: by how much it is outside ball or box, in the unit of the radius; at most 0 inside.
    """

    prediction: int
    margin: float
    finite: bool
    excess: float

    def require_inside(self, job: Job, subject: str) -> None:
        """Refuse an image outside ball or box by more than rounding.

        Args:
            job: ball, and what it allows for rounding.
            subject: the beginning of the message: the stage and what it did to which image.

        Raises:
            AttackError: it is outside.
        """
        if self.excess > geometry.slack(job.threat):
            raise AttackError(f"{subject} {self.excess:.3g} outside {job.threat} or [0, 1]")


def verify(model: Model, job: Job, adv: Tensor, images: Tensor, labels: Tensor) -> list[Verification]:
    """Run the canonical pass on adversarial images.

    Args:
        model: its canonical function is called.
        job: ball and shape.
        adv: (n, 3, H, W) adversarial images.
        images: (n, 3, H, W) the clean images.
        labels: (n,) int64.
    """
    logits = canonical.logits(model.canonical, adv, job.rows)
    columns = (
        logits.argmax(1).tolist(),
        losses.correct_margin(logits, labels).tolist(),
        logits.isfinite().all(1).tolist(),
        geometry.excess(adv, images, job.threat).tolist(),
    )
    return [Verification(*facts) for facts in zip(*columns, strict=True)]


def report_misclassified(block: PreparedBlock, stages: Sequence[str], on_finding: OnFinding) -> list[int]:
    """Report images that are misclassified when clean; they are not attacked.

    Args:
        block: images with their clean logits.
        stages: name of the stage in which each image is reported.
        on_finding: is given a finding that is broken for each misclassified image, and one with an error for
            each image with a clean logit that is not finite.

    Returns:
        Positions of the other images, which are to be attacked.
    """
    clean, labels = block.clean, block.labels
    margins, finite = losses.correct_margin(clean, labels).tolist(), clean.isfinite().all(1).tolist()
    predictions = clean.argmax(1).tolist()
    right = []
    for i, label in enumerate(labels.tolist()):
        if finite[i] and predictions[i] == label:
            right.append(i)
            continue
        stage, adv = stages[i], block.images[i].detach().cpu().clone()
        error = "" if finite[i] else f"{stage}: a logit of the clean image is not finite"
        on_finding(
            Finding(
                block.keys[i], not error, adv, -1, 0, -1, 0, 0,
                predictions[i], margins[i], error=error, stage=stage,
            )
        )  # fmt: skip
    return right


def wrong_classes(clean: Tensor, labels: Tensor) -> list[list[int]]:
    """The wrong classes of each image, most likely first: the order in which targets are tried."""
    ranking = clean.argsort(dim=1, descending=True, stable=True).tolist()
    return [[k for k in ranked if k != label] for ranked, label in zip(ranking, labels.tolist(), strict=True)]
