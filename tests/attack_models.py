"""Small real classifiers for the attack tests: trained on generated blobs in a second, at a fixed seed."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.engine import canonical, scheduler
from robustbench_vlm.engine.job import ImageBlock, Job, Model
from robustbench_vlm.types import Finding

SIDE = 12


def blobs(n: int, n_classes: int, seed: int, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Noisy images of class-wise patterns, in [0, 1]."""
    make = torch.Generator().manual_seed(seed)
    patterns = torch.rand(n_classes, 3, side, side, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(n) % n_classes
    images = 0.5 + 0.25 * (patterns[labels] - 0.5) + 0.2 * torch.randn(n, 3, side, side, generator=make)
    return images.clamp(0, 1), labels


@cache
def classifier(n_classes: int = 10, side: int = SIDE) -> nn.Module:
    """A two-layer CNN that gets nearly all blobs right; `side` is a multiple of 4."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(side * side, n_classes),
        )  # fmt: skip
        optim = torch.optim.Adam(model.parameters(), 5e-3)
        for step in range(80):
            images, labels = blobs(100, n_classes, seed=step + 100, side=side)
            loss = nn.functional.cross_entropy(model(images), labels)
            optim.zero_grad()
            loss.backward()
            optim.step()
        optim.zero_grad()
    return model.eval().requires_grad_(False)


def position_dependence(classify, images, rows) -> float:
    """Largest change of a logit when the same images stand in other rows of the same shape.

    If it is not 0 the numbers of a row depend on which row it is, and findings may differ in their last bits
    with scheduling.
    """
    batch = canonical.padded(images[:rows], rows)
    straight = canonical.logits(classify, batch, rows)
    turned = canonical.logits(classify, batch.roll(rows // 2 + 1, 0), rows).roll(-(rows // 2 + 1), 0)
    return float((straight - turned).abs().max())


SHORT = {"steps": 6, "queries": 40, "targets": 3, "restarts": 2, "eot": 2}
"""What the contract tests cut: an attack of hundreds of steps follows the same rules with a few."""


def shortened(value, most):
    """A number, or each of several, cut to `most`."""
    return [min(each, most // len(value)) for each in value] if isinstance(value, list) else min(value, most)


def discovered() -> dict:
    """One configuration of every attack of the package, by its name.

    The numbers are those of the first packaged chain that uses the attack, with fewer steps. An attack that
    no chain uses is built from the defaults of its fields.
    """
    found = {}
    for chain in reader.names("attacks"):
        for stage in reader.read("attacks", chain, AttackCard).stage:
            short = {k: shortened(v, SHORT[k]) if k in SHORT and v else v for k, v in stage.fields.items()}
            found.setdefault(stage.attack, plugins.build("attacks", stage.attack, short, chain))
    for name in plugins.names("attacks"):
        if name not in found:
            found[name] = plugins.build("attacks", name, {}, name)
    return found


def findings(model, images, labels, attack, threat, *, order=None, keys=None, **more) -> list[Finding]:
    """`scheduler.run` with findings in the order of the images."""
    keys = [f"blobs/test/{i}" for i in range(len(images))] if keys is None else keys
    order = range(len(images)) if order is None else order
    order = list(order)
    found: dict[str, Finding] = {}
    stages = [(more.pop("stage", "s"), attack)]
    more.setdefault("n_classes", int(model(images[:1]).shape[1]))
    job = Job(stages, threat, **{"rows": 16, **more})
    block = ImageBlock(images[order], labels[order], [keys[i] for i in order])
    scheduler.run(Model(model), job, [block], lambda finding: found.__setitem__(finding.key, finding))
    return [found[keys[i]] for i in range(len(images)) if i in set(order)]
