"""Write the tiny world to disk in the layout of every other dataset, so that the demo runs the same code."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from robustbench_vlm import store
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import dataset, layout
from robustbench_vlm.data.tiny.worlds import WORLDS, images, labels
from robustbench_vlm.errors import InputError, nearest

Progress = Callable[[str, int, int], None]
"""Called as (`dataset/split`, images written, images in all)."""

PER_SHARD = 10_000  # the exporter's own cap
CHUNK = 500  # images drawn at a time
PNG_LEVEL = 3  # lossless at every level; higher ones are slower and hardly smaller


def make(root: Path, only: Sequence[str] | None = None, progress: Progress | None = None) -> list[Path]:
    """Write every dataset of the tiny world below `root`; finished splits are left alone.

    The same bytes come out however often, and however interrupted, it is run.

    Args:
        root: data root.
        only: names of datasets; all by default.
        progress: called after every few hundred images.

    Returns:
        The folders, in the order of the world.

    Raises:
        InputError: an unknown name in `only`.
        DataError: files of something else are in the way.
    """
    for name in only or ():
        if name not in WORLDS:
            raise InputError(f"dataset {name!r}", "not in the tiny world", do=nearest(name, WORLDS))
    folders = []
    for world in WORLDS.values():
        if only is not None and world.name not in only:
            continue
        folder = root / world.folder
        layout.write_texts(folder, list(world.classes), world.templates)
        for split, size in world.size.items():
            layout.write_split(folder, split, samples(world.name, split, size, progress), PER_SHARD)
        folders.append(folder)
    return folders


def make_missing(root: Path, progress: Progress, only: Sequence[str] | None = None) -> list[Path]:
    """Render the datasets of the tiny world that are not below `root` yet; returns the folders made.

    Args:
        root: folder of all datasets.
        progress: called with (what, done, total).
        only: names of datasets; those that are not of the tiny world are ignored. Default: all of it.

    Raises:
        InputError: a dataset is missing, and `root` cannot be written.
    """
    made: list[Path] = []
    for name in reader.names("datasets") if only is None else only:
        card = reader.read("datasets", name, DatasetCard)
        if card.made_by == "tiny" and any(dataset.missing([card], root, split) for split in card.size):
            with store.explained(root, "--data-root"):
                made += make(root, [reader.plain_name(name)], progress)
    return made


def samples(name: str, split: str, size: int, progress: Progress | None = None) -> Iterator[layout.Sample]:
    """The first `size` samples of a split, encoded as PNG, drawn when asked for."""
    for start in range(0, size, CHUNK):
        index = np.arange(start, min(start + CHUNK, size))
        pixels, classes = images(name, split, index), labels(name, index)
        for i, image, label in zip(index, pixels, classes, strict=True):
            yield f"s{i:07d}", png(image), "png", int(label)
        if progress is not None:
            progress(f"{name}/{split}", int(index[-1]) + 1, size)


def png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()
