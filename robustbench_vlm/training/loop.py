"""The min-max loop that every defense is trained by: targets, inner ascent, outer loss, update; exact resume.

A training step is a pure function of (recipe, step, state): its images, its starting noise and its dropout
are keyed by seed and step, so a run killed anywhere and started again ends with the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from robustbench_vlm import rng, store
from robustbench_vlm.cards.recipe import Inner, Optim, Recipe
from robustbench_vlm.data import loader
from robustbench_vlm.defenses.interface import Roles, Step, Terms
from robustbench_vlm.defenses.losses import ce
from robustbench_vlm.engine.geometry import uniform_start
from robustbench_vlm.engine.noise import Keyed
from robustbench_vlm.errors import AttackError, InputError, TrainingError
from robustbench_vlm.models import checkpoint, zoo
from robustbench_vlm.models.clip import frozen
from robustbench_vlm.training.inner import ascend
from robustbench_vlm.training.prepare import Setup, prepare
from robustbench_vlm.types import Batch

CPU = torch.device("cpu")
GAUSSIAN = 0.001  # deviation of the `gaussian` start, in pixel units

Line = Mapping[str, Any]
Report = Callable[[Line], None]
"""Called with every line of the training log."""


def lr(step: int, optim: Optim) -> float:
    """Learning rate of 0-based `step`: linear warm-up to `optim.lr`, then half a cosine to zero at the end.

    RobustVLM and MMT-ARD set the rate after the update, so their first update runs at the full rate; here
    the rate belongs to the update it is used in.
    """
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    progress = (step - optim.warmup) / max(optim.steps - optim.warmup, 1)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class State:
    """What changes from step to step, and nothing else."""

    step: int
    optimiser: torch.optim.Optimizer
    carry: Mapping[str, Tensor]


def run(
    recipe: Recipe,
    out: Path,
    data_root: Path,
    device: torch.device,
    report: Report,
    cache: Path | None = None,
    remark: Callable[[str], None] = lambda _: None,
) -> Path:
    """Train `recipe` into the checkpoint folder `out`; goes on where an earlier run of it stopped.

    Args:
        recipe: the resolved recipe; its fingerprint is held against the folder's.
        out: created if needed. Ends up with `image.safetensors`, `card.json`, `recipe.json`, `log.jsonl`
            and `checkpoints/`.
        data_root: folder of the datasets.
        device: where to train.
        report: called with every line of the log.
        cache: folder of what frozen teachers say of clean images; it changes the time and no bit.
        remark: called with what a careful reader should know of the images and class names.

    Returns:
        `out`.

    Raises:
        InputError: `out` belongs to another recipe.
        TrainingError: a loss or gradient that is not finite.
    """
    _refuse_foreign(out, recipe)
    if (out / "card.json").exists():
        return out
    setup = prepare(recipe, data_root, device, cache)  # first of all: a bad recipe claims no folder
    for note in setup.notes:
        remark(f"note: {recipe.data.dataset}: {note}")
    resolved = {"fingerprint": recipe.fingerprint, **recipe.model_dump(mode="json")}
    store.write_json(out / "recipe.json", resolved)
    state = _begin(setup, out)
    optim = recipe.optim
    batches = loader.batches(
        setup.split, optim.batch_size, recipe.seed, state.step, optim.steps, setup.model.image_size
    )
    if state.step == 0 and setup.probe is not None:
        _log(out, report, {"step": 0, "probe": probe(setup)})
    for batch in batches:
        started = time.perf_counter()
        line = advance(setup, state, batch.to(device))
        state.step += 1
        rate = len(batch.keys) / (time.perf_counter() - started)
        _log(out, report, {"step": state.step, **line, "images_per_second": round(rate, 1)})
        last = state.step == optim.steps
        if recipe.probe and setup.probe is not None and (last or state.step % recipe.probe.every == 0):
            _log(out, report, {"step": state.step, "probe": probe(setup)})
        if recipe.checkpoint_every and (last or state.step % recipe.checkpoint_every == 0):
            _keep(out, setup, state)
    _finish(out, setup)
    return out


def advance(setup: Setup, state: State, batch: Batch) -> dict[str, float]:
    """One training step: changes the student, the optimiser and `state.carry`; returns the log line.

    Raises:
        TrainingError: a term or a gradient that is not finite, with step, term and keys.
    """
    recipe, model, defense = setup.recipe, setup.model, setup.defense
    with frozen(model):
        with torch.no_grad():
            roles = setup.roles_in_training(batch)
            targets = defense.targets(roles, batch)
        adv = batch.images if recipe.inner is None else _attack(setup, roles, state.step, batch, targets)
    model.visual.train()
    with _keyed_dropout(f"{recipe.seed}/dropout/{state.step}", batch.images.device):
        step = Step(batch, adv, targets, state.carry, state.step / recipe.optim.steps)
        terms = defense.outer(setup.roles_in_training(batch), step)
    rate = lr(state.step, recipe.optim)
    for group in state.optimiser.param_groups:
        group["lr"] = rate
    state.optimiser.zero_grad(set_to_none=True)
    terms.total.backward()  # type: ignore[no-untyped-call]
    parameters = list(setup.parameters().values())
    norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.optim.grad_clip or math.inf)
    line = _finite(terms, norm, state.step, batch)  # before the update: a bad step changes nothing
    state.optimiser.step()
    model.visual.eval()
    state.carry = terms.carry
    return {"lr": rate, **line}


def _attack(setup: Setup, roles: Roles, step: int, batch: Batch, targets: Mapping[str, Tensor]) -> Tensor:
    """The adversarial images of one step; the student is in the mode that the recipe states."""
    recipe, inner = setup.recipe, setup.recipe.inner
    assert inner is not None
    start = _start(inner, batch.images, [f"{recipe.seed}/train/{step}/{key}" for key in batch.keys])
    objective = setup.defense.inner(roles, batch, targets)
    setup.model.visual.train(inner.mode == "train")
    try:
        with _keyed_dropout(f"{recipe.seed}/attack/{step}", batch.images.device):
            return ascend(
                objective,
                batch.images,
                inner.threat,
                steps=inner.steps,
                step_size=float(inner.step),
                start=start,
            )
    except AttackError as error:
        raise TrainingError(f"step {step}: {error}; first image {batch.keys[0]}") from error


def _start(inner: Inner, images: Tensor, names: list[str]) -> Tensor:
    """The first iterate of every image, (B, 3, H, W); noise of its own name."""
    noise = Keyed(tuple(names))
    if inner.start == "gaussian":
        return images + GAUSSIAN * noise.normal(tuple(images.shape[1:])).to(images.device)
    return uniform_start(images, inner.threat, noise, box=inner.start == "uniform")


def probe(setup: Setup) -> dict[str, float]:
    """Accuracy on the probe images, clean and under PGD with the recipe's own ball, as fractions.

    A gauge of progress, not a result: results come from `vlmrob eval`.
    """
    assert setup.probe is not None
    assert setup.recipe.probe is not None
    batch = setup.probe
    with frozen(setup.model):
        with torch.no_grad():
            adv, roles = batch.images, setup.roles_now()
        inner = setup.recipe.inner
        if inner is not None:
            names = [f"{setup.recipe.seed}/probe/{key}" for key in batch.keys]
            start = uniform_start(adv, inner.threat, Keyed(tuple(names)))
            adv = ascend(
                lambda images: ce(roles.logits("student", images), batch.labels),
                batch.images,
                inner.threat,
                steps=setup.recipe.probe.steps,
                step_size=float(inner.step),
                start=start,
            )
        with torch.no_grad():
            clean, robust = (roles.logits("student", images).argmax(1) for images in (batch.images, adv))
    right = {"clean": clean == batch.labels} | ({"robust": robust == batch.labels} if inner else {})
    return {name: round(float(hits.float().mean()), 4) for name, hits in right.items()}


@contextmanager
def _keyed_dropout(name: str, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators of CPU and `device` are a function of `name`; outside, untouched."""
    cuda = device.type == "cuda"
    index = torch.cuda.current_device() if cuda and device.index is None else device.index
    seed = int(rng.generator(name).integers(2**62))
    with torch.random.fork_rng(devices=[index] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def _finite(terms: Terms, norm: Tensor, step: int, batch: Batch) -> dict[str, float]:
    """Loss, terms and gradient norm as numbers, fetched from the device in one go.

    Raises:
        TrainingError: one of them is not finite.
    """
    named = {"loss": terms.total.detach(), **terms.parts, "grad_norm": norm}
    values = torch.stack([value.double() for value in named.values()]).tolist()
    line = dict(zip(named, values, strict=True))
    for name in (*terms.parts, "loss"):  # a term is to blame before what came of it
        if not math.isfinite(line[name]):
            term, keys = "total" if name == "loss" else name, ", ".join(batch.keys[:3])
            raise TrainingError(f"step {step}: term {term!r} is {line[name]:g}; images {keys}, ...")
    if not math.isfinite(line["grad_norm"]):
        raise TrainingError(f"step {step}: the gradient is not finite; first image {batch.keys[0]}")
    return {name: round(value, 6) for name, value in line.items()}


def _refuse_foreign(out: Path, recipe: Recipe) -> None:
    """Refuse a folder that belongs to another recipe, or to none."""
    path, do = out / "recipe.json", "choose another folder"
    if path.exists():
        found = str(store.read_json(path).get("fingerprint"))
        if found != recipe.fingerprint:
            wanted = f"{recipe.fingerprint[:12]}, as of {recipe.name} now"
            raise InputError(f"--out {out}", f"holds a run of another recipe ({found[:12]})", wanted, do)
    elif (out / "card.json").exists():
        raise InputError(f"--out {out}", "holds a checkpoint that this recipe did not make", do=do)


def _optimiser(setup: Setup) -> torch.optim.Optimizer:
    optim, parameters = setup.recipe.optim, list(setup.parameters().values())
    if optim.algorithm == "sgd":
        return torch.optim.SGD(parameters, optim.lr, optim.momentum, weight_decay=optim.weight_decay)
    fused = setup.recipe.compute.fused_adamw
    return torch.optim.AdamW(parameters, lr=optim.lr, weight_decay=optim.weight_decay, fused=fused)


def _begin(setup: Setup, out: Path) -> State:
    """The state to start from: the newest checkpoint of `out`, or step 0."""
    optimiser = _optimiser(setup)
    found = sorted((out / "checkpoints").glob("step_*.safetensors"))
    log = out / "log.jsonl"
    if not found:
        log.unlink(missing_ok=True)
        return State(0, optimiser, {})
    tensors = {k: v.to(setup.device) for k, v in checkpoint.read_state(found[-1]).items()}
    with safe_open(found[-1], framework="pt") as file:
        facts = file.metadata() or {}
    if facts.get("recipe") != setup.recipe.fingerprint:
        raise InputError(str(found[-1]), "a checkpoint of another recipe", setup.recipe.fingerprint[:12])
    parameters = setup.parameters()
    for name in tensors:  # before a run goes on without its moments
        if name not in parameters and not name.startswith(("student.", "optim.", "carry.")):
            words = f"tensor {name!r}, which this version does not read", "a checkpoint of this version"
            raise InputError(str(found[-1]), *words, f"finish it with the old one, or delete {out}")
    student = {k.removeprefix("student."): v for k, v in tensors.items() if k.startswith("student.")}
    checkpoint.fill(setup.model.visual, student, str(found[-1]))
    for index, (name, parameter) in enumerate(parameters.items()):
        if name in tensors:  # prompts outside the student's image tower
            parameter.data.copy_(tensors[name])
        prefix = f"optim.{index}."  # none for a parameter that never got a gradient
        saved = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if saved:
            count = setup.device if setup.recipe.compute.fused_adamw else CPU  # where AdamW counts its steps
            optimiser.state[parameter] = {k: v.to(count) if k == "step" else v for k, v in saved.items()}
    carry = {k.removeprefix("carry."): v for k, v in tensors.items() if k.startswith("carry.")}
    step = int(facts["step"])
    lines = [line for line in store.records(log) if line["step"] <= step]
    store.write(log, b"".join(store.canonical(line) + b"\n" for line in lines))
    return State(step, optimiser, carry)


def _keep(out: Path, setup: Setup, state: State) -> None:
    """Write one checkpoint file, whole or not at all."""
    tensors = {f"student.{name}": value for name, value in setup.model.visual.state_dict().items()}
    tensors |= {f"carry.{name}": value for name, value in state.carry.items()}
    for index, (name, parameter) in enumerate(setup.parameters().items()):
        tensors |= {name: parameter} if name not in tensors else {}
        moments = state.optimiser.state.get(parameter, {})
        tensors |= {f"optim.{index}.{k}": v for k, v in moments.items() if v is not None}
    facts = {"step": str(state.step), "recipe": setup.recipe.fingerprint}
    content = save(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata=facts
    )
    store.write(out / "checkpoints" / f"step_{state.step:07d}.safetensors", content)


def _finish(out: Path, setup: Setup) -> None:
    """Write the checkpoint folder: merged weights first, the card last."""
    recipe = setup.recipe
    model = setup.adapters.merged(setup.model) if setup.adapters else setup.model
    everyone = {"student": setup.student, **setup.teachers}
    parents = tuple(
        checkpoint.Parent(
            role=role, model=made.card.name, sha256=made.card.sha256, trained_on=made.card.trained_on
        )
        for role, made in everyone.items()
    )
    seen: tuple[str, ...] | None = None
    if all(parent.trained_on is not None for parent in parents):
        known = {name for parent in parents for name in parent.trained_on or ()}
        seen = tuple(sorted({*known, recipe.data.dataset}))
    card = checkpoint.describe(
        model,
        recipe.name,
        defense=str(recipe.defense["name"]),
        trained_on=seen,
        text_from=setup.student.card.text_from or zoo.address(setup.student.id),
        parents=parents,
        recipe=recipe.model_dump(mode="json"),
        training={
            "recipe_sha256": recipe.fingerprint,
            "data_sha256": setup.split.sha256,
            "images": len(setup.split),
        },
    )
    checkpoint.save_folder(out, model, card)


def _log(out: Path, report: Report, line: Line) -> None:
    store.append(out / "log.jsonl", line)
    report(line)
