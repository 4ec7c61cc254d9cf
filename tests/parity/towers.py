"""Fixed weights in one file of open_clip's naming, which both sides load by their own ways.

A randomly initialised model says the same class to nearly every image, since its embeddings share one
large direction, and a comparison of its predictions proves nothing. So the last projections of both towers
are followed by a linear map, found once on generated pictures and sentences, that takes out that direction
and gives the next few the same variance. It is part of the weights.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data.loader import as_float
from robustbench_vlm.data.miniature import picture
from robustbench_vlm.models import openclip, zoo
from robustbench_vlm.models.clip import Clip

SCALE = 100.0  # of the logits: upstream's constant
DIRECTIONS = 24  # kept by the map
PICTURES, SENTENCES = 96, 192
SHALLOW = "parity-ViT-B-32-shallow-text"  # ViT-B-32 whose text tower can read 80,000 sentences without a GPU
CONFIG = {
    "embed_dim": 512,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}


@dataclass(frozen=True)
class Tower:
    """A model that is compared.

    Attributes:
        arch: open_clip's name.
        images: number of them for each dataset.
        sentences: prompt packs with more of them are left out for time; 0 for no bound.
    """

    name: str
    arch: str
    images: int = 64
    sentences: int = 0


TOWERS = (
    Tower("tiny", "vlmrob-tiny"),
    Tower("shallow", SHALLOW, images=24),
    Tower("vit-b-32", "ViT-B-32-quickgelu", images=24, sentences=110),
)


def register(folder: Path) -> None:
    """Make the architectures that are not open_clip's own known to it, by files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{SHALLOW}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder)
    openclip.architectures()


def weights(tower: Tower, folder: Path) -> Path:
    """The file of the fixed weights, written if it is not there."""
    path = folder / f"{tower.name}.safetensors"
    if not path.exists():
        model = openclip.build(tower.arch)
        image, text = model.visual.state_dict(), model.language.net.state_dict()
        image["proj"] = image["proj"] @ evened(_pictures(model)).T
        text["text_projection"] = text["text_projection"] @ evened(_sentences(model)).T
        state = {f"visual.{name}": value for name, value in image.items()} | dict(text)
        state["logit_scale"] = torch.tensor(math.log(SCALE))
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def loaded(tower: Tower, path: Path) -> Clip:
    """Our model, as `--model FILE --arch ARCH:TAG` loads it."""
    return zoo.load(str(path), arch=f"{tower.arch}:random").model


def evened(embeddings: Tensor) -> Tensor:
    """(D, D): takes the mean direction of (N, D) embeddings out, and evens the spread of what is left.

    `DIRECTIONS` are kept, each with variance 1 / D on the given embeddings.
    """
    found = embeddings.double()
    mean = found.mean(0)
    mean = mean / mean.norm()
    rest = found - found @ mean[:, None] * mean
    _, spread, axes = torch.linalg.svd(rest, full_matrices=False)
    kept = axes[:DIRECTIONS]
    scale = math.sqrt(len(found) / found.shape[1]) / spread[:DIRECTIONS]
    noise = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(found.shape[1], DIRECTIONS, generator=noise, dtype=torch.float64))[0]
    even = turn @ (scale[:, None] * kept)
    return (even - even @ mean[:, None] * mean).float()


def _pictures(model: Clip) -> Tensor:
    side = model.image_size
    pixels = [
        torch.from_numpy(picture(f"towers/{i}", f"towers/kind {i}", side, side)) for i in range(PICTURES)
    ]
    with torch.no_grad():
        return torch.cat([model(part) for part in as_float(torch.stack(pixels).numpy()).split(32)])


def _sentences(model: Clip) -> Tensor:
    known: dict[str, Any] = {}
    for name in reader.names("datasets"):
        known |= dict.fromkeys(reader.read("datasets", name, DatasetCard).names)
    names = list(known)[:: max(1, len(known) // SENTENCES)]
    return model.text([f"a photo of a {name}." for name in names])
