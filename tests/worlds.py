"""A very small world for the tests of models, defenses and training: four classes, tiny random models."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.data import layout
from robustbench_vlm.models import checkpoint, openclip
from robustbench_vlm.models.checkpoint_card import CheckpointCard
from robustbench_vlm.models.clip import Clip

NAMES = ("red", "green", "blue", "grey")
COLOURS = ((200, 60, 60), (60, 190, 70), (60, 70, 200), (128, 128, 128))
TEMPLATES = ("a photo of a {c} square", "a {c} picture")
TRAIN, TEST = 48, 20
PX = 32

CARD = f"""
name = "toy"
title = "Toy: four colours"
folder = "wds_toy"
n_classes = 4
size = {{ train = {TRAIN}, test = {TEST} }}
canvas = "native"
native_px = {PX}
names = {list(NAMES)}
templates = {list(TEMPLATES)}
licence = "none"
"""

RECIPE = {
    "name": "toy-run",
    "title": "A short run",
    "seed": 3,
    "checkpoint_every": 2,
    "data": {"dataset": "toy", "template": "a photo of a {c}"},
    "optim": {"lr": 1e-3, "steps": 6, "warmup": 2, "batch_size": 8},
}
INNER = {"norm": "linf", "eps": "4/255", "steps": 2, "step_size": "2/255"}


@dataclass(frozen=True)
class World:
    """Where everything lies.

    Attributes:
        data: root of the datasets.
        cards: folder for `--include`.
        student, robust, clean: checkpoint folders; the teachers' text tower is the student's.
    """

    root: Path
    data: Path
    cards: Path
    student: str
    robust: str
    clean: str

    def teachers(self, *roles: str) -> dict[str, str]:
        folders = {"robust": self.robust, "clean": self.clean, "anchor": self.student}
        folders |= {"first": self.robust, "second": self.clean}
        return {role: folders.get(role, self.robust) for role in roles}

    def table(self, named: str, *roles: str, **changes) -> dict:
        """A recipe as the table of a TOML file; `changes` replace whole entries, None removes one."""
        table = RECIPE | {"student": self.student, "teachers": self.teachers(*roles), "inner": INNER}
        table = table | {"defense": {"name": named}} | changes
        return {key: value for key, value in table.items() if value is not None}

    def recipe(self, named: str, *roles: str, **changes) -> Recipe:
        return reader.parse(self.table(named, *roles, **changes), Recipe, "recipe of a test")


def encoded(label: int, seed: int) -> bytes:
    noise = np.random.default_rng([label, seed]).normal(0, 40, (PX, PX, 3))
    pixels = np.clip(np.array(COLOURS[label]) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def samples(n: int, start: int):
    return [(f"s{i:07d}", encoded(i % 4, start + i), "png", i % 4) for i in range(n)]


def tilted(arch: str, seed: int, scale: float = 20.0) -> Clip:
    """A model whose image tower is the fixed random one plus noise of `seed`, so that no two are equal."""
    base = openclip.build(arch)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in base.visual.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    model = Clip(base.visual, base.language, base.tokenize, base.preprocess, scale, base.facts)
    return model.eval()


def twin(model: Clip) -> Clip:
    """A copy with an image tower of its own; the text tower is shared."""
    visual = copy.deepcopy(model.visual)
    return Clip(
        visual, model.language, model.tokenize, model.preprocess, model.logit_scale, model.facts
    ).eval()


def tokens_of(model: Clip) -> frozenset[int]:
    sentences = [t.replace("{c}", n) for n in NAMES for t in (*TEMPLATES, "a photo of a {c}")]
    return frozenset(model.tokenize([*sentences, ""]).flatten().tolist())


def describe(model: Clip, name: str, **changes) -> CheckpointCard:
    facts = {"defense": "none", "trained_on": (), "text_from": ""}
    return checkpoint.describe(model, name, **(facts | changes))


def with_mean_rows(model: Clip) -> tuple[Clip, frozenset[int]]:
    """The model as a folder will give it back: token rows of no caption are the mean of the others."""
    ids = tokens_of(model)
    table = dict(model.language.named_parameters())[checkpoint.TOKENS]
    with torch.no_grad():
        where = torch.tensor(sorted(ids))
        table.copy_(checkpoint.spread_rows(table[where], where, model.language))
    return model, ids


def make(root: Path) -> World:
    folder = root / "data" / "wds_toy"
    layout.write_texts(folder, NAMES, TEMPLATES)
    layout.write_split(folder, "train", samples(TRAIN, 0), 20)
    layout.write_split(folder, "test", samples(TEST, 1000), 20)
    (root / "cards" / "datasets").mkdir(parents=True)
    (root / "cards" / "datasets" / "toy.toml").write_text(CARD)
    student, ids = with_mean_rows(tilted("vlmrob-tiny", 1))
    start = root / "start"
    card = describe(student, "start", trained_on=("captions",))
    checkpoint.save_folder(start, student, card, trained_tokens=ids)
    for name, arch, seed in (("robust", "vlmrob-tiny-teacher", 2), ("clean", "vlmrob-tiny", 3)):
        own = tilted(arch, seed, scale=15.0)
        teacher = Clip(own.visual, student.language, own.tokenize, own.preprocess, 15.0, own.facts)
        known = describe(teacher, name, text_from=str(start), trained_on=("captions", f"{name}-images"))
        checkpoint.save_folder(root / name, teacher, known)
    return World(root, root / "data", root / "cards", str(start), str(root / "robust"), str(root / "clean"))


class Linear(torch.nn.Module):
    """A real encoder small enough for a hand calculation: images (B, 3, 1, 1) times a (3, D) matrix."""

    image_size = 1
    rows_apart = True

    def __init__(self, seed: int, logit_scale: float, width: int = 3) -> None:
        super().__init__()
        self.logit_scale = logit_scale
        numbers = np.random.default_rng(seed).normal(size=(3, width))
        self.weight = torch.nn.Parameter(torch.tensor(numbers, dtype=torch.float64))

    def forward(self, images):
        return images.flatten(1) @ self.weight

    def text(self, sentences):
        raise NotImplementedError


def unit_rows(seed: int, rows: int, width: int) -> torch.Tensor:
    numbers = np.random.default_rng(seed).normal(size=(rows, width))
    return torch.tensor(numbers / np.linalg.norm(numbers, axis=1, keepdims=True))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cosines_by_hand(encoder: Linear, bank: torch.Tensor, images: torch.Tensor) -> np.ndarray:
    z = images.numpy().reshape(len(images), -1) @ encoder.weight.detach().numpy()
    return (z / np.sqrt((z**2).sum(-1, keepdims=True))) @ bank.numpy().T


def kl_by_hand(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return p * (np.log(p) - np.log(q))
