"""A split of a dataset on disk: its images with keys and labels, and their pixels on request.

Opening a split reads names and labels only. Keys, subsets and hashes depend on the card and the names of the
images, and never on the order of shards, the number of workers or the batch size.
"""

from __future__ import annotations

import hashlib
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from robustbench_vlm import rng
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import image_files, manifest, miniature, pixels, remarks, shards, texts
from robustbench_vlm.data.parallel import in_order
from robustbench_vlm.errors import DataError, some
from robustbench_vlm.store import fingerprint

TOLERATED = 0.001  # share of undecodable images up to which an evaluation leaves them out and flags the row
SHOWN = 5  # bad images that an error names
IN_MEMORY = 512 * 2**20  # bytes of uint8 pixels up to which a split is decoded once and stays in memory


@dataclass(frozen=True, slots=True)
class Entry:
    """One image of a split.

    Attributes:
        key: the identity of the image, `dataset/split/member`.
        label: class index.
        sample: where its bytes lie.
    """

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
        notes: facts about the folder that matter to a reader of results and are no errors, one line each.
        flags: names of facts about the whole split that change what is measured on it: `images-left-out`,
            `classes-without-images` (of class folders, and of exports of them).
        bad: images that were left out because they do not decode, one line each.
    """

    card: DatasetCard
    split: str
    folder: Path
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
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

        With `stratified`, the image with the smallest rank of every class comes first, then the second
        smallest of every class, and so on. A smaller subset of one seed and kind is part of every larger one.
        """
        if n < 0:
            raise ValueError(f"n = {n}, expected 0 (all) or a positive number")
        if n == 0 or n >= len(self):
            return self
        ranked = sorted(self.entries, key=lambda entry: rng.rank(seed, entry.key))
        if stratified:
            before: Counter[int] = Counter()
            within = []  # how many images of the same class rank before
            for entry in ranked:
                within.append(before[entry.label])
                before[entry.label] += 1
            order = sorted(range(len(ranked)), key=within.__getitem__)  # stable: by rank among equals
            ranked = [ranked[i] for i in order]
        drawn = ranked[:n]
        return replace(self, entries=tuple(sorted(drawn, key=lambda entry: entry.key)))

    def listed(self, names: Sequence[str], n: int = 0) -> Split:
        """The images of the first `n` names of a list (0: of all); a name is a key with or without extension.

        A name that is a key is that image. Otherwise extensions of images are left out on both sides.

        Raises:
            DataError: an image of the list is not there, is in the list twice, or may be one of several.
        """
        where = str(self.folder / self.split)
        prefix = f"{reader.plain_name(self.card.name)}/{self.split}/"
        by_key = {entry.key.removeprefix(prefix): entry for entry in self.entries}
        by_stem: dict[str, list[str]] = {}
        for key in by_key:
            by_stem.setdefault(image_files.without_suffix(key), []).append(key)
        drawn: dict[str, Entry] = {}
        for name in names[: n or None]:
            keys = [name] if name in by_key else by_stem.get(image_files.without_suffix(name), [])
            if not keys:
                do = "use class folders, or an export of them, which keeps these names"
                raise DataError(where, f"no image {name!r}", "the listed ones", do)
            if len(keys) > 1:
                several = f"{name!r} of the list may be {some(sorted(keys))}"
                raise DataError(where, several, "one image", "write its whole name")
            found = by_key[keys[0]]
            if found.key in drawn:
                raise DataError(where, f"{name!r} is in the list twice", "one line an image", "remove it")
            drawn[found.key] = found
        return replace(self, entries=tuple(drawn[key] for key in sorted(drawn)))

    def side(self, px: int) -> int:
        """Side of the canvas for a model with input size `px`: the images' own side if it is native."""
        return self.card.native_px if self.card.canvas == "native" else px

    def fits_in_memory(self, px: int) -> bool:
        """Whether all pixels are few enough to be decoded once and stay in memory."""
        return len(self) * self.side(px) ** 2 * 3 <= IN_MEMORY

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
        """All images, decoded into one array of N x side x side x 3 bytes.

        Raises:
            DataError: for the first image, in entry order, that cannot be decoded.
        """
        side = self.side(px)
        array = np.empty((len(self), side, side, 3), dtype=np.uint8)

        def store(i: int, found: Example) -> None:
            array[i] = found.pixels

        _, hashes = self.scan(px, store, 0.0)
        return Images(array, self.labels, self.keys, hashes)

    def scan(
        self, px: int, each: Callable[[int, Example], None], tolerated: float = TOLERATED
    ) -> tuple[Split, tuple[str, ...]]:
        """Decode every image once, in entry order, and return the hashes of the images that decode.

        Args:
            px: the model's input size.
            each: called for every image that decodes, with its position among those and the image.
            tolerated: share of undecodable images up to which they are left out.

        Returns:
            The split without its undecodable images, which are named in `bad`, and SHA-256 of the others'
            files.

        Raises:
            DataError: more undecodable images than that; the first ones are named.
        """
        hashes: list[str] = []
        good: list[int] = []
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
            each(len(good), found)
            hashes.append(found.sha256)
            good.append(i)
        split = replace(self, entries=tuple(self.entries[i] for i in good), bad=tuple(bad)) if bad else self
        return split, tuple(hashes)


