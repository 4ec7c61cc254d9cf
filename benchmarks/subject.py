"""What is attacked: a model, images that it classifies correctly, and radii that leave so many robust."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.attacks.apgd_l1 import ApgdL1
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data.loader import as_float
from robustbench_vlm.data.tiny import worlds
from robustbench_vlm.engine import canonical, scheduler
from robustbench_vlm.engine.interface import Attack
from robustbench_vlm.engine.job import ImageBlock, Job, Model
from robustbench_vlm.engine.losses import Name
from robustbench_vlm.models import openclip, zoo
from robustbench_vlm.models.clip import Classifier
from robustbench_vlm.models.text_bank import render, text_bank
from robustbench_vlm.threat import Norm, Threat

DATASET, SPLIT, SIDE = "tiny-seen", "test", 32
ROWS = 64
SEARCHED = {"linf": (2.0**-10, 64.0), "l1": (2.0**6, 2.0**16)}  # radii between which to search, in 255ths
FINE = 1.06  # the search ends when its bounds are this close
SOUNDING = 12  # steps of the attack that the search goes by


@dataclass(frozen=True)
class Subject:
    """A frozen model and correctly classified images.

    Attributes:
        model: pixels -> logits, fp32.
        images: (N, 3, px, px) float32 in [0, 1].
        labels: (N,) int64.
        index: position of each image in the split; names its noise.
        rows: images in every full model call.
    """

    model: Classifier
    images: Tensor
    labels: Tensor
    index: tuple[int, ...]
    rows: int = ROWS

    @property
    def lower(self) -> Classifier:
        """The model with its image tower in bf16."""
        return Classifier(self.model.model, self.model.bank, bf16=True)

    @property
    def n_classes(self) -> int:
        """Classes that the model tells apart."""
        return int(self.model.bank.shape[0])

    @property
    def keys(self) -> list[str]:
        """Names of the images."""
        return [f"{DATASET}/{SPLIT}/{i}" for i in self.index]

    def first(self, n: int) -> Subject:
        """The first n images."""
        return replace(self, images=self.images[:n], labels=self.labels[:n], index=self.index[:n])


def load(what: argparse.Namespace, index: Sequence[int], labels: Sequence[int] | None = None) -> Subject:
    """The model and the images at `index` of the split.

    Args:
        what: `model`, or `arch` for random weights; `px`, `device`.
        index: positions in the split.
        labels: of the images; by default those of the data, or with random weights the model's own
            predictions, since else there is nothing that an attack could break. What is classified wrongly
            is then left out.
    """
    device = torch.device(what.device)
    at = np.array(index)
    images = _resized(as_float(worlds.images(DATASET, SPLIT, at)), what.px).to(device)
    model = _random(what.arch, what.px, device) if what.arch else _packaged(what.model, device)
    if labels is not None:
        return Subject(model, images, torch.tensor(labels, device=device), tuple(index))
    said = canonical.logits(model, images, ROWS).argmax(1)
    truth = said if what.arch else torch.from_numpy(worlds.labels(DATASET, at)).long().to(device)
    right = (said == truth).cpu()
    kept = tuple(int(i) for i in at[right.numpy()])
    return Subject(model, images[right.to(device)], truth[right.to(device)], kept)


def _resized(images: Tensor, px: int) -> Tensor:
    if px == SIDE:
        return images
    return functional.interpolate(images, size=(px, px), mode="bicubic", antialias=True).clamp_(0, 1)


def _packaged(name: str, device: torch.device) -> Classifier:
    card = reader.read("datasets", DATASET, DatasetCard)
    model = zoo.load(name, device).model
    return Classifier(model, text_bank(model, render(card.names, card.templates))).to(device)


def _random(arch: str, px: int, device: torch.device) -> Classifier:
    """An untrained tower whose classes are the directions of some images, so that predictions differ."""
    model = openclip.build(arch).to(device)
    classes = reader.read("datasets", DATASET, DatasetCard).n_classes
    anchors = _resized(as_float(worlds.images(DATASET, "val", np.arange(classes))), px).to(device)
    with torch.no_grad():
        embeddings = model(anchors).float()
    return Classifier(model, functional.normalize(embeddings - embeddings.mean(0), dim=-1)).to(device)


def threat(eps255: float, norm: Norm = "linf") -> Threat:
    """The ball of that many 255ths, to three digits."""
    return Threat(norm, Fraction(f"{eps255:.3g}") / 255)


def radii(who: Subject, shares: Sequence[float], norm: Norm = "linf") -> list[float]:
    """For each share the smallest radius, in 255ths, at which at most that share stays robust.

    By a short untargeted attack, so the whole chain leaves a little less.
    """
    known: dict[float, int] = {}

    def robust(eps255: float) -> int:
        if eps255 not in known:
            known[eps255] = _sound(who, threat(eps255, norm))
        return known[eps255]

    found = []
    lowest, highest = SEARCHED[norm]
    for share in shares:
        most = round(share * len(who.labels))
        low = max([lowest, *(eps for eps, count in known.items() if count > most)])
        high = min([highest, *(eps for eps, count in known.items() if count <= most)])
        while high > FINE * low:
            middle = float(f"{(low * high) ** 0.5:.3g}")
            low, high = (middle, high) if robust(middle) > most else (low, middle)
        found.append(high)
    return found


def _sound(who: Subject, ball: Threat) -> int:
    lost: list[str] = []
    losses: tuple[Name, ...] = ("ce", "margin")
    stages: list[tuple[str, Attack]] = [
        (
            loss,
            ApgdL1(loss, (SOUNDING,), (1.0,), 1, 0)
            if ball.norm == "l1"
            else Apgd(loss, SOUNDING, 0.75, 1, 0),
        )
        for loss in losses
    ]
    block = ImageBlock(who.images, who.labels, who.keys)
    scheduler.run(
        Model(who.model), Job(stages, ball, who.rows, who.n_classes), [block],
        lambda finding: lost.append(finding.key) if finding.broken else None,
    )  # fmt: skip
    return len(who.labels) - len(lost)
