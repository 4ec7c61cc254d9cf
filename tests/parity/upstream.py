"""Predictions of LAION-AI/CLIP_benchmark and ours: every dataset card, both prompt packs, the same weights.

It is driven as a black box on the folders of `vlmrob data make`: its loader of models, its reader of
webdatasets, its zero-shot classifier and its evaluation loop, in fp32. `make .venv/.parity` installs its
package and what it needs; `--clip-benchmark CHECKOUT` takes another version of it:

    python tests/parity/upstream.py

Every comparison is appended to `benchmarks/parity-suites.jsonl` as soon as it is made, so a killed run goes
on where it was, and `benchmarks/parity-suites.md` is written from what is there. Exit code 1 if an argmax
differs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import suites_page
import torch
import towers
from PIL import Image
from torch import Tensor
from towers import TOWERS, Tower

from robustbench_vlm import store
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.protocol import PromptPack
from robustbench_vlm.data import dataset, layout, miniature
from robustbench_vlm.data.dataset import Split
from robustbench_vlm.data.loader import as_float
from robustbench_vlm.engine import canonical
from robustbench_vlm.models.clip import Classifier, Clip
from robustbench_vlm.models.text_bank import render, text_bank

REPOSITORY = Path(__file__).parents[2]
RECORDS = REPOSITORY / "benchmarks" / "parity-suites.jsonl"
NEEDED = ("webdataset", "requests")
INSTALL = "make .venv/.parity"
DRIVEN = ("datasets/builder.py", "metrics/zeroshot_classification.py", "models/open_clip.py")
SPLIT = "test"
ROWS = 32  # of every model call of ours
BATCH = 64  # of theirs: its own default
PACKS = ("clip", "tecoa")
SHOWN = 8  # differing images that a record names
KEYS = {
    "caltech101": ("caltech101_vtab", "caltech101"),
    "cars": ("", "cars"),
    "cifar10": ("", "cifar10"),
    "cifar100": ("", "cifar100"),
    "country211": ("country211", "country211"),
    "dtd": ("", "dtd"),
    "eurosat": ("eurosat", "eurosat"),
    "fgvc_aircraft": ("", "fgvc_aircraft"),
    "flowers102": ("flowers", "flowers"),
    "food101": ("", "food101"),
    "imagenet": ("imagenet1k", "imagenet1k"),
    "imagenet-a": ("imagenet-a", "imagenet1k"),
    "imagenet-r": ("imagenet-r", "imagenet1k"),
    "imagenet-sketch": ("imagenet1k", "imagenet1k"),
    "imagenet-v2": ("imagenet1k", "imagenet1k"),
    "oxford_pets": ("pets", "pets"),
    "pcam": ("pcam", "pcam"),
    "stl10": ("", "stl10"),
    "sun397": ("", "sun397"),
}
"""Card -> keys of upstream's own lists of names and templates; it cuts those of ImageNet-A and -R in code."""


def installed() -> Path:
    """The folder that holds the installed package."""
    found = importlib.util.find_spec("clip_benchmark")
    if found is None or found.origin is None:
        raise SystemExit(f"CLIP_benchmark is not installed; type: {INSTALL}")
    return Path(found.origin).parents[1]


class Upstream:
    """A checkout of CLIP_benchmark, or the folder of its package."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "clip_benchmark" / "datasets" / "builder.py").is_file():
            raise SystemExit(f"{folder}: no checkout of LAION-AI/CLIP_benchmark")
        if absent := [name for name in NEEDED if not importlib.util.find_spec(name)]:
            raise SystemExit(f"CLIP_benchmark needs {', '.join(absent)}; type: {INSTALL}")
        sys.path.insert(0, str(folder))
        self.folder = folder
        self.builder: Any = importlib.import_module("clip_benchmark.datasets.builder")
        self.metric: Any = importlib.import_module("clip_benchmark.metrics.zeroshot_classification")
        self.models: Any = importlib.import_module("clip_benchmark.models")
        self.metric.tqdm = iter  # no progress bars
        self.known: dict[Any, Tensor] = {}

    def model(self, tower: Tower, weights: Path) -> Any:
        """(model, transform, tokenizer) of a weights file, by its own loader."""
        net, transform, tokenizer = self.models.load_clip(
            model_type="open_clip",
            model_name=tower.arch,
            pretrained=str(weights),
            cache_dir=None,
            device="cpu",
        )
        return net.eval(), transform, tokenizer

    def read(self, folder: Path, transform: Callable[[Image.Image], Tensor]) -> tuple[Any, list[Any]]:
        """The dataset of a folder by its own reader, and all its batches of (images, labels)."""
        found = self.builder.build_dataset(
            f"wds/{folder.name}", root=str(folder), transform=transform, split=SPLIT
        )
        batched = torch.utils.data.DataLoader(found.batched(BATCH), batch_size=None, num_workers=0)
        return found, list(batched)

    def bank(self, tower: str, model: Any, tokenizer: Any, found: Any) -> Tensor:
        """(D, C) of the names and sentences that it read; the same lists are encoded once."""
        key = tower, tuple(found.classes), tuple(found.templates)
        if key not in self.known:
            self.known[key] = self.metric.zero_shot_classifier(
                model, tokenizer, found.classes, found.templates, "cpu", amp=False
            )
        return self.known[key]

    def lists(self, card: DatasetCard) -> dict[str, bool | None]:
        """Whether the card's names and templates are those of its own lists; None where it has none."""
        names_key, templates_key = KEYS.get(card.name, ("", ""))
        data = self.folder / "clip_benchmark" / "datasets"
        names = store.read_json(data / "en_classnames.json")
        templates = store.read_json(data / "en_zeroshot_classification_templates.json")
        listed = self._cut(names_key) if names_key.startswith("imagenet-") else names.get(names_key)
        return {
            "names": None if listed is None else list(card.names) == listed,
            "templates": list(card.templates) == templates[templates_key] if templates_key else None,
        }

    def _cut(self, key: str) -> list[str]:
        """The 200 names that its loader of a class-per-folder tree leaves of a thousand."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "n").mkdir()
            Image.new("RGB", (8, 8)).save(Path(folder) / "n" / "0.png")
            return list(self.builder.build_dataset(key, root=folder, download=False).classes)


@dataclass(frozen=True)
class Side:
    """One card's folder of one pack as both sides take it: names and sentences, and the text bank of ours."""

    pack: str
    names: tuple[str, ...]
    templates: tuple[str, ...]
    folder: Path


