"""Compare a dataset on disk with its card and its manifest, and name everything that is wrong."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import class_names, dataset, manifest, miniature, pixels, remarks, shards, texts
from robustbench_vlm.data.parallel import in_order
from robustbench_vlm.errors import DataError, InputError

COLUMNS = ("dataset", "split", "images", "classes", "shards", "MB", "manifest", "state")

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        dataset: name of the card.
        split: name of the split.
        images: images with a label.
        classes: classes that occur.
        shards: archives; 0 for class folders.
        size: bytes of all files.
        manifest: `recorded` now, `same` as recorded before, or empty.
        problems: what is wrong, one line each; empty when the dataset is whole.
        notes: facts worth knowing that are not wrong.
    """

    dataset: str
    split: str
    images: int = 0
    classes: int = 0
    shards: int = 0
    size: int = 0
    manifest: str = ""
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def texts(self) -> list[str]:
        """The values of `COLUMNS`."""
        state = "whole" if not self.problems else f"broken ({len(self.problems)})"
        counts = (self.images, self.classes, self.shards)
        return [
            self.dataset,
            self.split,
            *map(str, counts),
            f"{self.size / 1e6:.1f}",
            self.manifest or "-",
            state,
        ]


def check(card: DatasetCard, root: Path, split: str, report: Report, *, decode: bool = False) -> Checked:
    """Compare a dataset with its card and its manifest: texts, whole shards, labels, counts, hashes.

    A dataset that is whole and has no manifest gets one; a broken one never does.

    Args:
        card: the dataset.
        root: data root.
        split: name of the split.
        report: called with (what, done, total).
        decode: whether every image is decoded, too.
    """
    folder = root / card.folder
    if not (folder / split).is_dir():
        lacking = f"no {folder / split}; {dataset.how_to_get(card, root)}"
        return Checked(card.name, split, problems=(lacking,))
    problems: list[str] = []
    notes: list[str] = []
    sharded = shards.is_sharded(folder / split)
    try:
        notes += texts.check(card, folder, required=sharded)
    except DataError as error:
        problems.append(str(error))
    try:
        card = texts.with_names(card, folder) if sharded else card
    except DataError as error:
        problems.append(str(error))
    index = (_sharded if sharded else _foldered)(card, folder / split, problems, report)
    samples = index.samples
    if samples:
        try:
            generated = (folder / miniature.MARKER).exists()
            found_notes, flags = remarks.on(card, index, folder / split, generated=generated)
        except DataError as error:
            problems.append(str(error))
            found_notes, flags = [], ()
        exact = index.rule == class_names.EXACT
        notes += [f"class folders are matched to class names by {index.rule}"] if exact else []
        notes += [*found_notes, *(f"results carry the flag {flag}" for flag in flags)]
    problems += _counted(card, folder, split, len(samples), notes)
    if decode:
        problems += _undecodable(card, samples, report)
    found = manifest.facts(folder, manifest.files_of(folder, split))
    state = _compared(card, folder, split, found, len(samples), problems, notes)
    return Checked(
        dataset=card.name,
        split=split,
        images=len(samples),
        classes=len({sample.label for sample in samples}),
        shards=sum(path.endswith(".tar") for path in found),
        size=sum(size for size, _ in found.values()),
        manifest=state,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _sharded(card: DatasetCard, split: Path, problems: list[str], report: Report) -> shards.Index:
    """All samples of the whole shards; adds a problem for each broken shard and each repeated key."""
    try:
        files = shards.shard_files(split)
    except DataError as error:
        problems.append(str(error))
        files = sorted(split.glob("*.tar"))
    samples: list[shards.Sample] = []
    ignored = 0
    for done, shard in enumerate(files):
        report(f"check {card.name}", done, len(files))
        try:
            found, skipped = shards.index_shard(shard, card.n_classes)
        except DataError as error:
            problems.append(str(error))
            continue
        if not found:
            problems.append(f"{shard}: no images")
        samples += found
        ignored += skipped
    twice = [name for name, count in Counter(sample.name for sample in samples).items() if count > 1]
    problems += [f"{split}: key {name!r} occurs twice" for name in sorted(twice)]
    return shards.Index(tuple(samples), ignored)


def _foldered(card: DatasetCard, split: Path, problems: list[str], report: Report) -> shards.Index:
    """All samples of the class folders; adds a problem where they do not fit the card."""
    report(f"check {card.name}", 0, 1)
    try:
        return shards.index_folders(split, card.names, card.other_names)
    except DataError as error:
        problems.append(str(error))
        return shards.Index((), 0)


def _counted(card: DatasetCard, folder: Path, split: str, count: int, notes: list[str]) -> list[str]:
    """A problem if the number of images is not the card's; for a miniature, a note."""
    wanted = card.size.get(split, count)
    if count == wanted:
        return []
    line = f"{folder / split}: {count} images, where the card says {wanted}"
    if (folder / miniature.MARKER).exists():
        notes.append(f"a miniature: {line}")
        return []
    return [line]


def _undecodable(card: DatasetCard, samples: Sequence[shards.Sample], report: Report) -> list[str]:
    """A problem for each image that does not decode, or does not fit the card's canvas."""

    def problem(sample: shards.Sample) -> str:
        where = f"{sample.path}, {card.name}/{sample.name}"
        try:
            content = sample.read()
            if card.canvas == "native":
                pixels.native(content, card.native_px, where)
            else:
                pixels.rgb(content, where)
        except DataError as error:
            return str(error)
        return ""

    found: list[str] = []
    for done, line in enumerate(in_order(problem, samples), 1):
        report(f"decode {card.name}", done, len(samples))
        found += [line] if line else []
    return found


def _compared(
    card: DatasetCard,
    folder: Path,
    split: str,
    found: dict[str, tuple[int, str]],
    count: int,
    problems: list[str],
    notes: list[str],
) -> str:
    """`same` or `recorded`; empty where there are problems, among them differences from the manifest.

    Where the manifest cannot be written, as of another user's dataset, that is a note.
    """
    try:
        known = manifest.read(folder)
    except InputError as error:
        problems.append(str(error))
        return ""
    differences = manifest.differences(known, found, split) if known else []
    problems += [f"{folder / line}" for line in differences]
    if problems:
        return ""
    wanted = (known or manifest.Manifest(card.name)).with_files(found).with_images(split, count)
    if wanted == known:
        return "same"
    try:
        manifest.write(folder, wanted)
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        notes.append(f"{folder / manifest.FILE}: not recorded ({error.strerror})")
        return ""
    return "recorded" if known is None or not known.images.get(split) else "same"
