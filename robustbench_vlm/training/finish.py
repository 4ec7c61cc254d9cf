"""The checkpoint folder that a finished run leaves behind: weights, and a card of how they were made."""

from __future__ import annotations

from pathlib import Path

from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.models import checkpoint, zoo
from robustbench_vlm.models.checkpoint_card import Parent
from robustbench_vlm.models.clip import Clip
from robustbench_vlm.models.interpolation import interpolated
from robustbench_vlm.training import fsdp
from robustbench_vlm.training.prepare import attach_adapters
from robustbench_vlm.training.setup import Setup


def write_checkpoint_folder(out: Path, setup: Setup) -> None:
    """Write the checkpoint folder: merged and interpolated weights first, the card last.

    All processes call it, and the first one writes.
    """
    recipe = setup.recipe
    model = _trained(setup)
    if model is None:
        return
    if recipe.interpolation < 1:
        model = interpolated(zoo.load(recipe.student, model.device).model, model, recipe.interpolation)
    models = [("student", setup.student), *setup.teachers.items()]
    models += [(role, phase.loaded) for role, phases in setup.phases.items() for phase in phases]
    parents = tuple(
        Parent(
            role=role, model=loaded.card.name, sha256=loaded.card.sha256, trained_on=loaded.card.trained_on
        )
        for role, loaded in models
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


def _trained(setup: Setup) -> Clip | None:
    """The student with its trained weights, adapters merged; `None` in all processes but the first.

    Sharded weights are gathered into another copy of the student, on the CPU.
    """
    model, adapters, recipe, first = setup.model, setup.adapters, setup.recipe, setup.share.world.first
    if setup.sharded:
        weights = fsdp.on_first(model.visual.state_dict(), first)
        if first:
            model = zoo.load(recipe.student).model
            adapters = attach_adapters(model, recipe)
            checkpoint.fill(model.visual, weights, f"student {recipe.student}")
    if not first:
        return None
    return adapters.merged(model) if adapters else model


def interpolate_folder(finished: Path, recipe: Recipe, share: float, out: Path) -> None:
    """Write the checkpoint folder that `recipe` would leave with another `interpolation`, without training.

    Args:
        finished: checkpoint folder of `recipe`, whose interpolation is 1.
        recipe: of that folder.
        share: of the trained weights.
        out: the new checkpoint folder.
    """
    trained = zoo.load(str(finished))
    model = interpolated(zoo.load(recipe.student).model, trained.model, share)
    other = recipe.model_copy(update={"interpolation": share})
    card = checkpoint.describe(
        model,
        recipe.name,
        defense=trained.card.defense,
        trained_on=trained.card.trained_on,
        text_from=trained.card.text_from,
        parents=trained.card.parents,
        recipe=other.model_dump(mode="json"),
        training={**trained.card.training, "recipe_sha256": other.fingerprint},
    )
    checkpoint.save_folder(out, model, card)
