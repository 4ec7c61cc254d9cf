"""A split of a dataset on disk: which images, under which keys and labels, and their pixels on request.

Opening indexes names and labels only. Keys, subsets and hashes depend on the card and the names alone:
never on shard order, workers or batch size.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from robustbench_vlm import rng
from robustbench_vlm.cards import DatasetCard, lines_sha256
from robustbench_vlm.data import manifest, pixels, shards
from robustbench_vlm.errors import DataError
from robustbench_vlm.store import fingerprint


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a split: its identity for ever, its class index, and where its bytes lie."""

    key: str
    label: int
    sample: shards.Sample


@dataclass(frozen=True)
class Example:
    """One decoded image.

    Attributes:
        key: `dataset/split/member`.
        label: class index.
        sha256: of the encoded bytes, in hex.
        pixels: (H, W, 3) uint8 on the dataset's canvas.
    """

    key: str
    label: int
    sha256: str
    pixels: np.ndarray


@dataclass(frozen=True)
class Images:
    """All images of a split in entry order.

    Attributes:
        pixels: (N, H, W, 3) uint8 on the dataset's canvas.
        labels: (N,) int64.
        keys: N keys.
        sha256: N hashes of the encoded bytes, in hex.
    """

    pixels: np.ndarray
    labels: np.ndarray
    keys: tuple[str, ...]
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """Some images of one split of a dataset, sorted by key.

    Attributes:
        card: the dataset.
        split: name of the split, also of its folder.
        folder: the dataset's folder.
        entries: the images, sorted by key.
        notes: what a careful reader of a result should know about the folder; not errors.
    """

    card: DatasetCard
    split: str
    folder: Path
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def keys(self) -> tuple[str, ...]:
        """The N keys, sorted."""
        return tuple(entry.key for entry in self.entries)

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64 class indices, in entry order."""
        return np.array([entry.label for entry in self.entries], dtype=np.int64)

    @cached_property
    def sha256(self) -> str:
        """Identity of the selection: SHA-256 over the ordered keys and labels."""
        return fingerprint([[entry.key, entry.label] for entry in self.entries])

    def subset(self, n: int, seed: int = 0, *, stratified: bool = False) -> Split:
        """The `n` images with the smallest `rng.rank(seed, key)`; all of them for n = 0 or n >= N.

        Stratified, the smallest of every class come first, then the second smallest, and so on. Subsets of
        one seed and kind are nested, and independent of the order of shards and members.
        """
        if n < 0:
            raise ValueError(f"n = {n}, expected 0 (all) or a positive number")
        if n == 0 or n >= len(self):
            return self
        ranked = sorted(self.entries, key=lambda entry: rng.rank(seed, entry.key))
        if stratified:
            before: Counter[int] = Counter()
            turns = []
            for entry in ranked:
                turns.append(before[entry.label])
                before[entry.label] += 1
            order = sorted(range(len(ranked)), key=turns.__getitem__)  # stable: by rank within a turn
            ranked = [ranked[i] for i in order]
        drawn = ranked[:n]
        return replace(self, entries=tuple(sorted(drawn, key=lambda entry: entry.key)))

    def listed(self, names: Sequence[str], n: int = 0) -> Split:
        """The images of the first `n` names of a list (0: of all), by their keys with or without extension.

        Raises:
            DataError: an image of the list is not there.
        """
        prefix = f"{self.card.name}/{self.split}/"
        there = {}
        for entry in self.entries:
            key = entry.key.removeprefix(prefix)
            stem, dot, suffix = key.rpartition(".")
            there[stem if dot and "/" not in suffix else key] = entry
        drawn = {}
        for name in names[: n or None]:
            stem, dot, suffix = name.rpartition(".")
            found = there.get(stem if dot and "/" not in suffix else name)
            if found is None:
                do = "use class folders, or an export of them, which keeps these names"
                raise DataError(f"{self.folder / self.split}", f"no image {name!r}", "the listed ones", do)
            drawn[found.key] = found
        return replace(self, entries=tuple(drawn[key] for key in sorted(drawn)))

    def side(self, px: int) -> int:
        """Side of the canvas for a model with input size `px`: the card's own when it is native."""
        return self.card.native_px if self.card.canvas == "native" else px

    def read(self, i: int, px: int) -> Example:
        """Image `i` on the canvas; `px` is the model's input size, used when the canvas is `model`.

        Raises:
            DataError: the bytes are gone, or are no image that fits the canvas.
        """
        entry = self.entries[i]
        content = entry.sample.read()
        where = f"{entry.sample.path}, {entry.key}"
        if self.card.canvas == "native":
            found = pixels.native(content, self.side(px), where)
        else:
            found = pixels.model(content, self.side(px), where, self.card.resize)
        return Example(entry.key, entry.label, hashlib.sha256(content).hexdigest(), found)

    def images(self, px: int) -> Images:
        """All images, decoded by a few threads into one array of N x side x side x 3 bytes.

        Raises:
            DataError: for the first image, in entry order, that cannot be decoded.
        """
        side = self.side(px)
        array = np.empty((len(self), side, side, 3), dtype=np.uint8)
        hashes = []
        with ThreadPoolExecutor(threads()) as pool:
            try:
                for i, example in enumerate(pool.map(lambda i: self.read(i, px), range(len(self)))):
                    array[i] = example.pixels
                    hashes.append(example.sha256)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return Images(array, self.labels, self.keys, tuple(hashes))


