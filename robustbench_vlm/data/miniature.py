"""A miniature of a dataset: its real layout, class names and templates with a few generated images.

It replaces a dataset that is not on disk, so that everything can be tried except the numbers. The images have
structure (gradients, a shape for each class, noise) and no meaning, so a model classifies nearly all of them
wrongly. Other labels can be written instead, for example the model's own predictions (`labels`).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from robustbench_vlm import rng, store
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import layout, shards
from robustbench_vlm.errors import DataError, InputError

MARKER = "miniature.txt"
"""Name of a file in the dataset's folder that marks its images as generated."""

SHARDS = 3
FLAT = 0.03  # standard deviation of grey below which a picture shows nothing
LUMA = np.array([0.299, 0.587, 0.114])
SHORT = (64, 96, 150, 224, 260, 300)  # shorter side in pixels: some smaller than a model's input, some larger
ASPECT = (1.0, 4 / 3, 3 / 4, 16 / 9, 1.0, 1 / 2)  # width : height
NATIVE_FORMATS = (("png", "RGB"), ("webp", "RGB"))  # lossless: a native canvas is attacked pixel by pixel
FORMATS = (("jpg", "RGB"), ("png", "RGB"), ("webp", "RGB"), ("png", "P"), ("jpg", "L"), ("png", "L"))
SETTINGS: Mapping[str, tuple[str, dict[str, int | bool]]] = {
    "jpg": ("JPEG", {"quality": 90}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True, "method": 0}),
}


