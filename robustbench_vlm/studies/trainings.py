"""The trainings of a study: a recipe with the study's settings, and its training with a clock."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from robustbench_vlm import devices
from robustbench_vlm.cards import overrides, plugins, reader
from robustbench_vlm.cards.recipe import Probe, Recipe
from robustbench_vlm.studies.clock import Clock
from robustbench_vlm.studies.task import Resources
from robustbench_vlm.training import loop


def resolved(where: str, recipe: str, settings: Sequence[str], seed: int, probe: Probe) -> Recipe:
    """A recipe card with settings, seed and probe.

    The card's notes are left out, so that a remark added there does not make another run of it.

    Args:
        where: what names the recipe, for messages.
        recipe: name of the recipe card, or a TOML file.
        settings: changes, each as `--set` takes them.
        seed: of the run.
        probe: replaces the recipe's own.

    Raises:
        CardError: no such recipe, a setting that it does not take, or code that was not allowed.
    """
    file = reader.path("recipes", recipe)
    table = reader.table("recipes", file)
    table = overrides.override(table, list(settings))
    defense = table.get("defense")  # as the file of the recipe or that of the study has it
    plugins.require_allowed(str(defense.get("name")) if isinstance(defense, dict) else "", where)
    table |= {"seed": seed, "notes": (), "probe": probe.model_dump(mode="json")}
    return reader.shown_card("recipes", reader.parse(table, Recipe, where), file)


def train(recipe: Recipe, folder: Path, resources: Resources) -> Path:
    """Train a recipe into `folder`/model, with the time of each step in `folder`/clock.jsonl; the former."""
    device = devices.choose_device(resources.device)
    report: loop.Report = Clock(folder) if device.type == "cpu" else lambda _: None
    # a cache of its own: a run that reused teacher outputs of another would look cheaper than it is
    return loop.run(recipe, folder / "model", resources.data_root, device, report, folder / "teachers")
