"""The images of a split as an evaluation reads them: in memory if all fit, else decoded when needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from robustbench_vlm.cards.protocol import Resize
from robustbench_vlm.data.dataset import TOLERATED, Example, Split
from robustbench_vlm.data.parallel import in_order
from robustbench_vlm.errors import DataError

AT_ONCE = 32 * 2**20  # bytes of float32 pixels that are read together


@dataclass(frozen=True)
class CanvasImages:
    """The decodable images of a split on its canvas.

    Attributes:
        split: which images; all of them decode.
        px: the model's input size, used when the canvas is `model`.
        sha256: of each image's file, in hex.
        pixels: (N, H, W, 3) uint8, or `None` if they take more than `dataset.IN_MEMORY` bytes.
    """

    split: Split
    px: int
    sha256: tuple[str, ...]
    pixels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.sha256)

    @property
    def side(self) -> int:
        """H and W of every image."""
        return self.split.side(self.px)

    def floats(self, positions: Sequence[int]) -> Tensor:
        """(n, 3, H, W) float32 in [0, 1] of the images at n positions; v / 255 exactly as `ToTensor`.

        Raises:
            DataError: a file is gone, or its bytes are not those of the first reading.
        """
        found = torch.empty((len(positions), 3, self.side, self.side))
        planes = found.numpy()
        for row, pixels in enumerate(self._pixels(positions)):
            planes[row] = pixels.transpose(2, 0, 1)
        return found.div_(255)

    def parts(self, positions: Sequence[int], rows: int) -> Iterator[Sequence[int]]:
        """The positions in parts whose float pixels take about `AT_ONCE` bytes.

        The length of every part but the last is a multiple of `rows`, the shape of a model call.
        """
        calls = AT_ONCE // (rows * 3 * self.side**2 * np.dtype(np.float32).itemsize)
        size = max(calls, 1) * rows
        return (positions[begin : begin + size] for begin in range(0, len(positions), size))

    def _pixels(self, positions: Sequence[int]) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 of each."""
        if self.pixels is not None:
            yield from (self.pixels[i] for i in positions)
            return
        for i, found in zip(positions, in_order(self._read, positions), strict=True):
            if found.sha256 != self.sha256[i]:
                do = "let nothing write to the data during an evaluation"
                raise DataError(
                    found.key, "its file has changed since the first reading", "the same bytes", do
                )
            yield found.pixels

    def _read(self, i: int) -> Example:
        return self.split.read(i, self.px)


def resized_as(split: Split, stated: Resize) -> Split:
    """The split whose images are brought to a model canvas as a model states.

    A card or protocol with a rule of its own goes first, and a native canvas needs none.
    """
    if split.card.canvas == "native" or split.card.resize != "model":
        return split
    return replace(split, card=split.card.model_copy(update={"resize": stated}))


def decodable_images(split: Split, px: int, tolerated: float = TOLERATED) -> CanvasImages:
    """The images of a split that decode; every image is decoded once to find out.

    Args:
        split: what to read.
        px: the model's input size.
        tolerated: share of undecodable images up to which they are left out; `split.bad` names them.

    Raises:
        DataError: more undecodable images than that; the first ones are named.
    """
    side = split.side(px)
    shape = (len(split), side, side, 3)
    pixels = np.empty(shape, dtype=np.uint8) if split.fits_in_memory(px) else None

    def store(i: int, found: Example) -> None:
        if pixels is not None:
            pixels[i] = found.pixels

    good, hashes = split.scan(px, store, tolerated)
    return CanvasImages(good, px, hashes, None if pixels is None else pixels[: len(good)])
