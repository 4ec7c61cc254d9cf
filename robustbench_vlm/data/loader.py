"""Training batches as a pure function of the step: a resumed run sees what an uninterrupted one saw."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from robustbench_vlm import rng
from robustbench_vlm.data.dataset import Example, Split, threads
from robustbench_vlm.types import Batch

IN_MEMORY = 512 * 2**20  # bytes of uint8 pixels up to which a split is decoded once and kept
AHEAD = 3  # batches decoded in advance when it is not kept


def as_float(pixels: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1], contiguous; v / 255 exactly as `ToTensor`."""
    planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return planes.to(torch.float32).div_(255)


def batches(
    split: Split, batch_size: int, seed: int, start_step: int, stop_step: int, px: int
) -> Iterator[Batch]:
    """Batches `start_step` to `stop_step - 1`, each of exactly `batch_size` images.

    Batch t holds positions t B to (t + 1) B - 1 of the concatenated epochs, and epoch e is a permutation
    keyed by seed, dataset, split and e: batch t is the same whenever and from wherever it is asked for.

    Args:
        split: the training images; fewer than `batch_size` is allowed, a batch then spans epochs.
        batch_size: B.
        seed: of the run.
        start_step: first step, 0 for a new run.
        stop_step: one past the last step.
        px: the model's input size, for datasets on the model's canvas.

    Raises:
        DataError: an image that cannot be decoded; the message names its key.
        ValueError: an empty split, or sizes that make no sense.
    """
    if len(split) == 0 or batch_size < 1 or start_step < 0:
        raise ValueError(f"{len(split)} images, batch size {batch_size}, from step {start_step}")
    chosen = (positions(split, batch_size, seed, step) for step in range(start_step, stop_step))
    labels, keys = split.labels, split.keys
    kept = len(split) * split.side(px) ** 2 * 3 <= IN_MEMORY
    for where, pixels, shas in _kept(split, px, chosen) if kept else _streamed(split, px, chosen):
        named = tuple(keys[i] for i in where)
        yield Batch(as_float(pixels), torch.from_numpy(labels[where]), named, shas)


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


Piece = tuple[np.ndarray, np.ndarray, tuple[str, ...]]
"""Positions, pixels and hashes of a batch."""


def _kept(split: Split, px: int, chosen: Iterator[np.ndarray]) -> Iterator[Piece]:
    """Each batch from one array decoded at the first."""
    images = split.images(px)
    for where in chosen:
        yield where, images.pixels[where], tuple(images.sha256[i] for i in where)


def _streamed(split: Split, px: int, chosen: Iterator[np.ndarray]) -> Iterator[Piece]:
    """Each batch decoded by threads, a few batches ahead."""
    waiting: deque[tuple[np.ndarray, list[Future[Example]]]] = deque()
    pool = ThreadPoolExecutor(threads())

    def piece(where: np.ndarray, futures: list[Future[Example]]) -> Piece:
        found = [future.result() for future in futures]
        return where, np.stack([example.pixels for example in found]), tuple(e.sha256 for e in found)

    try:
        for where in chosen:
            waiting.append((where, [pool.submit(split.read, int(i), px) for i in where]))
            if len(waiting) > AHEAD:
                yield piece(*waiting.popleft())
        for ready in waiting:
            yield piece(*ready)
    finally:  # also when the caller stops early or an image is bad: nobody waits for what is not needed
        pool.shutdown(wait=False, cancel_futures=True)
