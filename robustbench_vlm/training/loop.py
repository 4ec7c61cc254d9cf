"""The training loop that every defense runs through: batches, steps, log, probes, checkpoints, exact resume.

A run that is killed anywhere and started again by the same command ends with the same bytes. Several
processes take each step together (`share`, `exchange`); the first of them probes, and writes every file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from robustbench_vlm import interruption, store
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.data import loader
from robustbench_vlm.errors import Incomplete
from robustbench_vlm.training import exchange, folder, log
from robustbench_vlm.training.finish import write_checkpoint_folder
from robustbench_vlm.training.prepare import prepare
from robustbench_vlm.training.probe import probe
from robustbench_vlm.training.setup import Setup
from robustbench_vlm.training.state import (
    TrainingState,
    remove_unscheduled,
    resumed,
    save_state,
    saved_step,
)
from robustbench_vlm.training.step import train_step
from robustbench_vlm.training.world import ALONE, World
from robustbench_vlm.types import Batch

Line = Mapping[str, Any]
Report = Callable[[Line], None]
"""Called with every line of the training log."""


def run(
    recipe: Recipe,
    out: Path,
    data_root: Path,
    device: torch.device,
    report: Report,
    cache: Path | None = None,
    remark: Callable[[str], None] = lambda _: None,
    world: World = ALONE,
) -> Path:
    """Train `recipe` into the checkpoint folder `out`; goes on where an earlier run of it stopped.

    Args:
        recipe: the resolved recipe; its fingerprint must be that of the folder, if the folder has one.
        out: created if needed. Ends up with `image.safetensors`, `card.json`, `recipe.json`, `log.jsonl`
            and `checkpoints/`.
        data_root: folder of the datasets.
        device: where to train.
        report: called with every line of the log, in the first process.
        cache: folder for outputs of frozen teachers on clean images; it changes the time and no bit.
        remark: called with notes about the images and class names that a reader of the results should know.
        world: the processes that train together, which have joined (`exchange.joined`).

    Returns:
        `out`.

    Raises:
        InputError: `out` belongs to another recipe.
        TrainingError: a loss or gradient that is not finite.
        Incomplete: SIGINT, SIGTERM or SIGHUP came to any process, and the state was saved after the step that
            was under way; or another process ended. Its message is empty where another process says it.
    """
    folder.refuse_other_runs(out, recipe)
    if (out / "card.json").exists():
        remark(f"{out} is finished already, by this very recipe: nothing is trained again")
        if world.first:  # a kill after the card left the last checkpoints
            remove_unscheduled(out, recipe.checkpoint_every, recipe.optim.steps)
        return out
    threat = recipe.inner.described if recipe.inner else "no adversary"  # refuses a radius that is none
    setup = prepare(
        recipe, data_root, device, cache, world
    )  # before the first file: a bad recipe claims no folder
    for note in setup.notes:
        remark(f"note: {recipe.data.dataset}: {note}")
    state = resumed(setup, out)
    exchange.require_same_step(state.step, world)
    if world.first:
        store.write_json(out / "recipe.json", folder.facts(recipe))
        _announce(setup, out, state.step, threat, remark)
    with interruption.deferred() as stopping, exchange.others_needed():
        _train(setup, out, state, report, stopping)
        write_checkpoint_folder(out, setup)
    if world.first:
        remove_unscheduled(out, recipe.checkpoint_every, recipe.optim.steps)
    exchange.wait(world)
    return out


def _announce(setup: Setup, out: Path, step: int, threat: str, remark: Callable[[str], None]) -> None:
    """Say what is trained and from which step, and make the log end at that step."""
    recipe, aside = setup.recipe, log.continue_at(out, step)
    remark(
        f"training {recipe.name}: {recipe.optim.steps} steps, {threat}, on {setup.device}, into {out}"
        + (f", in {size} processes" if (size := setup.share.world.size) > 1 else "")
        + (" with sharded weights" if setup.sharded else "")
        + (f", going on at step {step}" if step else "")
    )
    if aside is not None:
        lost = "" if step else "nothing of an earlier run was saved, so training begins at step 0; "
        remark(f"{lost}the log of the earlier run is now {aside.name}")


def _train(
    setup: Setup, out: Path, state: TrainingState, report: Report, stopping: Callable[[], bool]
) -> None:
    """Take every step that is left.

    Raises:
        Incomplete: a signal came; the state is saved, unless there is nothing to save.
    """
    recipe, steps, first = setup.recipe, setup.recipe.optim.steps, setup.share.world.first
    try:
        if state.step == 0:
            _probe(out, setup, 0, report)
        for batch, waited in _timed(_batches(setup, state.step)):
            _require_not_stopped(out, setup, state, stopping)
            started = time.perf_counter()
            line = train_step(setup, state, batch)
            if first:
                rate = recipe.optim.batch_size / (time.perf_counter() - started)
                times = {"images_per_second": round(rate, 1), "data_seconds": round(waited, 4)}
                _log(out, report, {"step": state.step, **line, **times})
            if recipe.probe and _due(state.step, recipe.probe.every, steps):
                _probe(out, setup, state.step, report)
            if recipe.checkpoint_every and _due(state.step, recipe.checkpoint_every, steps):
                _save(out, setup, state)
    except KeyboardInterrupt:
        raise _stopped(out, state.step, steps) from None


def _batches(setup: Setup, step: int) -> Iterator[Batch]:
    """This process's images of every step from `step` on, on its device, prepared while it computes."""
    optim, size = setup.recipe.optim, setup.model.image_size
    rows = setup.share.rows(optim.batch_size)
    batches = loader.batches(setup.split, optim.batch_size, setup.recipe.seed, step, optim.steps, size, rows)
    for batch in loader.ahead(batches, pinned=setup.device.type == "cuda"):
        yield batch.to(setup.device)


