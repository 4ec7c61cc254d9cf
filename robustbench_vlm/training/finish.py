"""The checkpoint folder that a finished run leaves behind: weights, and a card of how they were made."""

from __future__ import annotations

from pathlib import Path

from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.models import checkpoint, zoo
from robustbench_vlm.models.checkpoint_card import Parent
from robustbench_vlm.models.interpolation import interpolated
from robustbench_vlm.training.setup import Setup


def write_checkpoint_folder(out: Path, setup: Setup) -> None:
    """Write the checkpoint folder: merged and interpolated weights first, the card last."""
    recipe = setup.recipe
    model = setup.adapters.merged(setup.model) if setup.adapters else setup.model
    if recipe.interpolation < 1:
        model = interpolated(zoo.load(recipe.student, setup.device).model, model, recipe.interpolation)
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
