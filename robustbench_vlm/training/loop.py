"""The training loop that every defense runs through: batches, steps, log, probes, checkpoints, exact resume.

A run that is killed anywhere and started again by the same command ends with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from robustbench_vlm import store
from robustbench_vlm.cards import plugins
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.data import loader
from robustbench_vlm.errors import InputError
from robustbench_vlm.training.finish import write_checkpoint_folder
from robustbench_vlm.training.prepare import prepare
from robustbench_vlm.training.probe import probe
from robustbench_vlm.training.state import resumed, save_state
from robustbench_vlm.training.step import train_step

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
) -> Path:
    """Train `recipe` into the checkpoint folder `out`; goes on where an earlier run of it stopped.

    Args:
        recipe: the resolved recipe; its fingerprint must be that of the folder, if the folder has one.
        out: created if needed. Ends up with `image.safetensors`, `card.json`, `recipe.json`, `log.jsonl`
            and `checkpoints/`.
        data_root: folder of the datasets.
        device: where to train.
        report: called with every line of the log.
        cache: folder for outputs of frozen teachers on clean images; it changes the time and no bit.
        remark: called with notes about the images and class names that a reader of the results should know.

    Returns:
        `out`.

    Raises:
        InputError: `out` belongs to another recipe.
        TrainingError: a loss or gradient that is not finite.
    """
    _refuse_other_runs(out, recipe)
    if (out / "card.json").exists():
        return out
    setup = prepare(recipe, data_root, device, cache)  # before the first file: a bad recipe claims no folder
    for note in setup.notes:
        remark(f"note: {recipe.data.dataset}: {note}")
    store.write_json(
        out / "recipe.json",
        {"fingerprint": recipe.fingerprint, **_code(recipe), **recipe.model_dump(mode="json")},
    )
    state, steps = resumed(setup, out), recipe.optim.steps
    if state.step == 0 and recipe.probe:
        _log(out, report, {"step": 0, "probe": probe(setup)})
    batches = loader.batches(
        setup.split, recipe.optim.batch_size, recipe.seed, state.step, steps, setup.model.image_size
    )
    for batch in batches:
        started = time.perf_counter()
        line = train_step(setup, state, batch.to(device))
        rate = len(batch.keys) / (time.perf_counter() - started)
        _log(out, report, {"step": state.step, **line, "images_per_second": round(rate, 1)})
        if recipe.probe and _due(state.step, recipe.probe.every, steps):
            _log(out, report, {"step": state.step, "probe": probe(setup)})
        if recipe.checkpoint_every and _due(state.step, recipe.checkpoint_every, steps):
            save_state(out, setup, state)
    write_checkpoint_folder(out, setup)
    return out


def _due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every `every` steps, and after the last one, happens after `step`."""
    return step == last or step % every == 0


def _refuse_other_runs(out: Path, recipe: Recipe) -> None:
    """Refuse a folder that belongs to another recipe, or that no recipe made."""
    path, do = out / "recipe.json", "choose another folder"
    if path.exists():
        earlier = store.read_json(path)
        found = str(earlier.get("fingerprint"))
        if found != recipe.fingerprint:
            wanted = f"{recipe.fingerprint[:12]}, as of {recipe.name} now"
            raise InputError(f"--out {out}", f"a run of another recipe is in it ({found[:12]})", wanted, do)
        if {name: earlier.get(name) for name in _code(recipe)} != _code(recipe):
            what = f"a run whose defense {recipe.defense['name']} had other code is in it"
            raise InputError(f"--out {out}", what, "the code that the run began with", do)
    elif (out / "card.json").exists():
        raise InputError(f"--out {out}", "a checkpoint that this recipe did not make is in it", do=do)


def _code(recipe: Recipe) -> dict[str, str]:
    """The hash of the file of a defense that is not of this package; empty for others."""
    code = plugins.code_sha256(plugins.get("defenses", str(recipe.defense["name"])))
    return {"defense_code_sha256": code} if code else {}


def _log(out: Path, report: Report, line: Line) -> None:
    store.append(out / "log.jsonl", line)
    report(line)