def _tolerate(split: Split, bad: Sequence[str], tolerated: float, last: DataError) -> None:
    """Raise an error once there are more undecodable images than are tolerated."""
    allowed = int(tolerated * len(split))
    if len(bad) <= allowed:
        return
    if not allowed:
        raise last
    where = f"dataset {split.card.name}, split {split.split}"
    named = " | ".join(bad[:SHOWN])
    found = f"more than {allowed} undecodable images of {len(split)}: {named}"
    raise DataError(where, found, f"at most {allowed}", "fetch the dataset again")


def open_split(card: DatasetCard, root: Path, split: str) -> Split:
    """The split of a dataset below the data root, in shards or class folders; nothing is decoded yet.

    Raises:
        DataError: folder or split missing (the message says how to get it), class names other than the
            card's, or anything wrong with the shards.
    """
    folder = root / card.folder
    if not folder.is_dir():
        raise DataError(f"dataset {card.name}", f"no folder {folder}", do=how_to_get(card, root))
    inner = folder / split
    if split in ("", ".", "..") or "/" in split or not inner.is_dir():
        inside = [path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
        have = ", ".join(sorted(inside)) or "none"
        raise DataError(
            f"dataset {card.name}", f"no split {split!r}", f"one of: {have}", how_to_get(card, root)
        )
    sharded = shards.is_sharded(inner)
    notes = texts.check(card, folder, required=sharded)
    card = texts.with_names(card, folder)
    if sharded:
        _require_recorded_sizes(folder, inner)
        index = shards.index_shards(inner, card.n_classes)
    else:
        index = shards.index_folders(inner, card.names, card.other_names)
    found, flags = remarks.on(card, index, inner, generated=(folder / miniature.MARKER).exists())
    notes += found
    count = len(index.samples)
    if count != card.size.get(split, count):
        notes.append(f"{count} images, where the card says {card.size[split]}")
    prefix = f"{reader.plain_name(card.name)}/{split}/"
    entries = tuple(Entry(prefix + sample.name, sample.label, sample) for sample in index.samples)
    return Split(card, split, folder, entries, tuple(notes), flags)


def missing(cards: Iterable[DatasetCard], root: Path, split: str) -> list[str]:
    """One line for each dataset whose split is not below the root: its name, and how to get it."""
    lacking = [card for card in cards if not (root / card.folder / split).is_dir()]
    return [f"{card.name}: no {root / card.folder / split}; {how_to_get(card, root)}" for card in lacking]


def how_to_get(card: DatasetCard, root: Path) -> str:
    """The command to type, or the address to visit, for a dataset that is not on disk."""
    if card.source.hub:
        return f"get it with: vlmrob data fetch {card.name} --root {shlex.quote(str(root))}"
    if card.source.url:
        export = (
            f"vlmrob data export FOLDER --to {shlex.quote(str(root))} --name {reader.plain_name(card.name)}"
        )
        return f"get it from {card.source.url}, then type: {export}"
    if card.made_by == "tiny":
        return "make it with: vlmrob data make tiny"
    return f"put it at {root / card.folder}"


def majority(labels: np.ndarray, n_classes: int) -> float:
    """Accuracy of the best constant predictor on (N,) labels, in [0, 1]; 0 for no labels."""
    return float(np.bincount(labels, minlength=n_classes).max() / len(labels)) if len(labels) else 0.0


def _require_recorded_sizes(folder: Path, split: Path) -> None:
    """Refuse a shard whose size is not that of the manifest, if there is one; `check` compares the hashes."""
    known = manifest.read(folder)
    for path in sorted(split.glob("*.tar")) if known else ():
        size, _ = known.files.get(path.relative_to(folder).as_posix(), (-1, "")) if known else (-1, "")
        if size >= 0 and path.stat().st_size != size:
            found = f"{path.stat().st_size} bytes"
            raise DataError(str(path), found, f"{size} by {manifest.FILE}", "see vlmrob data check")