def _timed(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch, and the seconds that the training waited for it."""
    started = time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - started
        started = time.perf_counter()


def _probe(out: Path, setup: Setup, step: int, report: Report) -> None:
    """Log the accuracy on validation images, if the recipe has any."""
    if setup.probe_batch is not None:
        line = {"step": step, "probe": probe(setup)}
        if setup.share.world.first:
            _log(out, report, line)


def _save(out: Path, setup: Setup, state: TrainingState) -> None:
    """Write a checkpoint file in the first process, if the processes agree on what it would hold."""
    if not setup.sharded:  # else no two of them have the same weights
        exchange.require_same_weights(list(setup.parameters().values()), state.step, setup.share.world)
    save_state(out, setup, state)


def _require_not_stopped(out: Path, setup: Setup, state: TrainingState, stopping: Callable[[], bool]) -> None:
    """Save the state and stop, if a signal came to any of the processes.

    Raises:
        Incomplete: it came; the message is empty in all processes but the first, which says it for all.
    """
    world = setup.share.world
    if exchange.any_of(stopping(), world):
        if exchange.any_of(world.first and state.step > saved_step(out), world):  # one looks, for all
            save_state(out, setup, state)
        exchange.wait(world)
        raise _stopped(out, state.step, setup.recipe.optim.steps) if world.first else Incomplete("")


def _stopped(out: Path, step: int, steps: int) -> Incomplete:
    """What to tell who stopped a run after `step`; nothing is promised that is not on disk."""
    saved = saved_step(out)
    again = "type the same command again, and it goes on at step"
    if saved == step > 0:
        return Incomplete(f"{out}: stopped after step {step} of {steps}, which is saved; {again} {saved}")
    found = f"the last saved step is {saved}" if saved else "nothing is saved"
    return Incomplete(f"{out}: stopped after step {step} of {steps}; {found}; {again} {saved}")


def _due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every `every` steps, and after the last one, happens after `step`."""
    return step == last or step % every == 0


def _log(out: Path, report: Report, line: Line) -> None:
    store.append(out / log.NAME, line)
    report(line)
