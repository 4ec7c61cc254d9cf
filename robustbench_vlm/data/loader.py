"""Training batches as a pure function of the step, so that a resumed run trains on the same batches."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice, tee

import numpy as np
import torch

from robustbench_vlm import rng
from robustbench_vlm.data.dataset import Split
from robustbench_vlm.data.parallel import in_order
from robustbench_vlm.types import Batch

AHEAD = 3  # batches that are decoded in advance where the split does not stay in memory


def as_float(pixels: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1], contiguous; v / 255 exactly as `ToTensor`.

    NumPy computes it, since torch would give the thread that reads ahead a second pool of threads.
    """
    planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return torch.from_numpy(np.divide(planes, np.float32(255), dtype=np.float32))


def batches(
    split: Split,
    batch_size: int,
    seed: int,
    start_step: int,
    stop_step: int,
    px: int,
    rows: slice = slice(None),
) -> Iterator[Batch]:
    """Batches `start_step` to `stop_step - 1`, each of exactly `batch_size` images.

    Batch t holds positions t B to (t + 1) B - 1 of the concatenated epochs, and epoch e is a permutation
    keyed by seed, dataset, split and e. So batch t is the same in every run that reaches it.

    Args:
        split: the training images; with fewer than `batch_size` of them, a batch spans epochs.
        batch_size: B.
        seed: of the run.
        start_step: first step, 0 for a new run.
        stop_step: one past the last step.
        px: the model's input size, for datasets on the model's canvas.
        rows: of each batch, those that are read; all by default.

    Raises:
        DataError: an image cannot be decoded; the message names its key.
        ValueError: an empty split, a batch size below 1, or a negative step.
    """
    if len(split) == 0 or batch_size < 1 or start_step < 0:
        raise ValueError(f"{len(split)} images, batch size {batch_size}, from step {start_step}")
    chosen = (positions(split, batch_size, seed, step)[rows] for step in range(start_step, stop_step))
    labels, keys = split.labels, split.keys
    read = _from_memory if split.fits_in_memory(px) else _decoded
    for where, pixels, shas in read(split, px, chosen):
        names = tuple(keys[i] for i in where)
        yield Batch(as_float(pixels), torch.from_numpy(labels[where]), names, shas)


def ahead(batches: Iterator[Batch], *, pinned: bool = False) -> Iterator[Batch]:
    """The same batches, each made by a thread while the caller works on the one before.

    Args:
        batches: made one after the other.
        pinned: whether images and labels lie in pinned memory, from which a GPU copies while it computes.

    Raises:
        Exception: whatever `batches` raises, when that batch is asked for.
    """

    def following() -> Batch | None:
        batch = next(batches, None)
        return batch.pinned() if batch is not None and pinned else batch

    pool = ThreadPoolExecutor(1)
    try:
        coming = pool.submit(following)
        while (batch := coming.result()) is not None:
            coming = pool.submit(following)
            yield batch
    finally:  # also when the caller stops early: do not wait for a batch that nobody needs
        pool.shutdown(wait=False, cancel_futures=True)


def positions(split: Split, batch_size: int, seed: int, step: int) -> np.ndarray:
    """(B,) int64: the entries of `split` that make up batch `step`."""
    first, last = step * batch_size, (step + 1) * batch_size
    parts = []
    while first < last:
        epoch, offset = divmod(first, len(split))
        order = _order(f"{seed}/{split.card.name}/{split.split}/epoch{epoch}", len(split))
        parts.append(order[offset : offset + last - first])
        first += len(parts[-1])
    return np.concatenate(parts)


@lru_cache(maxsize=4)  # the running epoch and the next; a million positions take 20 ms to shuffle
def _order(name: str, n: int) -> np.ndarray:
    return rng.generator(name).permutation(n)


Pixels = tuple[np.ndarray, np.ndarray, tuple[str, ...]]
"""Of a batch: (B,) positions, (B, H, W, 3) uint8 pixels, and the hash of each image's file."""


def _from_memory(split: Split, px: int, chosen: Iterator[np.ndarray]) -> Iterator[Pixels]:
    """The batches at the chosen positions, from one array that is decoded before the first."""
    images = split.images(px)
    for where in chosen:
        yield where, images.pixels[where], tuple(images.sha256[i] for i in where)


def _decoded(split: Split, px: int, chosen: Iterator[np.ndarray]) -> Iterator[Pixels]:
    """The batches at the chosen positions, decoded a few batches in advance."""
    batch, ahead = tee(chosen)
    first = next(batch, None)
    if first is None:
        return
    positions = (int(i) for where in ahead for i in where)
    examples = in_order(lambda i: split.read(i, px), positions, AHEAD * len(first))
    where: np.ndarray | None = first
    while where is not None:
        found = list(islice(examples, len(where)))
        yield where, np.stack([example.pixels for example in found]), tuple(e.sha256 for e in found)
        where = next(batch, None)
