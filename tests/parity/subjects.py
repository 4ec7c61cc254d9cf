"""Who is compared: three small models, images that they get right, and radii at which some images break.

Both sides see a model through one fixed shape, so that a row's numbers depend on that row alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache

import numpy as np
import torch
from attack_models import blobs, classifier, findings, position_dependence
from torch import Tensor, nn

from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.attacks.apgd_l1 import ApgdL1
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data.loader import as_float
from robustbench_vlm.data.tiny import worlds
from robustbench_vlm.engine import canonical
from robustbench_vlm.models import zoo
from robustbench_vlm.models.clip import Classifier
from robustbench_vlm.models.text_bank import render, text_bank
from robustbench_vlm.threat import Threat
from robustbench_vlm.training.inner import ascend

ROWS = 16  # of every model call, on both sides
SIDE = 16  # the reference's L2 Square fails where a fifth of the side fits more than five times, as at 12
WORLD = "tiny-seen"
HALVINGS = 7  # of the interval in which a radius is sought
WIDEST = {"linf": 24 / 255, "l2": 2.0, "l1": 24.0}
NAMES = ("plain", "trained", "clip")


@dataclass(frozen=True)
class Subject:
    """A model and images that it gets right.

    Attributes:
        name: one of `NAMES`.
        model: (B, 3, H, W) -> (B, C) logits.
        images: (n, 3, H, W) in [0, 1].
        labels: (n,) int64.
        rows: of every model call, on both sides.
        chosen: positions of the images in the subject that they are of; empty for all of them.
    """

    name: str
    model: Callable[[Tensor], Tensor]
    images: Tensor
    labels: Tensor
    rows: int = ROWS
    chosen: tuple[int, ...] = ()

    @property
    def keys(self) -> list[str]:
        return [f"{self.name}/test/{i}" for i in self.chosen or range(len(self.images))]

    @property
    def n_classes(self) -> int:
        return int(self.model(self.images[:1]).shape[1])

    def logits(self, images: Tensor) -> Tensor:
        """(n, C) in the fixed shape."""
        return canonical.logits(self.model, images, self.rows)

    def only(self, index: list[int]) -> Subject:
        """The same with some of its images, which keep their keys."""
        return replace(self, images=self.images[index], labels=self.labels[index], chosen=tuple(index))

    def wrong(self, adv: Tensor) -> list[bool]:
        """The verdict on images, in the fixed shape."""
        return (self.logits(adv).argmax(1) != self.labels).tolist()

    def attack(self, attack, threat: Threat, **more):
        """Findings of ours, in the order of the images."""
        more = {"rows": self.rows, "keys": self.keys, "n_classes": self.n_classes, **more}
        return findings(self.model, self.images, self.labels, attack, threat, **more)


@cache
def subject(name: str, n: int, rows: int = ROWS) -> Subject:
    """The first n test images that the model called `name` gets right."""
    model, images, labels = {"plain": _plain, "trained": _trained, "clip": _clip}[name](n + n // 4 + 8)
    right = canonical.logits(model, images, rows).argmax(1) == labels
    assert int(right.sum()) >= n
    assert position_dependence(model, images, rows) == 0, "rows must not depend on their position"
    return Subject(name, model, images[right][:n], labels[right][:n], rows)


def _plain(n: int) -> tuple[nn.Module, Tensor, Tensor]:
    return classifier(10, SIDE), *blobs(n, 10, seed=2, side=SIDE)


def _trained(n: int) -> tuple[nn.Module, Tensor, Tensor]:
    return adversarially_trained(), *blobs(n, 10, seed=2, side=SIDE)


def _clip(n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The packaged robust teacher with its zero-shot head on the seen world of 40 classes."""
    index = np.arange(n)
    card = reader.read("datasets", WORLD, DatasetCard)
    images = torch.as_tensor(as_float(worlds.images(WORLD, "test", index)))
    return zero_shot(), images, torch.as_tensor(worlds.labels(card.name, index)).long()


@cache
def zero_shot() -> nn.Module:
    card = reader.read("datasets", WORLD, DatasetCard)
    clip = zoo.load("tiny-robust-teacher").model
    return Classifier(clip, text_bank(clip, render(card.names, card.templates)))


@cache
def adversarially_trained() -> nn.Module:
    """The plain CNN, trained on with PGD by the kernels of this package."""
    model = copy.deepcopy(classifier(10, SIDE)).train().requires_grad_(True)
    optim = torch.optim.Adam(model.parameters(), 3e-3)
    threat = Threat("linf", Fraction(8, 255))
    for step in range(60):
        images, labels = blobs(100, 10, seed=step + 300, side=SIDE)

        def loss(x: Tensor, labels: Tensor = labels) -> Tensor:
            return nn.functional.cross_entropy(model(x), labels, reduction="none")

        adv = ascend(loss, images, threat, steps=4, step_size=4 / 255)
        optim.zero_grad()
        loss(adv).mean().backward()
        optim.step()
    optim.zero_grad()
    return model.eval().requires_grad_(False)


@cache
def radius(name: str, n: int, norm: str, share: float, rows: int = ROWS) -> Threat:
    """The smallest radius, to three digits, at which a short APGD leaves at most `share` of the images."""
    who, low, high = subject(name, n, rows), 0.0, WIDEST[norm]
    short = ApgdL1("ce", (8,), (1.0,), 1, 0) if norm == "l1" else Apgd("ce", 8, 0.75, 1, 0)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        left = sum(not f.broken for f in who.attack(short, _threat(norm, middle)))
        low, high = (low, middle) if left <= share * n else (middle, high)
    return _threat(norm, high)


def _threat(norm: str, eps: float) -> Threat:
    return Threat(norm, Fraction(f"{eps:.3g}"))
