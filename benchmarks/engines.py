"""The attacks that are compared, driven as their users drive them: images in, broken images out.

The references are black boxes: installed packages, with their own batches, noise and order.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from subject import Subject
from torch import Tensor, nn

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.engine import canonical, scheduler, trajectories
from robustbench_vlm.engine.interface import Attack
from robustbench_vlm.engine.job import ImageBlock, Job, Model
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.threat import Norm, Threat
from robustbench_vlm.types import Finding

CHAIN = ("apgd-ce", "apgd-t", "fab-t", "square")
CARDS: dict[Norm, str] = {"linf": "autoattack", "l1": "autoattack-l1"}
SEED = 0


@dataclass(frozen=True)
class Size:
    """How long the attacks are; AutoAttack's own are 100, 5000 and 9."""

    steps: int = 100
    queries: int = 5000
    targets: int = 9


@dataclass(frozen=True)
class Outcome:
    """What an attack made of N images.

    Attributes:
        broken: (N,) bool, by the canonical pass of the plain model.
        needed: (forwards without gradient, gradients) in rows: what a schedule without any idle row takes.
            Only known of our own.
        unconfirmed: successes in lower precision that fp32 did not confirm.
    """

    broken: list[bool]
    needed: tuple[int, int] | None = None
    unconfirmed: int = 0


def ours(who: Subject, model: Model, ball: Threat, names: Sequence[str], size: Size) -> Outcome:
    """Stages `names` of our chain.

    Args:
        who: images and labels.
        model: canonical function and attacked view.
        ball: norm and radius.
        names: of `CHAIN`.
        size: how long.
    """
    found: list[Finding] = []
    alive = list(range(len(who.keys)))
    clean = canonical.logits(model.canonical, who.images, who.rows)
    unconfirmed = 0
    for group in trajectories.groups(stages(names, size, ball.norm)):
        if not alive:
            break
        block = ImageBlock(who.images, who.labels, who.keys, clean).take(alive)
        job = Job(group, ball, who.rows, who.n_classes, who.rows, seed=SEED)
        cost = scheduler.run(model, job, [block], found.append)
        unconfirmed += cost.unconfirmed
        lost = {finding.key for finding in found if finding.broken}
        alive = [i for i in alive if who.keys[i] not in lost]
    gradients = sum(finding.backwards for finding in found)
    # beside what the attacks ask: every image once when clean, and what each stage ends with
    forwards = sum(finding.forwards for finding in found) - gradients + len(who.keys) + len(found)
    standing = set(alive)
    return Outcome([i not in standing for i in range(len(who.keys))], (forwards, gradients), unconfirmed)


def stages(names: Sequence[str], size: Size, norm: Norm = "linf") -> list[tuple[str, Attack]]:
    """Stages of a shipped chain at another length; several runs of one trajectory keep their shares of it."""
    card = reader.read("attacks", CARDS[norm], AttackCard)
    chosen = []
    for stage in card.stage:
        if stage.name in names:
            fields = stage.fields
            sizes = {"steps": size.steps, "queries": size.queries}
            own: dict[str, Any] = {key: value for key, value in sizes.items() if fields.get(key)}
            if isinstance(fields.get("steps"), Sequence):
                whole = sum(fields["steps"])
                own["steps"] = [max(size.steps * steps // whole, 1) for steps in fields["steps"]]
            if fields.get("targets"):
                own["targets"] = min(size.targets, fields["targets"])
            chosen.append(stage.model_copy(update=own))
    return list(Chain.of(card.model_copy(update={"stage": tuple(chosen)})).stages)


def autoattack(who: Subject, model: nn.Module, ball: Threat, names: Sequence[str], size: Size) -> Tensor:
    """(N, 3, H, W) from the reference's own runner, over the same attacks and in batches of our rows."""
    package = importlib.import_module("pyautoattack")
    base, device = importlib.import_module("pyautoattack.autopgd_base"), who.images.device
    common = {"norm": ball.norm.capitalize(), "eps": float(ball.eps), "device": str(device), "seed": SEED}
    chain = package.AutoAttack(model, version="standard", **common)
    chain.logger.setLevel(logging.ERROR)
    if size != Size():
        more = {"n_iter": size.steps, "logger": chain.logger, **common}
        large = {"use_largereps": ball.norm == "l1"}
        restarts, targets = (5, min(size.targets, 5)) if ball.norm == "l1" else (1, size.targets)
        chain.apgd = base.APGDAttack(model, n_restarts=restarts, eot_iter=1, rho=0.75, **large, **more)
        chain.apgd_targeted = base.APGDAttack_targeted(model, n_target_classes=targets, **large, **more)
        chain.fab.n_iter, chain.fab.n_target_classes = size.steps, size.targets
        chain.square.n_queries = size.queries
    chain.attacks_to_run = list(names)
    adv, _ = chain.run_standard_evaluation(who.images.clone(), who.labels.clone(), batch_size=who.rows)
    found: Tensor = adv
    return found


def torchattacks(who: Subject, model: nn.Module, ball: Threat, names: Sequence[str], size: Size) -> Tensor:
    """(N, 3, H, W) from torchattacks' AutoAttack, with the steps, targets and schedule of the reference."""
    package = importlib.import_module("torchattacks")
    chain = package.AutoAttack(model, norm="Linf", eps=float(ball.eps), n_classes=size.targets + 1, seed=SEED)
    every: dict[str, Any] = dict(zip(CHAIN, chain._autoattack.attacks, strict=True))
    for name, attack in every.items():
        setattr(attack, *(("n_queries", size.queries) if name == "square" else ("steps", size.steps)))
    every["square"].rescale_schedule = False
    one = chain if len(names) > 1 else every[names[0]]
    chunks = zip(who.images.split(who.rows), who.labels.split(who.rows), strict=True)
    return torch.cat([one(images, labels) for images, labels in chunks])


def judged(who: Subject, adv: Tensor) -> Outcome:
    """What the canonical pass says about images that a reference returned."""
    said = canonical.logits(who.model, adv.detach(), who.rows).argmax(1)
    return Outcome((said != who.labels).tolist())


REFERENCES: dict[str, Callable[..., Tensor]] = {"autoattack": autoattack, "torchattacks": torchattacks}
PACKAGES = {"autoattack": "pyautoattack", "torchattacks": "torchattacks"}
