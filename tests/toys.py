"""A small world for the tests of evaluation: random models, noise images that they label, and short chains.

Images are labelled with the model's own predictions, so every one is right when clean and can be attacked.
"""

from __future__ import annotations

import json
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from robustbench_vlm.backends.backend import Backend
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import layout, miniature
from robustbench_vlm.data.dataset import open_split
from robustbench_vlm.data.loader import as_float
from robustbench_vlm.engine import canonical
from robustbench_vlm.evaluation import cells, measure
from robustbench_vlm.evaluation.cells import EvalSettings, Subject
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.models import checkpoint, openclip
from robustbench_vlm.models.clip import Classifier
from robustbench_vlm.models.text_bank import render, text_bank
from robustbench_vlm.models.zoo import Loaded

NAMES = ("cat", "dog", "ship", "tree", "moon", "fish")
PX = 16

SHORT = {  # full AutoAttack's four stages, with few steps
    "ce": {"attack": "apgd", "loss": "ce", "steps": 4, "rho": 0.75, "restarts": 1, "targets": 0},
    "t": {"attack": "apgd", "loss": "targeted-dlr", "steps": 3, "rho": 0.75, "restarts": 1, "targets": 2},
    "fab": {
        **{"attack": "fab", "steps": 2, "targets": 2, "restarts": 1},
        **{"alpha_max": 0.1, "eta": 1.05, "beta": 0.9},
    },
    "square": {"attack": "square", "queries": 12, "p": 0.8, "restarts": 1},
}
L1 = {
    "l1": {
        **{"attack": "apgd-l1", "loss": "ce", "steps": [2, 2, 3], "radii": [3.0, 2.0, 1.0]},
        **{"restarts": 1, "targets": 0},
    }
}
PGD = {"attack": "pgd", "loss": "ce", "steps": 5, "step_size": "eps/4", "restarts": 1, "random_start": True}


def chain(name, *stages, rows=16, stop="first"):
    """A chain of stages of `SHORT` and `L1`."""
    listed = [{"name": stage, **(SHORT | L1)[stage]} for stage in stages]
    return AttackCard.model_validate(
        {"name": name, "title": name, "rows": rows, "stop": stop, "stage": listed}
    )


def pgd(name="pgd5", rows=16):
    stages = [{"name": name, **PGD}]
    return AttackCard.model_validate(
        {"name": name, "title": name, "rows": rows, "stop": "last", "stage": stages}
    )


def dataset_card(name="toy", names=NAMES, **changes):
    fields = {
        **{"name": name, "title": name.title(), "folder": f"wds_{name}", "n_classes": len(names)},
        **{"size": {"test": 12}, "canvas": "native", "native_px": PX, "names": names},
        **{"templates": ("a photo of a {c}.",), "licence": "none"},
    }
    return DatasetCard.model_validate(fields | changes)


@cache
def model(seed=0):
    """A tiny CLIP with random weights, never trained."""
    clip = openclip.build("vlmrob-tiny").eval()
    if seed:
        make = torch.Generator().manual_seed(seed)
        for parameter in clip.visual.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=make)
    return clip


@cache
def loaded(seed=0, trained_on=("elsewhere",)):
    name = f"random{seed}"
    card = checkpoint.describe(
        model(seed),
        name,
        defense="none",
        trained_on=trained_on,
        text_from="vlmrob-tiny:random",
    )
    return Loaded(name, model(seed), card)


def save_model(folder, seed=0, trained_on=("elsewhere",)):
    found = loaded(seed, trained_on)
    checkpoint.save_folder(folder, found.model, found.card)
    return folder


def pictures(card, n):
    """(n, px, px, 3) uint8, of the native size."""
    px = card.native_px
    return [miniature.picture(f"{card.name}/{i}", f"{card.name}/{i % 5}", px, px) for i in range(n)]


@torch.no_grad()
def predicted(card, images, seed=0):
    """The model's own classes of some pictures."""
    classify = Classifier(model(seed), text_bank(model(seed), render(card.names, card.templates)))
    return canonical.logits(classify, as_float(np.stack(images)), 16).argmax(1).tolist()


def write(card, root, n=12, seed=0, order=None, labels=None):
    """The dataset below `root`, labelled by the model (or by `labels`); `order` permutes it over shards."""
    images = pictures(card, n)
    labels = predicted(card, images, seed) if labels is None else labels
    samples = [
        (miniature.member(i), miniature.encode(images[i], "png", "RGB"), "png", labels[i]) for i in range(n)
    ]
    layout.write_texts(root / card.folder, card.names, card.templates)
    order = range(n) if order is None else order
    layout.write_split(root / card.folder, "test", [samples[i] for i in order], per_shard=5)
    return root


def request(results, *attacks, eps=("4/255",), n=0, **more):
    ladder = tuple(Fraction(text) for text in eps)
    backend = Backend(more.pop("engine", "native"), more.pop("mode", "fast"))
    fields = {"norm": "linf", "seed": 0, "device": torch.device("cpu"), "backend": backend, **more}
    chains = tuple(Chain.of(attack) for attack in attacks)
    return EvalSettings(chains=chains, ladder=ladder, n=n, results=Path(results), **fields)


def subject(card, root, n=0, seed=0, trained_on=("elsewhere",)):
    split = open_split(card, root, "test").subset(n, 0)
    return Subject.of(loaded(seed, trained_on), card, split)


class Before(nn.Module):
    """A real model with something before it."""

    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = inner, change
        self.__dict__.update({name: vars(inner)[name] for name in ("facts", "tokenize", "preprocess")})
        self.image_size, self.logit_scale, self.mean = inner.image_size, inner.logit_scale, inner.mean
        self.language, self.logits = inner.language, inner.logits

    def forward(self, images):
        return self.inner(self.change(images))


def changed(what, change):
    """The subject with a model that is given `change(images)`."""
    holder = type(what.loaded)("changed", Before(model(), change), what.loaded.card)
    found = cells.Subject(holder, what.card, what.images, what.bank)
    found.__dict__["untrained"] = []
    return found


def run(what, order, seen=None):
    """Cells of an evaluation as (path, content); `seen` collects the reports."""
    report = (lambda *line: seen.append(line)) if seen is not None else (lambda *line: None)
    return [(path, json.loads(path.read_text())) for path in measure.evaluate(what, order, report)]


def write_include(folder, datasets=(), attacks=(), **suite):
    """A folder for --include: the cards as TOML, and a suite `toys` of the datasets."""
    facts = {"name": "toys", "title": "Toys", "datasets": [card.name for card in datasets]}
    facts |= {"eps": ["4/255"], "n": 12, **suite}
    for kind, records in (("datasets", datasets), ("attacks", attacks)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for card in records:
            text = toml(card.model_dump(mode="json", exclude_defaults=True))
            (folder / kind / f"{card.name}.toml").write_text(text)
    (folder / "toys.toml").write_text(toml(facts))
    reader.include([])
    return folder


def toml(table):
    """A flat table, with lists of tables, as TOML; JSON scalars and lists are TOML too."""
    lines = [f"{key} = {_value(value)}" for key, value in table.items() if not _tables(value)]
    for key, value in table.items():
        for inner in value if _tables(value) else []:
            lines += [f"\n[[{key}]]", *[f"{k} = {_value(v)}" for k, v in inner.items()]]
    return "\n".join(lines) + "\n"


def _tables(value):
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _value(value):
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_value(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)
