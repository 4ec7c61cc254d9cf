"""Labelled images -> the clip-benchmark layout, with the keys that they had where they came from.

Encoded bytes are copied unchanged; only images that a package hands out decoded become (lossless) PNG. So a
dataset has the same keys, labels, image hashes and verdicts before and after the export.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from robustbench_vlm import store
from robustbench_vlm.data import layout
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

    Raises:
        DataError: a label outside the class names, an image format that the layout does not have, or another
            dataset in the way.
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

    layout.write_texts(folder, names, templates)
    layout.write_split(folder, split, numbered(), per_shard)
    return folder


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
