"""Any labelled images -> the clip-benchmark layout, with the keys that they had where they came from.

Encoded bytes are copied as they are; only what a package hands out decoded becomes (lossless) PNG. So a
dataset has the same keys, labels, image hashes and verdicts before and after, in folders or in shards.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustbench_vlm import store
from robustbench_vlm.data import layout, shards
from robustbench_vlm.errors import DataError, InputError, nearest

NUMBERED = re.compile(r"\d{3}\.")  # 001.ak47, as in Caltech-256
PER_SHARD = 1000
LARGEST_LINE = 1 << 20  # bytes of one record of a JSON-lines file

Report = Callable[[str, int, int], None]

CARD = """# Written by `vlmrob data export`; correct title, licence, templates and canvas where needed.
name = {name}
title = {name}
folder = {folder}
n_classes = {n_classes}
size = {{ {split} = {count} }}
canvas = "model"
names = {names}
templates = {templates}
licence = "not stated"
"""
SUITE = """name = {name}
title = {name}
datasets = [{name}]
split = {split}
eps = ["2/255", "4/255"]
"""
TEMPLATES = ("a photo of a {c}.",)


@dataclass(frozen=True)
class Source:
    """Labelled images somewhere.

    Attributes:
        count: number of images.
        names: class names in label order; empty where the source has none.
        ignored: files that are no images.
        samples: (original key, encoded bytes, extension, label) of each image.
    """

    count: int
    names: tuple[str, ...]
    ignored: int
    samples: Iterator[tuple[str, bytes, str, int]]


def from_folders(folder: Path) -> Source:
    """A tree `<folder>/<class>/<image>`; labels follow the sorted folder names, as in `ImageFolder`.

    Raises:
        DataError: no class folders, or no images in them.
    """
    if not folder.is_dir():
        raise DataError(str(folder), "no such folder", "class folders with images")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    index, _ = shards.index_folders(folder, tuple(classes))

    def samples() -> Iterator[tuple[str, bytes, str, int]]:
        for sample in index.samples:
            yield sample.name, sample.read(), sample.path.suffix.lower().removeprefix("."), sample.label

    return Source(len(index.samples), tuple(spelt(classes)), index.ignored, samples())


def from_records(file: Path) -> Source:
    """A JSON-lines file of `{"img": "img/1.png", "label": 0}`, paths beside it, as Hateful Memes has it.

    Raises:
        DataError: a line without image and label, or an image that is missing or outside the folder.
    """
    root = file.parent.resolve()
    rows: list[tuple[str, Path, int]] = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            try:
                row = json.loads(line[:LARGEST_LINE])
                name, label = row["img"], row["label"]
            except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
                raise DataError(where, f"{line[:60]!r}", 'an object with "img" and "label"') from None
            if not isinstance(name, str) or not isinstance(label, int) or label < 0:
                raise DataError(where, f"img {name!r:.60}, label {label!r:.20}", "a path and a class index")
            path = (root / name).resolve()
            if not path.is_relative_to(root) or not path.is_file() or not name.isprintable():
                raise DataError(where, f"no image {name!r:.80} below {root}", "a file there")
            rows.append((name, path, label))
    if not rows:
        raise DataError(str(file), "no images", "one object a line")

    def samples() -> Iterator[tuple[str, bytes, str, int]]:
        for name, path, label in rows:
            content = shards.Sample(name, label, path).read()
            yield name, content, path.suffix.lower().removeprefix("."), label

    return Source(len(rows), (), 0, samples())


def from_torchvision(name: str, root: Path, settings: Mapping[str, Any]) -> Source:
    """A dataset class of torchvision; its images become PNG, its keys are their places.

    Raises:
        InputError: no such class, or arguments that it refuses.
    """
    from torchvision import datasets

    known = [one for one in datasets.__all__ if isinstance(getattr(datasets, one), type)]
    if name not in known:
        raise InputError(f"torchvision:{name}", "no such dataset", do=nearest(name, known))
    try:
        found = getattr(datasets, name)(root, **settings)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"torchvision:{name}", reason, do="see --source-root and --set") from None

    def samples() -> Iterator[tuple[str, bytes, str, int]]:
        for i in range(len(found)):
            image, label = found[i]
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            yield f"s{i:07d}", buffer.getvalue(), "png", int(label)

    return Source(len(found), tuple(spelt(getattr(found, "classes", ()))), 0, samples())


def spelt(classes: list[str] | tuple[str, ...]) -> list[str]:
    """Folder names as class names: `_` is a space; numbered ones lose `001.` and a final `-101`."""
    if classes and all(NUMBERED.match(name) for name in classes):
        classes = [name[4:].removesuffix("-101").replace("-", " ") for name in classes]
    return [name.replace("_", " ") for name in classes]


def export(
    source: Source,
    folder: Path,
    split: str,
    names: tuple[str, ...],
    templates: tuple[str, ...],
    report: Report,
    per_shard: int = PER_SHARD,
) -> Path:
    """Write a source as `folder/<split>`; returns `folder`, which is that of the dataset's card.

    Raises:
        DataError: a label outside the class names, an image format that the layout does not have, or another
            dataset in the way.
    """
    name = folder.name.removeprefix("wds_")

    def numbered() -> Iterator[layout.Sample]:
        for i, (key, content, extension, label) in enumerate(source.samples):
            report(f"export {name}", i, source.count)
            if label >= len(names):
                raise DataError(f"{name}, {key}", f"label {label}", f"0 to {len(names) - 1}", "see --names")
            member = f"s{i:07d}"
            plain = (member, content, extension, label)
            yield plain if key == member else (*plain, key)

    layout.write_texts(folder, names, templates)
    layout.write_split(folder, split, numbered(), per_shard)
    return folder


def write_cards(to: Path, name: str, split: str, names: tuple[str, ...], count: int) -> Path:
    """A dataset card and a suite of that one dataset below `to/cards`, unless they are there; that folder.

    The suite is judged on `split`, on `test` where that is what models are trained or chosen on.
    """
    judged = "test" if split in ("train", "val") else split
    quoted = {"name": json.dumps(name), "split": json.dumps(judged)}
    lists = {key: json.dumps(list(lines), ensure_ascii=False) for key, lines in (("names", names),)}
    facts = {"folder": json.dumps(f"wds_{name}"), "n_classes": len(names), "count": count}
    texts = {
        to / "cards" / "datasets" / f"{name}.toml": CARD.format(
            **{**quoted, "split": split}, **lists, **facts, templates=json.dumps(list(TEMPLATES))
        ),
        to / "cards" / f"{name}.toml": SUITE.format(**quoted),
    }
    for path, text in texts.items():
        if not path.exists():
            store.write(path, text.encode())
    return to / "cards"
