"""What a recipe needs on this machine, looked for before anything is loaded; torch is not imported."""

from __future__ import annotations

import shlex
from pathlib import Path

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.model import ModelCard
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.data import dataset
from robustbench_vlm.errors import CardError, DataError, InputError, WeightsError
from robustbench_vlm.models import model_ids, public


def missing(recipe: Recipe, data_root: Path) -> list[InputError]:
    """Models that name nothing or no weights, or have none here, and a dataset that is not below the root.

    Weights of open_clip that are not in its cache are downloaded when they are loaded, so they are not
    missing. A dataset of the tiny world is rendered, so it is not missing either.

    Raises:
        CardError: no such dataset, or names or a resize that it does not take.
    """
    found: list[InputError] = []
    for name in recipe.models:
        try:
            _require_model(name)
        except WeightsError as error:
            found.append(error)
    card = reader.read("datasets", recipe.data.dataset, DatasetCard)
    require_data(recipe, card)
    if card.made_by != "tiny" and not (data_root / card.folder).is_dir():
        do = dataset.how_to_get(card, data_root)
        found.append(DataError(f"dataset {card.name}", f"not below {data_root}", str(card.folder), do))
    return found


def require(recipe: Recipe, data_root: Path) -> None:
    """Refuse a recipe whose models or dataset are missing.

    Raises:
        InputError: the message has all that is missing, not only the first.
    """
    found = missing(recipe, data_root)
    if len(found) == 1:
        raise found[0]
    if found:
        lines = "\n  ".join(str(error) for error in found)
        raise InputError(
            f"recipe {recipe.name}", f"{len(found)} inputs are missing", "all", f"see\n  {lines}"
        )


def require_data(recipe: Recipe, card: DatasetCard) -> None:
    """Refuse class names or a resize of a recipe that do not fit its dataset.

    Raises:
        CardError: no such list of names, one for another number of classes, or a resize on a native canvas.
    """
    where = f"recipe {recipe.name}, data"
    if recipe.data.names:
        count = len(reader.class_names(recipe.data.names))
        if count != card.n_classes:
            found = f"names = {recipe.data.names!r} with {count} names"
            raise CardError(where, found, f"the {card.n_classes} of {card.name}", "leave it out")
    if recipe.data.resize != "model" and card.canvas == "native":
        found = f"resize = {recipe.data.resize!r}, and {card.name} has a native canvas"
        raise CardError(where, found, "'model', since its images are not resized", "leave it out")


def _require_model(name: str) -> None:
    model_ids.require(name)
    if model_ids.folder_of(name) is not None:
        return
    if reader.has("models", name):
        card = reader.read("models", name, ModelCard)
        if card.loader == "none" or (card.loader != "open_clip" and not public.here(card)):
            public.require(card)  # says what to download, or that the weights were never published
    elif model_ids.is_weights(name):
        if not Path(name).is_file():
            raise WeightsError(f"model {name}", "no such file", "a file of weights", "check the path")
        if model_ids.run_of_step(name) is None:
            do = f"make one: vlmrob convert {shlex.quote(name)} --arch ARCH:TAG --out DIR"
            raise WeightsError(f"model {name}", "its architecture is not in the file", "a folder with it", do)
    elif name in model_ids.architectures() and not Path(name).is_dir():
        expected = f"ARCH:TAG, such as {name}:random"
        raise WeightsError(f"model {name!r}", "an architecture without weights", expected)
