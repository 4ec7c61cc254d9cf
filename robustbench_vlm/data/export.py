"""Labelled images -> the clip-benchmark layout, with the keys that they had where they came from.

Encoded bytes are copied unchanged; only images that a package hands out decoded become (lossless) PNG. So a
dataset has the same keys, labels, image hashes and verdicts before and after the export.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from robustbench_vlm import store
from robustbench_vlm.data import layout, remarks, shards
from robustbench_vlm.data.sources import LabelledImages
from robustbench_vlm.errors import DataError
from robustbench_vlm.types import TEMPLATES

PER_SHARD = 1000

Report = Callable[[str, int, int], None]

CARD = """# Written by `vlmrob data export`; correct title, licence, templates and canvas where needed.
name = {name}
title = {name}
folder = {folder}
n_classes = {n_classes}
size = {{ {key} = {count} }}
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


def export(
    source: LabelledImages,
    folder: Path,
    split: str,
    names: tuple[str, ...],
    templates: tuple[str, ...],
    report: Report,
    per_shard: int = PER_SHARD,
) -> Path:
    """Write a source as `folder/<split>`; returns `folder`, which is that of the dataset's card.

    A finished split of the same images stays as it is.

    Raises:
        DataError: a label outside the class names, an image format that the layout does not have, or another
            dataset or other images in the way.
    """
    name = folder.name.removeprefix("wds_")

    def numbered() -> Iterator[layout.Sample]:
        for i, (key, content, extension, label) in enumerate(source.items()):
            report(f"export {name}", i, source.count)
            if label >= len(names):
                raise DataError(f"{name}, {key}", f"label {label}", f"0 to {len(names) - 1}", "see --names")
            member = f"s{i:07d}"
            plain = (member, content, extension, label)
            yield plain if key == member else (*plain, key)

    finished = layout.is_finished(folder, split)
    layout.write_texts(folder, names, templates)
    if finished:
        _require_same(source, folder / split, len(names))
        return folder
    layout.write_split(folder, split, numbered(), per_shard, source.flags)
    return folder


def _require_same(source: LabelledImages, split: Path, n_classes: int) -> None:
    """Refuse a source that is not what a finished split was made of: keys, labels, bytes and flags.

    Raises:
        DataError: it is another, or the split is not whole.
    """
    there = {sample.name: sample for sample in shards.index_shards(split, n_classes).samples}
    same = remarks.stored(split) == source.flags and len(there) == source.count
    for key, content, _, label in source.items() if same else ():
        sample = there.get(key)
        if sample is None or sample.label != label or sample.read() != content:
            same = False
            break
    if not same:
        do = "remove it, or choose another --to, --name or --split"
        raise DataError(str(split), "a finished split of other images or labels", "none, or the same", do)


def write_cards(
    to: Path,
    name: str,
    split: str,
    names: tuple[str, ...],
    count: int,
    templates: tuple[str, ...] = TEMPLATES,
    evaluated: str = "",
) -> Path:
    """Write a dataset card and a suite of that dataset below `to/cards`, unless they are there.

    Args:
        to: data root.
        name: of the dataset and of the suite.
        split: name of the split.
        names: class names in label order.
        count: images of the split.
        templates: sentences with `{c}` for the class name.
        evaluated: the split that the suite evaluates; by default `split`, and `test` where `split` is one
        that
            models are trained or chosen on (`train`, `val`).

    Returns:
        The folder of the cards, for `--include`.
    """
    evaluated = evaluated or ("test" if split in ("train", "val") else split)
    quoted = {"name": json.dumps(name), "split": json.dumps(evaluated)}
    lists = {key: json.dumps(list(lines), ensure_ascii=False) for key, lines in (("names", names),)}
    facts = {"folder": json.dumps(f"wds_{name}"), "n_classes": len(names), "count": count}
    texts = {
        to / "cards" / "datasets" / f"{store.file_name(name)}.toml": CARD.format(
            **quoted,
            key=json.dumps(split),
            **lists,
            **facts,
            templates=json.dumps(list(templates), ensure_ascii=False),
        ),
        to / "cards" / f"{store.file_name(name)}.toml": SUITE.format(**quoted),
    }
    for path, text in texts.items():
        if not path.exists():
            store.write(path, text.encode())
    return to / "cards"
