"""A model id -> a model and its card: checkpoint folders, open_clip names, public models, weights files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.model import ModelCard
from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models import checkpoint, model_ids, openclip, public
from robustbench_vlm.models.checkpoint import CheckpointCard
from robustbench_vlm.models.clip import Clip
from robustbench_vlm.models.foreign import sandbox, weights_file


@dataclass(frozen=True)
class Loaded:
    """A model with what is known about it.

    Attributes:
        id: the model id.
        model: in eval mode; its image tower is not frozen.
        card: name, defense, parents and fingerprints.
    """

    id: str
    model: Clip
    card: CheckpointCard


def address(name: str) -> str:
    """The model id that means the same from every working directory: a user's folder by its full path."""
    folder = model_ids.folder_of(name)
    return str(folder.resolve()) if folder is not None and folder.parent != model_ids.PACKAGED else name


def arch_of(name: str) -> str:
    """The architecture of the model called `name`, without loading it; empty if only a download shows it."""
    folder = model_ids.folder_of(name)
    if folder is not None:
        return checkpoint.read_card(folder).arch
    if name in reader.names("models"):
        return arch_of(reader.read("models", name, ModelCard).base)
    if name.startswith(openclip.SCHEMAS):  # its config must be downloaded, unless a card names it
        known = (reader.read("models", card, ModelCard) for card in reader.names("models"))
        return next((arch_of(card.base) for card in known if card.source == name), "")
    return name.partition(":")[0]


def load(name: str, device: torch.device | str = "cpu", arch: str = "") -> Loaded:
    """The model called `name`.

    Args:
        name: a packaged name, a checkpoint folder, `ARCH:TAG`, `hf-hub:`, `local-dir:`, the name of a public
            checkpoint, a weights file (`.pt`, `.pth.tar`, `.safetensors`) or a folder of transformers.
        device: where it is put after it was compared with its card.
        arch: of a weights file, the model that it was made from.

    Raises:
        WeightsError: nothing of that name, or weights that do not fit their card or architecture.
    """
    model_ids.require(name)
    folder = model_ids.folder_of(name)
    if folder is not None:
        card = checkpoint.read_card(folder)
        return Loaded(name, open_folder(name, folder, card).to(device), card)
    if name in reader.names("models"):
        return _public(reader.read("models", name, ModelCard), device)
    if model_ids.is_weights(name):
        return _from_file(name, device, arch)
    if Path(name).is_dir() and model_ids.is_transformers(Path(name)):
        made = weights_file.from_transformers(Path(name))
        return _described(name, made, device, text_from=str(Path(name).resolve()))
    model = openclip.load(name).eval().to(device)
    card = checkpoint.describe(model, _plain(name), defense="none", trained_on=None, text_from=name)
    return Loaded(name, model, card)


def _plain(name: str) -> str:
    """A name for tables and folders, from a model id."""
    return name.replace(":", "_").replace("/", "_")


def _from_file(name: str, device: torch.device | str, arch: str) -> Loaded:
    if not arch:
        expected = "--arch ARCH:TAG, the model that it was made from"
        do = f"in a recipe, name the folder that this makes: {weights_file.CONVERT}"
        raise WeightsError(f"model {name}", "its architecture is not in the file", expected, do)
    sandbox.require_file(Path(name))  # before the base is built
    made = weights_file.from_file(Path(name), load(arch).model)
    if made.old:
        found = f"an old pickle ({', '.join(made.old)})"
        raise WeightsError(
            f"model {name}", found, "one of tensors alone", f"make it one: {weights_file.CONVERT}"
        )
    return _described(name, made, device, text_from="" if made.own_text else address(arch))


def _described(name: str, made: weights_file.Foreign, device: torch.device | str, text_from: str) -> Loaded:
    stem = Path(name).name
    if model_ids.is_weights(name):
        stem = stem.removesuffix(".tar").rpartition(".")[0]
    card = checkpoint.describe(
        made.model,
        _plain(stem),
        defense="unknown",
        trained_on=None,
        text_from=text_from,
        training={"scheme": made.scheme},
    )
    return Loaded(name, made.model.to(device), card)


def _public(known: ModelCard, device: torch.device | str) -> Loaded:
    """A public checkpoint, with defense, radius and training data of its card."""
    found = _public_weights(known)
    card = checkpoint.describe(
        found.model,
        known.name,
        defense=known.defense,
        trained_on=known.trained_on,
        text_from=found.card.text_from,
        recipe={"inner": {"eps": known.eps, "norm": known.norm}} if known.eps else {},
        training={"source": known.source, **found.card.training},
    )
    return Loaded(known.name, found.model.to(device), card)


def _public_weights(known: ModelCard) -> Loaded:
    if known.loader == "open_clip" and not public.here(known):
        if not known.source.startswith(public.HUB):
            return load(known.source)
        try:  # open_clip's own cache, or the hub
            return load(known.source)
        except WeightsError as error:
            found = "its weights are neither on this machine nor to be had from the hub"
            raise WeightsError(f"model {known.name}", found, do=public.fetch(known)) from error
    folder = public.require(known)
    if (folder / "card.json").is_file():
        return load(str(folder))
    if known.loader == "open_clip":
        return load(f"local-dir:{folder}")
    return load(str(folder / known.file), arch=known.base)


def open_folder(name: str, folder: Path, card: CheckpointCard) -> Clip:
    """The model of a checkpoint folder on the CPU, compared with the hashes and the canary in `card`.

    Raises:
        WeightsError: weights that do not fit the card.
    """
    text = load(card.text_from).model if card.text_from else None
    model = checkpoint.open_folder(folder, card, text)
    checkpoint.check(model, card, f"model {name}")
    return model
