"""A model id -> a model and its card: checkpoint folders, open_clip names, public models, weights files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from robustbench_vlm import tensor_files
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.model import ModelCard
from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models import checkpoint, checkpoint_card, model_ids, openclip, public
from robustbench_vlm.models.checkpoint_card import CheckpointCard
from robustbench_vlm.models.clip import Clip
from robustbench_vlm.models.foreign import weights_file

TEXT_PROMPTS = "prompts.student.text."
"""Before the names of a student's text prompts in a saved step (`training.setup`)."""


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

    def to(self, device: torch.device | str) -> Loaded:
        """The same, with the model on `device`."""
        return replace(self, model=self.model.to(device))


def address(name: str) -> str:
    """The model id that means the same from every working directory: a user's folder by its full path."""
    if name.startswith(model_ids.LOCAL):
        return model_ids.LOCAL + str(Path(name.removeprefix(model_ids.LOCAL)).resolve())
    folder = model_ids.folder_of(name)
    return str(folder.resolve()) if folder is not None and folder.parent != model_ids.PACKAGED else name


def arch_of(name: str) -> str:
    """The architecture of the model called `name`, without loading it; empty if only a download shows it."""
    folder = model_ids.folder_of(name)
    if folder is not None:
        return checkpoint_card.read_card(folder).arch
    run = model_ids.run_of_step(name)
    if run is not None and model_ids.folder_of(str(run)) is not None:
        return arch_of(str(run))
    if reader.has("models", name):
        return arch_of(reader.read("models", name, ModelCard).base)
    if name.startswith(openclip.SCHEMAS):  # its config must be downloaded, unless a card names it
        known = (reader.read("models", card, ModelCard) for card in reader.names("models"))
        return next((arch_of(card.base) for card in known if card.source == name), "")
    return name.partition(":")[0]


def load(name: str, device: torch.device | str = "cpu", arch: str = "") -> Loaded:
    """The model called `name`.

    Args:
        name: a packaged name, a checkpoint folder, `ARCH:TAG`, `hf-hub:`, `local-dir:`, the name of a public
            checkpoint, a saved step of a finished run (`RUN/checkpoints/step_0000200.safetensors`), a weights
            file (`.pt`, `.pth.tar`, `.safetensors`), a folder of transformers or one in the layout of
            open_clip.
        device: where it is put after it was compared with its card.
        arch: of a weights file, the model that it was made from: `ARCH:TAG`, `local-dir:DIR` or another model
            id. A file with both towers needs no other weights, so `ARCH` is enough for it.

    Raises:
        WeightsError: nothing of that name, or weights that do not fit their card or architecture.
    """
    return _load(name, arch, ()).to(device)


def _load(name: str, arch: str, readers: tuple[Path, ...]) -> Loaded:
    """The model called `name`, on the CPU.

    Args:
        name: as for `load`.
        arch: as for `load`.
        readers: the checkpoint folders whose cards led to this name, which may not cause a download.
    """
    model_ids.require(name)
    folder = model_ids.folder_of(name)
    if folder is not None:
        return _of_folder(name, folder, readers)
    run = model_ids.run_of_step(name)
    if run is not None:
        return _of_step(name, run, readers)
    if reader.has("models", name):
        return _public(reader.read("models", name, ModelCard), readers)
    if model_ids.is_weights(name):
        return _from_file(name, arch)
    if model_ids.is_transformers(Path(name)):
        made = weights_file.from_transformers(Path(name))
        return _described(name, made, text_from=str(Path(name).resolve()))
    if model_ids.is_open_clip(Path(name)):
        name = f"{model_ids.LOCAL}{name}"
    model = openclip.load(name, network=not readers).eval()
    plain = _plain(Path(name.removeprefix(model_ids.LOCAL)).resolve().name if _is_local(name) else name)
    card = checkpoint.describe(model, plain, defense="none", trained_on=None, text_from=address(name))
    return Loaded(name, model, card)


def _is_local(name: str) -> bool:
    return name.startswith(model_ids.LOCAL)


def _of_folder(name: str, folder: Path, readers: tuple[Path, ...]) -> Loaded:
    """The model of a checkpoint folder, compared with its card."""
    card = checkpoint_card.read_card(folder)
    model = open_folder(name, folder, card, readers)
    return Loaded(name, model, checkpoint.of_today(card, model))


def _of_step(name: str, run: Path, readers: tuple[Path, ...]) -> Loaded:
    """The student of a finished run at a saved step: that image tower and prompts, and all else of the run.

    Raises:
        WeightsError: the run is not finished, so there is no card to read the step with, or the step is of
            another run or of adapters that were not merged yet.
    """
    if not (run / "card.json").is_file():
        found = f"a saved step of {run}, which is no finished run"
        raise WeightsError(f"model {name}", found, "one of a finished run", "finish it first")
    last = _of_folder(str(run), run, readers)
    step = tensor_files.read(Path(name), "train the run again")
    if step.facts.get("recipe") != last.card.training.get("recipe_sha256"):
        raise WeightsError(f"model {name}", "a step of another recipe", f"one of {run}")
    tower = {k.removeprefix("student."): v for k, v in step.tensors.items() if k.startswith("student.")}
    if any(".lora_" in part for part in tower):
        found = "a saved step with adapters, which are merged at the end of a run"
        raise WeightsError(f"model {name}", found, "a run without [lora]", f"name the whole run {run}")
    checkpoint.fill(last.model.visual, tower, name)
    learned = {k.removeprefix(TEXT_PROMPTS): v for k, v in step.tensors.items() if k.startswith(TEXT_PROMPTS)}
    checkpoint.fill_prompts(last.model.language, learned, name)
    card = checkpoint.describe(
        last.model,
        f"{last.card.name}-{Path(name).stem}",
        defense=last.card.defense,
        trained_on=last.card.trained_on,
        text_from=last.card.text_from or address(str(run)),
        parents=last.card.parents,
        recipe=last.card.recipe,
        training={**last.card.training, "step": int(step.facts["step"])},
    )
    return Loaded(name, last.model, card)