def open_split(card: DatasetCard, root: Path, split: str) -> Split:
    """The split as it lies below the data root: shards or class folders, checked but not decoded.

    Raises:
        DataError: folder or split missing (with how to get it), class names other than the card's, or
            anything wrong with the shards.
    """
    folder = root / card.folder
    if not folder.is_dir():
        raise DataError(f"dataset {card.name}", f"no folder {folder}", do=how_to_get(card, root))
    place = folder / split
    if split in ("", ".", "..") or "/" in split or not place.is_dir():
        inside = [path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
        have = ", ".join(sorted(inside)) or "none"
        raise DataError(
            f"dataset {card.name}", f"no split {split!r}", f"one of: {have}", how_to_get(card, root)
        )
    sharded = shards.is_sharded(place)
    notes = check_texts(card, folder, required=sharded)
    card = with_names(card, folder)
    if sharded:
        _as_recorded(folder, place)
        index = shards.index_shards(place, card.n_classes)
    else:
        index, by_name = shards.index_folders(place, card.names)
        if not by_name:
            notes.append("class folders are matched to class names by sorted order")
    if index.ignored:
        notes.append(f"{index.ignored} files that are neither images nor labels were ignored")
    count = len(index.samples)
    if count != card.size.get(split, count):
        notes.append(f"{count} images, where the card says {card.size[split]}")
    prefix = f"{card.name}/{split}/"
    entries = tuple(Entry(prefix + sample.name, sample.label, sample) for sample in index.samples)
    return Split(card, split, folder, entries, tuple(notes))


def missing(cards: Iterable[DatasetCard], root: Path, split: str) -> list[str]:
    """One line for each dataset without that split below the root: its name and how to get it."""
    return [
        f"{card.name}: no {root / card.folder / split}; {how_to_get(card, root)}"
        for card in cards
        if not (root / card.folder / split).is_dir()
    ]


def how_to_get(card: DatasetCard, root: Path) -> str:
    """The command to type, or the address to go to, for a dataset that is not there."""
    if card.source.hub:
        return f"get it with: vlmrob data fetch {card.name} --root {root}"
    if card.source.url:
        export = f"vlmrob data export FOLDER --to {root} --name {card.name}"
        return f"get it from {card.source.url}, then type: {export}"
    if card.name.startswith("tiny"):
        return "make it with: vlmrob data make tiny"
    return f"put it at {root / card.folder}"


def folder_sha(keys: Sequence[str], labels: Sequence[int] | np.ndarray, images: Sequence[str]) -> str:
    """Fingerprint of what was evaluated: SHA-256 over ordered keys, labels and image hashes.

    Args:
        keys: N keys.
        labels: N class indices.
        images: N SHA-256 of the encoded images, in hex.
    """
    return fingerprint([[k, int(y), h] for k, y, h in zip(keys, labels, images, strict=True)])


def majority(labels: np.ndarray, n_classes: int) -> float:
    """Accuracy of the best constant predictor on (N,) labels, in [0, 1]; 0 for no labels."""
    return float(np.bincount(labels, minlength=n_classes).max() / len(labels)) if len(labels) else 0.0


def threads() -> int:
    """How many threads decode: the cores this process may use, at most 8 (decoding frees the interpreter)."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)


def check_texts(card: DatasetCard, folder: Path, *, required: bool) -> list[str]:
    """Notes on the folder's text files, once its class names are the card's.

    Raises:
        DataError: other class names, another kind of dataset, or no text.
    """
    kind = _lines(folder / "dataset_type.txt")
    if kind and kind[0] not in ("", "classification"):
        raise DataError(str(folder / "dataset_type.txt"), repr(kind[0]), "classification")
    notes: list[str] = []
    names = _lines(folder / "classnames.txt")
    if names is None and required:
        where = str(folder / "classnames.txt")
        raise DataError(where, "no such file", f"the {card.n_classes} class names", "fetch it again")
    if names is not None and card.names_from == "card":
        notes = _same_names(card, folder / "classnames.txt", names)
    templates = _lines(folder / "zeroshot_classification_templates.txt")
    if templates is None:
        return [*notes, "no templates file; the card's templates are used"] if required else notes
    if [line for line in templates if line] != list(card.templates):
        notes.append("the folder's templates differ from the card's; the card's are used")
    return notes


def with_names(card: DatasetCard, folder: Path) -> DatasetCard:
    """The card, with the folder's class names where it has none of its own.

    Raises:
        DataError: no names there, or others than the card's SHA-256 says.
    """
    if card.names_from == "card":
        return card
    path = folder / "classnames.txt"
    names = _lines(path)
    if names is None or len(names) > card.n_classes:
        found = "no such file" if names is None else f"{len(names)} names"
        raise DataError(
            str(path), found, f"the {card.n_classes} class names", how_to_get(card, folder.parent)
        )
    names += [""] * (card.n_classes - len(names))
    if card.names_sha256 and lines_sha256(names) != card.names_sha256:
        found = f"names with SHA-256 {lines_sha256(names)[:16]}"
        raise DataError(str(path), found, f"{card.names_sha256[:16]} by the card", "get the right folder")
    return card.model_copy(update={"names": tuple(names), "names_from": "card"})


def _as_recorded(folder: Path, place: Path) -> None:
    """Refuse a shard that is not as long as the manifest says, where there is one; hashes are `check`'s."""
    known = manifest.read(folder)
    for path in sorted(place.glob("*.tar")) if known else ():
        size, _ = known.files.get(path.relative_to(folder).as_posix(), (-1, "")) if known else (-1, "")
        if size >= 0 and path.stat().st_size != size:
            found = f"{path.stat().st_size} bytes"
            raise DataError(str(path), found, f"{size} by {manifest.FILE}", "see vlmrob data check")


def _same_names(card: DatasetCard, path: Path, found: list[str]) -> list[str]:
    """A note where only the spelling differs (`apple_pie`, `apple pie`); an error for another list."""
    wanted = list(card.names)
    while wanted and not wanted[-1]:  # blank names are legal, but trailing blank lines of a file are dropped
        wanted.pop()
    for number in range(max(len(wanted), len(found))):
        here = [repr(lines[number]) if number < len(lines) else "no line" for lines in (found, wanted)]
        if _plain(here[0]) != _plain(here[1]):
            do = f"check that the folder is {card.name}, or give a card with its names by --include"
            raise DataError(f"{path}, line {number + 1}", here[0], f"{here[1]} by the card", do)
    if found == wanted:
        return []
    return ["class names in the folder are spelt differently from the card's; the card's are used"]


def _plain(name: str) -> str:
    """A class name without the differences between editions of one list: case, `_`, `-` and `/`."""
    return re.sub(r"[\s_/-]+", " ", name).strip().casefold()


def _lines(path: Path) -> list[str] | None:
    """Lines of a UTF-8 text file without trailing blank ones; none if there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(path), f"unreadable ({error})", "UTF-8 text") from None
    return text.rstrip("\n").split("\n") if text.strip() else []
