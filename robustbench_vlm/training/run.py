"""Train a recipe into a folder: what `vlmrob train` and `robustbench_vlm.train` have in common."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from robustbench_vlm import one_writer, store
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.data.tiny import write
from robustbench_vlm.devices import choose_device
from robustbench_vlm.training import exchange, folder, inputs, loop, teacher_cache
from robustbench_vlm.training.prepare import build_defense
from robustbench_vlm.training.probe import probe_text
from robustbench_vlm.training.state import saved_step
from robustbench_vlm.training.world import ALONE, World, launched, require_divisible

Meter = Callable[..., None]
"""Called with (what, done, total), and with a note where there is one."""


def dry_run(
    recipe: Recipe, out: Path, data_root: Path, world: World = ALONE, *, resume: bool = True
) -> list[str]:
    """What `run_recipe` would do, one line each; nothing is loaded, rendered or written.

    Raises:
        InputError: what `run_recipe` would refuse before it loads anything.
    """
    _require(recipe, out, data_root, world, resume=resume)
    if (out / "card.json").exists():
        return [f"{out} is finished already, by this very recipe: nothing would be trained"]
    step, threat = saved_step(out), recipe.inner.described if recipe.inner else "no adversary"
    begins = f"going on at step {step}" if step else "from step 0"
    teachers = ", ".join(_teaching(recipe, role) for role in recipe.teachers) or "none"
    return [
        f"{recipe.name}: {recipe.optim.steps} steps of {recipe.optim.batch_size} images, {threat}, {begins}",
        f"student {recipe.student}; teachers: {teachers}",
        f"data: {recipe.data.dataset}, split {recipe.data.split}, below {data_root}",
        f"into {out}",
    ]


def _require(recipe: Recipe, out: Path, data_root: Path, world: World, *, resume: bool) -> None:
    """Refuse what can be seen to fail before anything is loaded, rendered or written.

    Raises:
        InputError: see `run_recipe`.
    """
    folder.refuse_other_runs(out, recipe, resume=resume)
    build_defense(recipe)
    require_divisible(recipe, world)
    if world.first:
        one_writer.require_free(out)
    inputs.require(recipe, data_root)


def _teaching(recipe: Recipe, role: str) -> str:
    """A role with the models that teach in it, one after the other."""
    first = [f"{phase.model} until {phase.until:g}, then " for phase in recipe.phases.get(role, ())]
    return f"{role} {''.join(first)}{recipe.teachers[role]}"


def run_recipe(
    recipe: Recipe,
    out: Path,
    data_root: Path,
    device: str,
    meter: Meter,
    remark: Callable[[str], None],
    *,
    resume: bool = True,
    cache: bool = True,
) -> Path:
    """Train a recipe into the checkpoint folder `out`, and go on where an earlier run of it stopped.

    A dataset of the tiny world that is not below the data root is rendered first. In a process of
    `torchrun`, all processes train together, and the first of them writes and reports.

    Args:
        recipe: what to train (`training.resolve`).
        out: checkpoint folder.
        data_root: folder of the datasets.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        meter: called with (what, steps done, steps in all, loss).
        remark: called with each line about the run, its data and its validation.
        resume: whether `out` may hold an earlier run.
        cache: whether outputs of frozen teachers on clean images are stored; changes the time and no bit.

    Raises:
        InputError: `out` is in the way, belongs to another recipe, or another process trains into it; a model
            or dataset cannot be used.
        TrainingError: a loss or gradient is not finite.
        Incomplete: a signal stopped the run; see `loop.run`.
        OSError: with the code of a full disk, if there is hardly any space left for `out`.
    """
    world = launched()
    _require(recipe, out, data_root, world, resume=resume)
    where = choose_device(device, world.local_rank if world.size > 1 else None)

    report = reporting(recipe, meter, remark)
    stored = teacher_cache.default_folder() if cache else None
    with exchange.joined(world, where):
        if world.first:
            _make_place(recipe, out, data_root, meter, remark)
        exchange.wait(world)
        said = remark if world.first else _nothing
        with one_writer.locked(out) if world.first else nullcontext():
            return loop.run(recipe, out, data_root, where, report, stored, said, world)


def reporting(recipe: Recipe, meter: Meter, remark: Callable[[str], None]) -> loop.Report:
    """What is called with every line of a run's log: a remark about a probe, else the meter.

    Args:
        recipe: of the run.
        meter: called with (what, steps done, steps in all, loss).
        remark: called with a line about the accuracy on validation images.
    """

    def report(line: loop.Line) -> None:
        if "probe" in line:
            ball = f" (robust at {recipe.inner.threat})" if recipe.inner else ""
            found = f"{probe_text(line['probe'])} on validation images{ball}"
            remark(f"{recipe.name}, step {line['step']}: {found}")
        else:
            meter(recipe.name, line["step"], recipe.optim.steps, f"loss {line['loss']:.4f}")

    return report


def _make_place(
    recipe: Recipe, out: Path, data_root: Path, meter: Meter, remark: Callable[[str], None]
) -> None:
    """Look whether `out` can be written, and render the images of the tiny world if they are missing."""
    if not (out / "card.json").exists():
        store.require_writable(out, "--out", make=False)
    if write.make_missing(data_root, meter, [recipe.data.dataset]):
        remark(f"rendered the tiny world into {data_root}")


def _nothing(_: str) -> None:
    """What the other processes of a training say."""