def make(
    card: DatasetCard,
    root: Path,
    per_class: int | None = None,
    n: int = 32,
    seed: int = 0,
    split: str = "test",
    labels: Mapping[str, int] | None = None,
) -> Path:
    """Write a miniature of `card` below `root`, unless its split is finished there.

    Same arguments, same bytes; the images do not depend on `labels`, so they can be made, classified, and
    made again elsewhere with the classes found.

    Args:
        card: the dataset; its names and templates are written in full.
        root: data root; the dataset goes to `root / card.folder`.
        per_class: images of every class; overrides `n`.
        n: images in all, spread evenly over the classes.
        seed: another one gives other images.
        split: name of the split.
        labels: class index by member name (`s0000000`, ...), for any of the images.

    Returns:
        The dataset's folder.

    Raises:
        InputError: `n` or `per_class` is not positive.
        DataError: a label or member name that cannot be; other labels than those of a finished split; or
            files of another dataset are in the way.
    """
    count = n if per_class is None else per_class * card.n_classes
    if count < 1:
        raise InputError(f"miniature of {card.name}", f"{count} images", "at least one")
    classes = _classes(card, count, f"{seed}/{card.name}/{split}")
    written = _written(card, classes, labels or {})
    folder = root / card.folder
    if (folder / split / layout.NSHARDS).is_file():
        if labels is not None:
            _same_labels(folder / split, card, written)
        return folder
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise DataError(str(folder), "files of the real dataset", "none", "choose another root")
    mark = f"Generated images, not {card.title}: numbers on them say nothing.\n"
    store.write(folder / MARKER, mark.encode())
    names = card.names or tuple(f"class {i}" for i in range(card.n_classes))
    layout.write_texts(folder, names, card.templates)
    samples = _samples(card, classes, written, f"{seed}/{split}")
    layout.write_split(folder, split, samples, per_shard=-(-count // SHARDS))
    return folder


def member(i: int) -> str:
    """Name of image `i`, as other exporters of this layout spell it."""
    return f"s{i:07d}"


def picture(name: str, kind: str, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8: a shape on a gradient, under noise.

    Args:
        name: determines the gradient, the position of the shape and the noise.
        kind: determines the shape and its colour.
        width: pixels.
        height: pixels.
    """
    own, shared = rng.generator(name), rng.generator(kind)
    scale = min(width, height) / 2
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = (x - width / 2) / scale, (y - height / 2) / scale  # the shorter side is [-1, 1]
    angle = own.uniform(0, 2 * np.pi)
    ramp = ((x * np.cos(angle) + y * np.sin(angle)) / 4 + 0.5).clip(0, 1)[..., None]
    canvas = own.uniform(0, 1, 3) * ramp + own.uniform(0, 1, 3) * (1 - ramp)
    colour, shape, turn = shared.uniform(0, 1, 3), shared.integers(5), shared.uniform(0, np.pi)
    x, y = x - own.uniform(-0.3, 0.3), y - own.uniform(-0.3, 0.3)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    radius = np.hypot(u, v)
    mask = (
        radius < 0.6,
        np.maximum(abs(u), abs(v)) < 0.5,
        abs(radius - 0.5) < 0.15,
        np.sin(9 * u) > 0.2,
        np.sin(7 * u) * np.sin(7 * v) > 0,
    )[shape]
    canvas = np.where(mask[..., None], colour, canvas)
    if (canvas @ LUMA).std() < FLAT:  # colours that happen to be alike when they become grey
        canvas = canvas + 0.6 * (ramp - 0.5)
    canvas = canvas + own.normal(0, 0.04, (height, width, 3))
    found: np.ndarray = (canvas * 255).round().clip(0, 255).astype(np.uint8)
    return found


def encode(pixels: np.ndarray, extension: str, mode: str) -> bytes:
    """A (height, width, 3) uint8 image as the bytes of a `jpg`, `png` or `webp` of Pillow mode `mode`."""
    image = Image.fromarray(pixels)
    image = image.quantize(64) if mode == "P" else image.convert(mode)
    form, settings = SETTINGS[extension]
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def _classes(card: DatasetCard, count: int, name: str) -> list[int]:
    """Class index of each image: a shuffled round through the classes, over and over."""
    order = rng.generator(f"{name}/classes").permutation(card.n_classes)
    return [int(order[i % card.n_classes]) for i in range(count)]


def _written(card: DatasetCard, classes: list[int], labels: Mapping[str, int]) -> list[int]:
    """The class index that is written for each image: the caller's, if given."""
    known = {member(i) for i in range(len(classes))}
    for name, label in labels.items():
        where = f"miniature of {card.name}, label of {name!r}"
        if name not in known:
            raise DataError(where, "no such image", f"{member(0)} to {member(len(classes) - 1)}")
        if not 0 <= label < card.n_classes:
            raise DataError(where, str(label), f"an integer from 0 to {card.n_classes - 1}")
    return [labels.get(member(i), own) for i, own in enumerate(classes)]


def _same_labels(split: Path, card: DatasetCard, written: list[int]) -> None:
    index = shards.index_shards(split, card.n_classes)
    found = {sample.name: sample.label for sample in index.samples}
    if found != {member(i): label for i, label in enumerate(written)}:
        do = "choose another root"
        raise DataError(str(split), "finished, with other labels or images", "the labels asked for", do)


def _samples(card: DatasetCard, classes: list[int], written: list[int], name: str) -> Iterator[layout.Sample]:
    native = card.canvas == "native"
    formats = NATIVE_FORMATS if native else FORMATS
    start = int(hashlib.sha256(f"{name}/{card.name}".encode()).hexdigest(), 16)  # not all begin alike
    for i, (kind, label) in enumerate(zip(classes, written, strict=True)):
        turn = start + i
        extension, mode = formats[turn % len(formats)]
        # a step of its own for each list, so that formats, sizes and aspects meet in all combinations
        short, aspect = SHORT[turn // 2 % len(SHORT)], ASPECT[turn // 5 % len(ASPECT)]
        width, height = round(short * max(aspect, 1)), round(short * max(1 / aspect, 1))
        if native:
            width = height = card.native_px
        pixels = picture(f"{name}/{card.name}/{i}", f"{card.name}/{kind}", width, height)
        yield member(i), encode(pixels, extension, mode), extension, label
