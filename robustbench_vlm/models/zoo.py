"""A model id -> a model and its card: packaged checkpoints, checkpoint folders, open_clip names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from robustbench_vlm.errors import WeightsError, nearest
from robustbench_vlm.models import checkpoint, openclip
from robustbench_vlm.models.checkpoint import CheckpointCard
from robustbench_vlm.models.clip import Clip

PACKAGED = Path(__file__).parent.parent / "weights"


@dataclass(frozen=True)
class Loaded:
    """A model with what is known about it.

    Attributes:
        id: what was typed.
        model: frozen nothing, eval mode, on the device asked for.
        card: name, defense, parents and fingerprints.
    """

    id: str
    model: Clip
    card: CheckpointCard


def packaged() -> list[str]:
    """Names of the checkpoints that ship with the package."""
    return sorted(path.parent.name for path in PACKAGED.glob("*/card.json"))


def folder_of(name: str) -> Path | None:
    """The checkpoint folder meant by `name`: a path that has a card, or a packaged checkpoint."""
    if (Path(name) / "card.json").is_file():
        return Path(name)
    return PACKAGED / name if name in packaged() else None


def address(name: str) -> str:
    """`name` so that it means the same from any working directory: a user's folder by its full path."""
    folder = folder_of(name)
    return str(folder.resolve()) if folder is not None and folder.parent != PACKAGED else name


def load(name: str, device: torch.device | str = "cpu") -> Loaded:
    """The model called `name`: a packaged name, a checkpoint folder, `ARCH:TAG`, `hf-hub:` or `local-dir:`.

    Raises:
        WeightsError: nothing of that name, or weights that do not fit their card.
    """
    folder = folder_of(name)
    if folder is not None:
        return _from_folder(name, folder, torch.device(device))
    if ":" not in name and name not in openclip.architectures():
        if Path(name).exists():
            raise WeightsError(
                f"model {name!r}", "no card.json in it", "a checkpoint folder that vlmrob wrote"
            )
        known = [*packaged(), "ViT-B-32:openai", "ViT-L-14:openai"]
        raise WeightsError(
            f"model {name!r}", "no such model or folder", "an id, ARCH:TAG or a folder", nearest(name, known)
        )
    model = openclip.load(name).eval().to(device)
    card = checkpoint.describe(
        model, name.replace(":", "_").replace("/", "_"), defense="none", trained_on=None, text_from=name
    )
    return Loaded(name, model, card)


def _from_folder(name: str, folder: Path, device: torch.device) -> Loaded:
    card = checkpoint.read_card(folder)
    model = openclip.build(card.arch, quick_gelu=card.quick_gelu)
    model.preprocess = checkpoint.preprocess(card)
    if model.preprocess.image_size != model.image_size:
        raise WeightsError(
            str(folder / "card.json"),
            f"preprocess.image_size is {model.preprocess.image_size}",
            f"{model.image_size}, the input of {card.arch}",
        )
    model = Clip(
        model.visual, model.language, model.tokenize, model.preprocess, card.logit_scale, model.facts
    )
    checkpoint.fill(
        model.visual, checkpoint.read_state(folder / "image.safetensors"), str(folder / "image.safetensors")
    )
    if card.text_from:
        text = load(card.text_from)
        model.language = text.model.language
        model.facts["trained_tokens"] = text.model.facts.get("trained_tokens")
    else:
        model.facts["trained_tokens"] = checkpoint.fill_text(model.language, folder / "text.safetensors")
    checkpoint.check(model.eval(), card, f"model {name}")
    return Loaded(name, model.to(device), card)
