"""The page of the comparison with CLIP_benchmark, from its records."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from towers import DIRECTIONS, TOWERS

Record = dict[str, Any]
WIDTH = 110

HEAD = """# Predictions of CLIP_benchmark and ours

The zero-shot classification of LAION-AI/CLIP_benchmark, driven as a black box, beside ours: every dataset
card, both prompt packs, the same weights, the same generated folders (`vlmrob data make`: PNG, JPEG and
WebP, RGB, grey and palette, smaller and larger than the input). Theirs is the whole path: weights by
`load_clip`, folder by `build_dataset("wds/...")` with open_clip's own transform, classes by
`zero_shot_classifier`, logits by `run_classification`, in fp32 (`--no_amp`; its default is autocast). Ours
is the whole path, too: `--model FILE --arch ...`, the split's reader and canvas, the text bank of the pack,
the zero-shot head in calls of 32 rows.

Written by

    make .venv/.parity
    python tests/parity/upstream.py

from `parity-suites.jsonl` beside it; a run that is killed goes on where it was.

Three models, random but fixed. As drawn, a random model says one class to all images; so the last
projections are followed by a map that takes the common direction out of the embeddings of other generated
pictures and of other sentences, and evens the next {directions}. `tiny` is the architecture of the tiny
world (32 px). `vit-b-32` is ViT-B-32-quickgelu, with the packs of at most {bound} sentences, since the large
ones take hours without a GPU. `shallow` is its image tower with a text tower of two layers, which reads all.
"""
TABLE = """## {name}: {arch}

`said` counts the different classes that upstream predicts, `most` the images of the commonest; `gap` is the
smallest and the median distance between its two largest logits (of scale 100); `logits` and `bank` are the
largest differences of a logit and of a number of the text bank.

| dataset | images | pack | classes | templates | said | most | equal argmax | gap | logits | bank |
|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|
"""
CANVAS = """## Where the card's own canvas is another one

The comparison above brings every image to the model as upstream does: open_clip's transform, which resizes
with Pillow (bicubic, 8-bit result) before anything else. Four cards do not do so when they are evaluated.
CIFAR-10, CIFAR-100 and STL-10 have a native canvas: the ball lives in the pixels as they are stored, so the
resize has to be inside the model, in the graph (bicubic with antialias, neither rounded nor clipped).
Hateful Memes brings both sides to the input size (bilinear), as TeCoA does. These are the shares of equal
argmax on those canvases, against the same upstream predictions. `--protocol` with `canvas = "model"` takes
the canvas of the table above for the first three.

Neither resize is wrong: they are two functions, and how many predictions move between them is a property of
the model. Random models look at everything, so that these shares say nothing about a trained one; they do
show that the comparison above would see another resize. At 32 px there is nothing to resize on CIFAR.

| dataset | canvas | model | pack | equal argmax | logits |
|---|---|---|---|---:|---:|
"""
LISTS = """## Class names and templates

Each card's lists against those that come with upstream (`en_classnames.json`,
`en_zeroshot_classification_templates.json`; the 200 names of ImageNet-A and -R as its loader cuts them).
`none`: upstream has no list of its own and takes the names from torchvision, or the dataset is not one of
its own. What a real folder's `classnames.txt` says is held to the card when it is opened.

