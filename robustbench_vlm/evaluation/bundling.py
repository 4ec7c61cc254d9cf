"""Pack the adversarial images of a cell: each in the smallest form that still breaks the model.

A corner of the ball is not the image that the attack found, and neither is an image of 8-bit pixels. So each
is tried in the canonical pass before it is stored, and must be misclassified by more than `ROUNDING`: then it
is misclassified on another machine, too, whose logits differ in their last bits.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustbench_vlm.engine import canonical, geometry, losses
from robustbench_vlm.engine.isolation import isolated
from robustbench_vlm.evaluation.cells import Cell, Subject
from robustbench_vlm.models.clip import Classifier
from robustbench_vlm.results import evidence, packing, result_file
from robustbench_vlm.results.packing import Kind, Packed
from robustbench_vlm.results.result_file import Content
from robustbench_vlm.threat import Threat

ROUNDING = 1e-3
"""Difference of two logits up to which machines may disagree about the larger one: they are of size 100."""

ENCODED: Mapping[str, tuple[Kind, ...]] = {"linf": ("corners", "steps"), "l2": ("steps",), "l1": ("steps",)}
"""What is tried before `exact`, by norm; only a Linf ball has corners where an attack ends."""


_ALONE = threading.Lock()
"""Cells are measured in threads, and what is isolated is of the whole process."""


@dataclass(frozen=True)
class CanonicalPass:
    """The canonical pass of one model over images of one dataset.

    Attributes:
        subject: model and dataset.
        classifier: the model on its device.
        rows: of every call.
        device: of the calls.
    """

    subject: Subject
    classifier: Classifier
    rows: int
    device: torch.device

    @classmethod
    def of(cls, cell: Cell) -> CanonicalPass:
        """The pass in which the verdicts of a cell are decided."""
        device = cell.settings.device
        return cls(cell.subject, cell.subject.classifier(device), cell.chain.rows, device)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Predictions of (n, 3, H, W) images: (n,) int64, and (n,) float32 margins of the (n,) labels.

        A margin is the true logit minus the largest other one, and NaN where a logit is not finite.
        """
        logits = canonical.logits(self.classifier, images.to(self.device), self.rows)
        labels, tied = labels.to(self.device), self.subject.tied
        found = logits.argmax(1) if tied is None else tied.predictions(logits)
        margins = (losses if tied is None else tied).correct_margin(logits, labels)
        margins = torch.where(logits.isfinite().all(1), margins, torch.nan)
        return found.cpu().numpy(), margins.cpu().numpy()


def pack(cell: Cell, images: Mapping[str, Tensor]) -> dict[str, Packed]:
    """Pack adversarial images of a cell that were found at its own radius.

    Args:
        cell: model, images and ball.
        images: by key, (3, H, W) float32 on the CPU.
    """
    with _ALONE, isolated(tf32=cell.settings.backend.precision.tf32):
        return _packed(cell, images)


def _packed(cell: Cell, images: Mapping[str, Tensor]) -> dict[str, Packed]:
    subject, decide = cell.subject, CanonicalPass.of(cell)
    position = {key: i for i, key in enumerate(subject.split.keys)}
    wanted = sorted(position[key] for key in images)
    found: dict[str, Packed] = {}
    for part in subject.images.parts(wanted, cell.chain.rows):
        clean, left = subject.images.floats(part), list(range(len(part)))
        keys = [subject.split.keys[i] for i in part]
        for kind in ENCODED[cell.settings.norm]:
            tried = [packing.pack(kind, images[keys[i]].numpy(), clean[i].numpy()) for i in left]
            good = _still_broken(decide, cell.threat, part, clean, left, tried)
            found |= {keys[i]: packed for i, packed, ok in zip(left, tried, good, strict=True) if ok}
            left = [i for i, ok in zip(left, good, strict=True) if not ok]
        for i in left:
            found[keys[i]] = packing.pack("exact", images[keys[i]].numpy(), clean[i].numpy())
    return found


def _still_broken(
    decide: CanonicalPass,
    threat: Threat,
    part: Sequence[int],
    clean: Tensor,
    chosen: Sequence[int],
    tried: Sequence[Packed],
) -> list[bool]:
    """Whether packed images lie in the ball and are misclassified by more than rounding.

    Args:
        decide: the canonical pass.
        threat: the ball.
        part: positions in the dataset of the images in `clean`.
        clean: (N, 3, H, W).
        chosen: positions in `part` of the packed images.
        tried: the packed images.
    """
    if not chosen:
        return []
    unpacked = [
        packing.unpack(packed, clean[i].numpy(), threat) for i, packed in zip(chosen, tried, strict=True)
    ]
    adv = torch.from_numpy(np.stack(unpacked))
    _, margins = decide(adv, decide.subject.labels[[part[i] for i in chosen]])
    inside = geometry.excess(adv, clean[list(chosen)], threat).numpy() <= threat.slack
    return [bool(ok) for ok in inside & (margins < -ROUNDING)]


def bundle(
    cell: Cell, smaller: Cell | None, content: Content, verdicts: bytes, images: Mapping[str, Tensor]
) -> evidence.Bundle:
    """The bundle of a measured cell.

    Args:
        cell: which was measured.
        smaller: the cell of the next smaller radius, whose evidence counts at this radius, too.
        content: of the result.
        verdicts: its Parquet file.
        images: by key, the adversarial images that were found at this radius.
    """
    assert cell.settings.suite is not None
    inherited = {} if smaller is None else evidence.read(evidence.path_of(smaller.path)).images
    return evidence.Bundle(
        result_file.blocks(content),
        verdicts,
        {**inherited, **pack(cell, images)},
        cell.settings.suite.model_dump(mode="json"),
        cell.chain.record,
    )
