"""One training step: model outputs on clean images, attack, loss, gradient, update of the weights.

A step is a pure function of the recipe, the state before it, and its batch: the noise of the attack's start
is keyed by seed, step and image, dropout by seed, step and row. So it is the same step, to rounding, whether
one process computes the batch or several do, at once or in parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from fractions import Fraction

import torch
from torch import Tensor

from robustbench_vlm.cards.recipe import Inner, Optim
from robustbench_vlm.data import loader
from robustbench_vlm.defenses.interface import Roles, Step, Terms
from robustbench_vlm.engine.geometry import uniform_start
from robustbench_vlm.engine.noise import Keyed
from robustbench_vlm.errors import AttackError, TrainingError
from robustbench_vlm.models.clip import frozen
from robustbench_vlm.threat import Threat
from robustbench_vlm.training import dropout, exchange, fsdp
from robustbench_vlm.training.inner import ascend
from robustbench_vlm.training.setup import Setup
from robustbench_vlm.training.state import TrainingState
from robustbench_vlm.types import Batch

GAUSSIAN = 0.001  # standard deviation of the `gaussian` start, in pixel units


def learning_rate(step: int, optim: Optim) -> float:
    """Learning rate of 0-based `step`: linear warm-up to `optim.lr`, then half a cosine to zero at the end.

    RobustVLM and MMT-ARD set the rate after the update, so their first update runs at the full rate; here
    the rate belongs to the update it is used in.
    """
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    progress = (step - optim.warmup) / max(optim.steps - optim.warmup, 1)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))


def train_step(setup: Setup, state: TrainingState, batch: Batch) -> dict[str, float]:
    """Take step `state.step` on `batch`: changes the student, the optimiser, `state.step` and `state.carry`.

    Args:
        setup: models, losses and the share of the batch that this process computes.
        state: of before the step.
        batch: the images of that share.

    Returns:
        Learning rate, loss, terms of the loss and gradient norm, for the log.

    Raises:
        TrainingError: a term or a gradient that is not finite, with step, term and keys. The weights are
            those of before the step then.
    """
    recipe, model = setup.recipe, setup.model
    progress = state.step / recipe.optim.steps
    whole = _whole(setup, state.step, batch)
    with fsdp.gathered_once(model.visual):
        targets, adv = _attacked(setup, state.step, batch)
    model.visual.train()
    state.optimiser.zero_grad(set_to_none=True)
    with fsdp.gathered_once(model.visual) if setup.share.parts > 1 else nullcontext():
        with dropout.keyed(f"{recipe.seed}/dropout/{state.step}", batch.images.device):
            given = Step(whole, adv, setup.share.gathered(targets), state.carry, progress)
            terms = setup.defense.outer(setup.outer_roles(batch, progress), given)
        terms.total.backward()  # type: ignore[no-untyped-call]
    line = _update(setup, state, terms, whole)
    model.visual.eval()
    state.carry = terms.carry
    state.step += 1
    return line


def _whole(setup: Setup, step: int, batch: Batch) -> Batch:
    """The batch of all processes: labels and keys of all of it, and the images of this process."""
    if setup.share.world.size == 1:
        return batch
    where = loader.positions(setup.split, setup.recipe.optim.batch_size, setup.recipe.seed, step)
    labels = torch.from_numpy(setup.split.labels[where]).to(batch.labels.device)
    return Batch(batch.images, labels, tuple(setup.split.keys[i] for i in where))


def _attacked(setup: Setup, step: int, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Targets and adversarial images of this process's rows, part by part."""
    recipe, progress = setup.recipe, step / setup.recipe.optim.steps
    targets, adv = [], []
    with frozen(setup.model):
        for number, part in enumerate(setup.share.split(batch)):
            with torch.no_grad():
                roles = setup.training_roles(part, progress)
                targets.append(setup.defense.targets(roles, part))
            if recipe.inner is not None:
                with setup.share.dropout(number, len(batch.images)):
                    adv.append(attack(setup, roles, step, part, targets[-1]))
    if len(targets) == 1:
        return dict(targets[0]), adv[0] if adv else batch.images
    joined = {name: torch.cat([part[name] for part in targets]) for name in targets[0]}
    return joined, torch.cat(adv) if adv else batch.images


def _update(setup: Setup, state: TrainingState, terms: Terms, batch: Batch) -> dict[str, float]:
    """Change the weights by their gradient, that of `terms.total`; returns the numbers for the log."""
    optim = setup.recipe.optim
    rate = learning_rate(state.step, optim)
    for group in state.optimiser.param_groups:
        group["lr"] = rate
    parameters = list(setup.parameters().values())
    if not setup.sharded:  # else the backward has done it
        exchange.average([p.grad for p in parameters if p.grad is not None], setup.share.world)
    norm = fsdp.whole(torch.nn.utils.clip_grad_norm_(parameters, optim.grad_clip or math.inf))
    line = _finite_numbers(terms, norm, state.step, batch)  # before the update: a bad step changes nothing
    state.optimiser.step()
    return {"lr": rate, **line}


def attack(setup: Setup, roles: Roles, step: int, batch: Batch, targets: Mapping[str, Tensor]) -> Tensor:
    """The adversarial images (B, 3, H, W) of one step.

    The student is in the mode that the recipe states, and in eval mode afterwards: `Defense.targets` of the
    next part sees it as that of the first one did.
    """
    recipe, inner = setup.recipe, setup.recipe.inner
    assert inner is not None
    threat = inner.threat_at(Fraction(step, recipe.optim.steps))
    names = [f"{recipe.seed}/train/{step}/{key}" for key in batch.keys]
    start = starting_images(inner, threat, batch.images, names)
    objective = setup.defense.inner(roles, batch, targets)
    setup.model.visual.train(inner.mode == "train")
    try:
        with dropout.keyed(f"{recipe.seed}/attack/{step}", batch.images.device):
            return ascend(
                objective,
                batch.images,
                threat,
                steps=inner.steps,
                step_size=float(inner.step),
                start=start,
            )
    except AttackError as error:
        raise TrainingError(f"step {step}: {error}; first image {batch.keys[0]}") from error
    finally:
        setup.model.visual.eval()


def starting_images(inner: Inner, threat: Threat, images: Tensor, names: list[str]) -> Tensor:
    """The first iterate of every image, (B, 3, H, W), by `inner.start` in the ball `threat`.

    Each name keys the noise of one image.
    """
    noise = Keyed(tuple(names))
    if inner.start == "gaussian":
        return images + GAUSSIAN * noise.normal(tuple(images.shape[1:])).to(images.device)
    return uniform_start(images, threat, noise, box=inner.start == "uniform")


def _finite_numbers(terms: Terms, norm: Tensor, step: int, batch: Batch) -> dict[str, float]:
    """Loss, terms and gradient norm as numbers, fetched from the device in one transfer.

    Raises:
        TrainingError: one of them is not finite.
    """
    named = {"loss": terms.total.detach(), **terms.parts, "grad_norm": norm}
    values = torch.stack([value.double() for value in named.values()]).tolist()
    line = dict(zip(named, values, strict=True))
    for name in (*terms.parts, "loss"):  # terms first: a term that is not finite makes the loss so, too
        if not math.isfinite(line[name]):
            term, keys = "total" if name == "loss" else name, ", ".join(batch.keys[:3])
            raise TrainingError(f"step {step}: term {term!r} is {line[name]:g}; images {keys}, ...")
    if not math.isfinite(line["grad_norm"]):
        raise TrainingError(f"step {step}: the gradient is not finite; first image {batch.keys[0]}")
    return {name: round(value, 6) for name, value in line.items()}
