"""Images without a card -> a dataset below the data root, and the cards that evaluate it."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustbench_vlm import store
from robustbench_vlm.data import export, layout, sources
from robustbench_vlm.data.sources import LabelledImages
from robustbench_vlm.errors import DataError, InputError, some
from robustbench_vlm.types import TEMPLATES

RECORD = "sources.json"
"""File of the cards' folder: which dataset was made of which images, and when they were last changed."""


@dataclass(frozen=True)
class ImageCards:
    """The cards that `card_of_images` wrote.

    Attributes:
        name: of the dataset, and of the suite that consists of it.
        split: name of the split.
        include: folder of the cards (`cards.reader.include`, or `--include`).
        notes: what was read and what was decided, one line each.
    """

    name: str
    split: str
    include: Path
    notes: tuple[str, ...]


def card_of_images(
    source: Path,
    root: Path,
    report: export.Report,
    names: Sequence[str] = (),
    templates: Sequence[str] = TEMPLATES,
    split: str = "",
    columns: tuple[str, str] = ("", ""),
) -> ImageCards:
    """Export images into a data root and write the cards that evaluate them.

    The dataset is called `<name of the source>-<hash>`, where the hash is of the images, labels, class names
    and templates: the same images have the same name everywhere, and a changed source gets another one. A
    second call with an unchanged source reads no image.

    Args:
        source: a folder of class folders or a table; see `sources.open_images`.
        root: data root.
        report: told (what, done, total).
        names: class names in label order; by default those of the source.
        templates: sentences with `{c}` for the class name.
        split: which split to read, where the source has several.
        columns: of images and of labels in a table; empty ones are found by their usual names.

    Raises:
        DataError: unusable images or labels, or fewer than two classes.
        InputError: a template without `{c}`.
    """
    if not templates or any("{c}" not in template for template in templates):
        raise InputError("templates", f"{list(templates)!r:.80}", "sentences with {c} for the class name")
    images = sources.open_images(source, names, split, *columns)
    if len(images.names) < 2:
        raise DataError(str(source), f"{len(images.names)} class", "at least two classes")
    record = _record(root)
    stamp, known = _stamp(images, templates), record.get(str(source.resolve()), {})
    name = str(known.get("name", ""))
    if known.get("stamp") != stamp or not (root / f"wds_{name}" / images.split / layout.NSHARDS).is_file():
        name = f"{_stem(source)}-{_content(images, templates, report)[:8]}"
        folder = root / f"wds_{name}"
        export.export(images, folder, images.split, images.names, tuple(templates), report)
        record[str(source.resolve())] = {"name": name, "stamp": stamp}
        store.write_json(root / "cards" / RECORD, record)
    include = export.write_cards(
        root, name, images.split, images.names, images.count, tuple(templates), images.split
    )
    return ImageCards(name, images.split, include, (*sources.summary(images, images.names), *images.notes))


def _stem(source: Path) -> str:
    """The name of a folder or file as the beginning of a dataset's name."""
    stem = source.resolve().name if source.is_dir() else source.stem
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:40] or "images"


def _content(images: LabelledImages, templates: Sequence[str], report: export.Report) -> str:
    """SHA-256 of everything that decides an evaluation of these images."""
    rows: list[list[Any]] = []
    keys: Counter[str] = Counter()
    for i, (key, content, _, label) in enumerate(images.items()):
        report("read the images", i, images.count)
        rows.append([key, label, hashlib.sha256(content).hexdigest()])
        keys[key] += 1
    if twice := [key for key, count in keys.items() if count > 1]:
        raise DataError("images", f"{some(twice)} occur twice", "one row an image")
    words = {"names": list(images.names), "templates": list(templates), "split": images.split}
    lost = {"flags": list(images.flags)} if images.flags else {}
    return store.fingerprint({**words, **lost, "images": rows})


def _stamp(images: LabelledImages, templates: Sequence[str]) -> str:
    """Hash of the sizes and times of the source's files and of the words: changed as soon as they change."""
    files = [[str(path), (found := path.stat()).st_size, found.st_mtime_ns] for path in images.files]
    words = {"names": list(images.names), "templates": list(templates), "split": images.split}
    return store.fingerprint({**words, "files": files, "notes": list(images.notes)})


def _record(root: Path) -> dict[str, Any]:
    """What was made of which images below this data root; nothing if the record is unreadable."""
    path = root / "cards" / RECORD
    table = store.read_json(path) if path.exists() else {}
    return table if isinstance(table, dict) else {}