def main() -> int:
    """Make what is missing, then the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clip-benchmark", type=Path, help="a checkout; the package by default")
    parser.add_argument("--page", action="store_true", help="only write the page from what is there")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--work", type=Path, help="folder for weights and generated images (1.5 GB)")
    parser.add_argument("--towers", nargs="+", default=[tower.name for tower in TOWERS])
    parser.add_argument("--cards", nargs="+", default=all_cards())
    parser.add_argument("--images", type=int, default=0, help="of each dataset, instead of the model's own")
    typed = parser.parse_args()
    if not typed.page:
        typed.clip_benchmark = typed.clip_benchmark or installed()
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as temporary:
            make(typed, typed.work or Path(temporary))
    records = list(store.records(typed.records))
    store.write(typed.records.with_suffix(".md"), suites_page.rendered(records, all_cards()).encode())
    broken = suites_page.broken(records)
    sys.stdout.write("".join(f"{line}\n" for line in broken or ["every argmax is equal"]))
    return 1 if broken else 0


def all_cards() -> list[str]:
    """The datasets of the field, without the tiny world's."""
    return [name for name in reader.names("datasets") if not name.startswith("tiny")]


def make(typed: argparse.Namespace, work: Path) -> None:
    """Append the record of every comparison that is not there yet."""
    upstream = Upstream(typed.clip_benchmark.resolve())
    os.environ["VLMROB_CACHE"] = str(work / "cache")  # text banks of this run only
    towers.register(work / "configs")
    store.mend(typed.records)
    there = {record["unit"] for record in store.records(typed.records)}
    source = about(upstream)
    for tower in (tower for tower in TOWERS if tower.name in typed.towers):
        missing = [name for name in typed.cards if f"{tower.name}/{name}" not in there]
        if not missing:
            continue
        path = towers.weights(tower, work)
        ours, theirs = towers.loaded(tower, path), upstream.model(tower, path)
        for name in missing:
            began = time.monotonic()
            card = reader.read("datasets", name, DatasetCard)
            count = typed.images or tower.images
            record = compared(upstream, tower, ours, theirs, card, work / f"data-{count}", count)
            told = {"unit": f"{tower.name}/{name}", "tower": tower.name, "arch": tower.arch, "card": name}
            told["lists"] = upstream.lists(card)
            store.append(typed.records, {**told, **record, "from": source})
            spent = time.monotonic() - began
            seen = ", ".join(f"{p['pack']} {p['equal']} of {record['images']}" for p in record["packs"])
            sys.stdout.write(f"{tower.name}/{name}: {seen or 'no pack'} equal, {spent:.0f} s\n")
            sys.stdout.flush()


def sides(card: DatasetCard, root: Path, count: int, bound: int) -> Iterator[Side]:
    """The card's folder under each prompt pack; packs with more than `bound` sentences are left out."""
    folder = miniature.make(card, root, n=count, split=SPLIT)
    opened = dataset.open_split(card, root, SPLIT).card  # with its names, where the card leaves them open
    for name in PACKS:
        pack = reader.read("prompts", name, PromptPack)
        names, templates = pack.words(card.name, opened.names, opened.templates)
        if bound and len(names) * len(templates) > bound:
            continue
        place = root / f"{name}-{card.folder}"
        layout.write_texts(place, names, templates)
        if not (place / SPLIT).exists():
            (place / SPLIT).symlink_to((folder / SPLIT).resolve())
        yield Side(name, names, templates, place)


