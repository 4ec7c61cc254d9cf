"""A split of a dataset on disk: which images, under which keys and labels, and their pixels on request.

Opening indexes names and labels only. Keys, subsets and hashes depend on the card and the names alone:
never on shard order, workers or batch size.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from robustbench_vlm import rng
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import manifest, pixels, shards, texts
from robustbench_vlm.errors import DataError, some
from robustbench_vlm.store import fingerprint

TOLERATED = 0.001  # share of images that may be bad in an evaluation; they are named, and the row is flagged
SHOWN = 5  # bad images that an error names
AHEAD = 64  # images that are decoded before they are asked for

T = TypeVar("T")


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
        bad: images that were left out because they do not decode, one line each.
    """

    card: DatasetCard
    split: str
    folder: Path
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The N keys, sorted."""
        return tuple(entry.key for entry in self.entries)

    @cached_property
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

        def keep(place: int, found: Example) -> None:
            array[place] = found.pixels

        _, hashes = self.scan(px, keep, 0.0)
        return Images(array, self.labels, self.keys, hashes)

    def scan(
        self, px: int, each: Callable[[int, Example], None], tolerated: float = TOLERATED
    ) -> tuple[Split, tuple[str, ...]]:
        """Decode every image once, in entry order; only hashes are kept.

        Args:
            px: the model's input size.
            each: given every good image, with its position among the good ones.
            tolerated: share of bad images up to which the others are used; above it nothing is.

        Returns:
            The split without its bad images, which are named in `bad`, and SHA-256 of the others' files.

        Raises:
            DataError: more bad images than that; the first ones are named.
        """
        hashes: list[str] = []
        whole: list[int] = []
        bad: list[str] = []

        def attempt(i: int) -> Example | DataError:
            try:
                return self.read(i, px)
            except DataError as error:
                return error

        for i, found in enumerate(in_order(attempt, range(len(self)))):
            if isinstance(found, DataError):
                bad.append(str(found))
                _tolerate(self, bad, tolerated, found)
                continue
            each(len(whole), found)
            hashes.append(found.sha256)
            whole.append(i)
        split = replace(self, entries=tuple(self.entries[i] for i in whole), bad=tuple(bad)) if bad else self
        return split, tuple(hashes)


def in_order(call: Callable[[int], T], positions: Iterable[int]) -> Iterator[T]:
    """`call(i)` for each position, in order, by a few threads that run a little ahead."""
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(threads())
    try:
        for i in positions:
            waiting.append(pool.submit(call, i))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # also when the caller stops early or an image is bad: nobody waits for what is not needed
        pool.shutdown(wait=False, cancel_futures=True)


def _tolerate(split: Split, bad: Sequence[str], tolerated: float, last: DataError) -> None:
    """Raise once there are more bad images than are tolerated."""
    allowed = int(tolerated * len(split))
    if len(bad) <= allowed:
        return
    if not allowed:
        raise last
    where = f"dataset {split.card.name}, split {split.split}"
    named = " | ".join(bad[:SHOWN])
    raise DataError(where, f"more than {allowed} bad images of {len(split)}: {named}", do="fetch it again")


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
    notes = texts.check(card, folder, required=sharded)
    card = texts.with_names(card, folder)
    if sharded:
        _as_recorded(folder, place)
        index = shards.index_shards(place, card.n_classes)
    else:
        index, by_name = shards.index_folders(place, card.names)
        if not by_name:
            of = {one.name.partition("/")[0]: card.names[one.label] for one in index.samples}
            pairs = some([f"{folder} is {name}" for folder, name in of.items()])  # 10 sorts before 2
            notes.append(f"class folders are matched to class names by sorted order: {pairs}")
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
    if card.made_by == "tiny":
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


def _as_recorded(folder: Path, place: Path) -> None:
    """Refuse a shard that is not as long as the manifest says, where there is one; hashes are `check`'s."""
    known = manifest.read(folder)
    for path in sorted(place.glob("*.tar")) if known else ():
        size, _ = known.files.get(path.relative_to(folder).as_posix(), (-1, "")) if known else (-1, "")
        if size >= 0 and path.stat().st_size != size:
            found = f"{path.stat().st_size} bytes"
            raise DataError(str(path), found, f"{size} by {manifest.FILE}", "see vlmrob data check")