def _plain(name: str) -> str:
    """A name for tables and folders, from a model id."""
    return name.replace(":", "_").replace("/", "_")


def _from_file(name: str, arch: str) -> Loaded:
    if not arch:
        expected = "--arch ARCH:TAG or local-dir:DIR, the model that it was made from"
        do = f"in a recipe, name the folder that this makes: {model_ids.CONVERT}"
        raise WeightsError(f"model {name}", "its architecture is not in the file", expected, do)
    made, _ = read_file(Path(name), arch)
    if made.old:
        found = f"an old pickle ({', '.join(made.old)})"
        raise WeightsError(
            f"model {name}", found, "one of tensors alone", f"make it one: {model_ids.CONVERT}"
        )
    return _described(name, made, text_from="" if made.own_text else address(arch))


def read_file(
    path: Path, arch: str, limits: Mapping[str, int] | None = None
) -> tuple[weights_file.Foreign, Loaded | None]:
    """The model of a weights file, and the loaded model whose text tower it has; `None` if it has its own.

    Args:
        path: the file.
        arch: as for `load`.
        limits: `memory` in bytes and `seconds` of the process that reads a pickle.

    Raises:
        WeightsError: unreadable, of another architecture, or without a text tower where `arch` has none.
    """
    found, where = weights_file.state_of(path, limits), str(path)
    skeleton = _skeleton(arch) if weights_file.may_be_whole(found) else None
    if skeleton is not None:
        made = weights_file.from_state(found, skeleton, where)
        if made.own_text:
            return made, None
    base = load(arch)
    return weights_file.from_state(found, base.model, where), base


def _skeleton(arch: str) -> Clip | None:
    """The architecture and preprocessing of `arch` with random weights; `None` where it is no such id."""
    if model_ids.is_open_clip(Path(arch)):
        arch = f"{model_ids.LOCAL}{arch}"
    if _is_local(arch):
        return openclip.build(arch)
    name, _, tag = arch.partition(":")
    if name not in model_ids.architectures() or model_ids.folder_of(arch) is not None:
        return None
    return openclip.build(name, tag="" if tag == "random" else tag)


def _described(name: str, made: weights_file.Foreign, text_from: str) -> Loaded:
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
    return Loaded(name, made.model, card)


def _public(known: ModelCard, readers: tuple[Path, ...]) -> Loaded:
    """A public checkpoint, with defense, radius and training data of its card."""
    found = _public_weights(known, readers)
    card = checkpoint.describe(
        found.model,
        known.name,
        defense=known.defense,
        trained_on=known.trained_on,
        text_from=found.card.text_from,
        recipe={"inner": {"eps": known.eps, "norm": known.norm}} if known.eps else {},
        training={"source": known.source, **found.card.training},
    )
    return Loaded(known.name, found.model, card)


def _public_weights(known: ModelCard, readers: tuple[Path, ...]) -> Loaded:
    if known.loader == "open_clip" and not public.here(known):
        if not known.source.startswith(model_ids.HUB):
            return _load(known.source, "", readers)
        try:  # open_clip's own cache, or the hub
            return _load(known.source, "", readers)
        except WeightsError as error:
            found = "its weights are neither on this machine nor to be had from the hub"
            raise WeightsError(f"model {known.name}", found, do=public.fetch(known)) from error
    folder = public.require(known)
    if (folder / "card.json").is_file():
        return _load(str(folder), "", readers)
    if known.loader == "open_clip":
        return _load(f"{model_ids.LOCAL}{folder}", "", readers)
    return _load(str(folder / known.file), known.base, readers)


def open_folder(name: str, folder: Path, card: CheckpointCard, readers: tuple[Path, ...] = ()) -> Clip:
    """The model of a checkpoint folder on the CPU, compared with the hashes and the canary in `card`.

    Args:
        name: the model id, for messages.
        folder: the checkpoint folder.
        card: its card, without canary where none is to be compared.
        readers: the checkpoint folders whose cards led to this one.

    Raises:
        WeightsError: weights that do not fit the card, or a card that names its own folder or a download.
    """
    text = None
    here = folder.resolve()
    if card.text_from:
        where = f"{folder / 'card.json'}, text_from"
        if here in readers:
            raise WeightsError(where, f"{card.text_from!r:.60} leads back to this folder", "another model")
        if model_ids.is_weights(card.text_from) and model_ids.folder_of(card.text_from) is None:
            raise WeightsError(where, f"{card.text_from!r:.60} is a weights file", "a model or its folder")
        try:
            text = _load(card.text_from, "", (*readers, here)).model
        except WeightsError as error:
            raise WeightsError(where, str(error)) from error
    model = checkpoint.open_folder(folder, card, text)
    checkpoint.check(model, card, f"model {name}")
    return model