| dataset | names | templates |
|---|---|---|
"""


def broken(records: list[Record]) -> list[str]:
    """Promises that the records do not keep, a line each."""
    found = []
    for one in records:
        for pack in one["packs"]:
            where = f"{one['unit']}, {pack['pack']}"
            if pack["equal"] != one["images"]:
                found.append(f"{where}: {pack['equal']} of {one['images']} equal")
            if not pack["texts equal"]:
                found.append(f"{where}: other class names or templates")
            if pack["distinct"] < 2:
                found.append(f"{where}: one class is predicted for all images")
        if one["packs"] and not one["labels equal"]:
            found.append(f"{one['unit']}: other labels")
        if one.get("input"):
            found.append(f"{one['unit']}: other pixels, {one['input']:.1g} apart")
        found += [f"{one['unit']}: other {what} than its own list" for what in _other(one)]
    return found


def _other(one: Record) -> list[str]:
    return [what for what, same in one["lists"].items() if same is False]


def rendered(records: list[Record], names: list[str]) -> str:
    """The page; `names` are of all cards."""
    if not records:
        return "Nothing was compared yet.\n"
    records = sorted(records, key=lambda one: one["card"])
    bound = max(tower.sentences for tower in TOWERS)
    parts = [HEAD.format(directions=DIRECTIONS, bound=bound), _verdict(records, names)]
    for tower in TOWERS:
        mine = [one for one in records if one["tower"] == tower.name]
        rows = "".join(_line(row) for one in mine for row in _rows(one))
        parts.append(TABLE.format(name=tower.name, arch=tower.arch) + rows if mine else "")
    other = [row for one in records for row in _canvases(one)]
    parts.append(CANVAS + "".join(_line(row) for row in other) if other else "")
    parts.append(LISTS + "".join(_line(row) for row in _lists(records)))
    return "\n".join([*(part for part in parts if part), _source(records)])


def _line(cells: list[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def _rows(one: Record) -> Iterator[list[Any]]:
    for pack in one["packs"]:
        equal = f"{pack['equal']} of {one['images']}"
        gap = f"{pack['gap']:.1g}, {pack['gap, median']:.2g}"
        sizes = [pack["classes"], pack["templates"], pack["distinct"], pack["commonest"]]
        apart = [f"{pack['logits']:.1g}", f"{pack['bank']:.1g}"]
        yield [one["card"], one["images"], pack["pack"], *sizes, equal, gap, *apart]


def _canvases(one: Record) -> Iterator[list[Any]]:
    for pack in one.get("on its canvas", ()):
        share = f"{pack['equal']} of {one['images']}"
        yield [one["card"], one["canvas"], one["tower"], pack["pack"], share, f"{pack['logits']:.2g}"]


def _lists(records: list[Record]) -> Iterator[list[Any]]:
    spelt = {True: "equal", False: "NOT EQUAL", None: "none"}
    for card, lists in {one["card"]: one["lists"] for one in records}.items():
        yield [card, spelt[lists["names"]], spelt[lists["templates"]]]


def _verdict(records: list[Record], names: list[str]) -> str:
    """What the page shows, in a paragraph, and what it does not keep or does not have."""
    packs = [(one, pack) for one in records for pack in one["packs"]]
    total = sum(one["images"] for one, _ in packs)
    equal = sum(pack["equal"] for _, pack in packs)
    apart = max(one["input"] for one, _ in packs)
    pixels = "equal to the last bit" if apart == 0 else f"up to {apart:.1g} apart"
    several = sum(pack["sentences apart"] < pack["classes"] for _, pack in packs)
    said = f"""{equal} of {total} predictions are equal, over {len(packs)} pairs of a dataset and a pack. No
    logit is further apart than {max(pack["logits"] for _, pack in packs):.1g}, at a scale of 100; the pixels
    that the towers are given are {pixels}. In {several} pairs some classes have the same sentences, so that
    their logits tie."""
    lines = [textwrap.fill(" ".join(said.split()), WIDTH) + "\n"]
    lines += [f"- NOT KEPT: {line}\n" for line in broken(records)]
    for tower in TOWERS:
        there = {one["card"] for one in records if one["tower"] == tower.name}
        absent = [name for name in names if name not in there]
        lines += [f"- Not compared yet with {tower.name}: {', '.join(absent)}\n"] if absent else []
    return "\n".join(lines)


def _source(records: list[Record]) -> str:
    """Every commit, set of versions and machine that the records come from."""
    lines = []
    for one in {repr(one["from"]): one["from"] for one in records}.values():
        versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        said = f"""CLIP_benchmark at {one["upstream"]} (the three files that are driven have SHA-256
        {one["files"]}); {versions}; {one["machine"]}."""
        lines.append(textwrap.fill(" ".join(said.split()), WIDTH) + "\n")
    return "## Where the numbers come from\n\n" + "\n".join(lines)
