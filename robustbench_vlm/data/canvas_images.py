"""Pixels of a split when they are needed: kept in memory where all of them fit, decoded again elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustbench_vlm.data.dataset import TOLERATED, Example, Split, in_order
from robustbench_vlm.data.loader import IN_MEMORY
from robustbench_vlm.errors import DataError

AT_ONCE = 32 * 2**20  # bytes of float32 pixels that are read together


@dataclass(frozen=True)
class Canvases:
    """The images of a split on the canvas.

    Attributes:
        split: which images, all of them whole.
        px: the model's input size, used when the canvas is `model`.
        sha256: of each image's file, in hex.
        kept: (N, H, W, 3) uint8, or None where they are too many to be kept.
    """

    split: Split
    px: int
    sha256: tuple[str, ...]
    kept: np.ndarray | None

    def __len__(self) -> int:
        return len(self.sha256)

    @property
    def side(self) -> int:
        """H and W of every image."""
        return self.split.side(self.px)

    def floats(self, positions: Sequence[int]) -> Tensor:
        """(n, 3, H, W) float32 in [0, 1] of the images at n positions; v / 255 exactly as `ToTensor`.

        Raises:
            DataError: a file is gone, or is no longer the one that was there.
        """
        found = torch.empty((len(positions), 3, self.side, self.side))
        planes = found.numpy()
        for place, pixels in enumerate(self._pixels(positions)):
            planes[place] = pixels.transpose(2, 0, 1)
        return found.div_(255)

    def parts(self, positions: Sequence[int], rows: int) -> Iterator[Sequence[int]]:
        """The positions in parts that may be in memory together: each but the last fills calls of `rows`."""
        calls = AT_ONCE // (rows * 3 * self.side**2 * np.dtype(np.float32).itemsize)
        size = max(calls, 1) * rows
        return (positions[begin : begin + size] for begin in range(0, len(positions), size))

    def _pixels(self, positions: Sequence[int]) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 of each."""
        if self.kept is not None:
            yield from (self.kept[i] for i in positions)
            return
        for i, found in zip(positions, in_order(self._read, positions), strict=True):
            if found.sha256 != self.sha256[i]:
                do = "let nothing write to the data while they are evaluated"
                raise DataError(found.key, "another file than at the start", "the same bytes", do)
            yield found.pixels

    def _read(self, i: int) -> Example:
        return self.split.read(i, self.px)


def sound(split: Split, px: int, tolerated: float = TOLERATED) -> Canvases:
    """The images of a split that decode; all are decoded once, to know which.

    Args:
        split: what to read.
        px: the model's input size.
        tolerated: share of bad images up to which the others are used; they are named in `split.bad`.

    Raises:
        DataError: more bad images than that; the first ones are named.
    """
    side = split.side(px)
    fits = len(split) * side**2 * 3 <= IN_MEMORY
    kept = np.empty((len(split), side, side, 3), dtype=np.uint8) if fits else None

    def keep(place: int, found: Example) -> None:
        if kept is not None:
            kept[place] = found.pixels

    whole, hashes = split.scan(px, keep, tolerated)
    return Canvases(whole, px, hashes, None if kept is None else kept[: len(whole)])