def compared(
    upstream: Upstream, tower: Tower, ours: Clip, theirs: Any, card: DatasetCard, root: Path, count: int
) -> dict[str, Any]:
    """The record of one model on one dataset.

    The images pass through each side once, with the classes of both packs beside each other.
    """
    net, transform, tokenizer = theirs
    found = list(sides(card, root, count, tower.sentences))
    if not found:
        return {"images": 0, "packs": []}
    read = [upstream.read(side.folder, transform) for side in found]
    batches = read[0][1]
    banks = [upstream.bank(tower.name, net, tokenizer, one) for one, _ in read]
    said, labels = upstream.metric.run_classification(net, torch.cat(banks, 1), batches, "cpu", amp=False)
    split = dataset.open_split(card, root, SPLIT)
    own = [text_bank(ours, render(side.names, side.templates)) for side in found]
    pixels, logits = predicted(ours, as_upstream(split), torch.cat(own))
    inputs = torch.cat([images for images, _ in batches])
    sizes = [len(side.names) for side in found]
    record = {
        "images": len(split),
        "input": float((ours._prepared(pixels) - inputs).abs().max()),  # what the towers are given
        "labels equal": labels.tolist() == split.labels.tolist(),
        "packs": [
            {
                "pack": side.pack,
                "classes": len(side.names),
                "templates": len(side.templates),
                "sentences apart": len({tuple(group) for group in render(side.names, side.templates)}),
                "texts equal": (one.classes, one.templates) == (list(side.names), list(side.templates)),
                "bank": float((bank.T - mine).abs().max()),
                **told(split.keys, ours_said, theirs_said),
            }
            for side, (one, _), bank, mine, ours_said, theirs_said in zip(
                found, read, banks, own, logits.split(sizes, 1), said.split(sizes, 1), strict=True
            )
        ],
    }
    if (split.card.canvas, split.card.resize) != ("model", "bicubic"):
        logits = predicted(ours, split, torch.cat(own))[1]
        parts = zip(found, logits.split(sizes, 1), said.split(sizes, 1), strict=True)
        record["canvas"] = canvas_of(card)
        record["on its canvas"] = [{"pack": s.pack, **told(split.keys, a, b)} for s, a, b in parts]
    return record


def as_upstream(split: Split) -> Split:
    """The split on the model's canvas, resized as open_clip's transform does."""
    wanted = {"canvas": "model", "resize": "bicubic"}
    return Split(split.card.model_copy(update=wanted), split.split, split.folder, split.entries)


def canvas_of(card: DatasetCard) -> str:
    """How the card brings images to the model where upstream does not do the same."""
    return f"native, {card.native_px} px" if card.canvas == "native" else card.resize


def predicted(model: Clip, split: Split, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels (N, 3, H, W) on the split's canvas, and logits (N, C) brought to upstream's scale."""
    pixels = as_float(split.images(model.image_size).pixels)
    logits = canonical.logits(Classifier(model, bank), pixels, ROWS)
    return pixels, logits * (towers.SCALE / model.logit_scale)


def told(keys: Sequence[str], ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """How two (N, C) of logits agree: equal argmax, the images where it differs, how near a call it is."""
    mine, wanted = ours.argmax(1), theirs.argmax(1)
    top = theirs.topk(2, 1).values
    unlike = (mine != wanted).nonzero()[:, 0].tolist()
    return {
        "equal": len(keys) - len(unlike),
        "distinct": int(wanted.unique().numel()),
        "commonest": int(wanted.bincount().max()),
        "logits": float((ours - theirs).abs().max()),
        "gap": float((top[:, 0] - top[:, 1]).min()),
        "gap, median": float((top[:, 0] - top[:, 1]).median()),
        "unlike": [
            {
                "key": keys[i],
                "ours": int(mine[i]),
                "theirs": int(wanted[i]),
                "apart": float(theirs[i, wanted[i]] - theirs[i, mine[i]]),
            }
            for i in unlike[:SHOWN]
        ],
    }


def about(upstream: Upstream) -> dict[str, Any]:
    """Where the numbers come from."""
    if (upstream.folder / ".git").exists():
        asked = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(asked, cwd=upstream.folder, capture_output=True, text=True, check=True)
        version = done.stdout.strip()
    else:
        version = f"package {importlib.metadata.version('clip_benchmark')}"
    files = [upstream.folder / "clip_benchmark" / name for name in DRIVEN]
    names = ("torch", "open_clip_torch", "torchvision", "pillow", "webdataset")
    return {
        "upstream": version,
        "files": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16],
        "versions": {
            "python": platform.python_version(),
            **{n: importlib.metadata.version(n) for n in names},
        },
        "machine": f"{platform.machine()}, one thread, fp32",
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
