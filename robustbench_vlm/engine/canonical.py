"""The canonical pass: how logits are computed wherever they decide anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import IO

import numpy as np
import torch
from torch import Tensor

from robustbench_vlm.errors import AttackError
from robustbench_vlm.types import Classify


def logits(classify: Classify, images: Tensor, rows: int) -> Tensor:
    """The canonical pass: (N, 3, H, W) -> (N, C) float32, every call padded to `rows` rows.

    Raises:
        AttackError: the model returns anything but (rows, C) floats with C of at least 2.
    """
    found = []
    with torch.no_grad():
        for chunk in torch.split(images, rows):
            output = classify(padded(chunk, rows).clone())  # a model may write into its input
            if not isinstance(output, Tensor):
                what = f"a {type(output).__name__}"
                raise AttackError(f"the model returns {what}; expected a tensor of logits ({rows}, classes)")
            shape = tuple(output.shape)
            if len(shape) != 2 or shape[0] != rows or shape[1] < 2 or not output.is_floating_point():
                what = f"{str(output.dtype).removeprefix('torch.')} of shape {shape}"
                wanted = f"logits of shape ({rows}, classes), 2 classes or more (write one score s as (0, s))"
                raise AttackError(f"the model returns {what} for {rows} images; expected {wanted}")
            # A copy, since a model may write its next logits into the same memory.
            found.append(output[: len(chunk)].detach().to(torch.float32, copy=True))
    return torch.cat(found)


class Record:
    """(N, C) canonical logits in a file, written in order and read by position.

    For many images and classes they take more memory than everything else that is known about an image, and
    only those of a few images are needed at a time.
    """

    def __init__(self, file: IO[bytes]) -> None:
        """`file` is empty and open for reading and writing; a temporary one will do."""
        self._file = file
        self._classes = 0

    def add(self, found: Tensor) -> None:
        """Append (n, C) float32, the logits of the next n images."""
        self._classes = found.shape[1]
        self._file.seek(0, os.SEEK_END)
        self._file.write(found.cpu().contiguous().numpy().tobytes())

    def rows(self, positions: Sequence[int]) -> Tensor:
        """(n, C) float32 of the images at n positions, on the CPU."""
        found = np.empty((len(positions), self._classes), dtype=np.float32)
        width = found.itemsize * self._classes
        for row, position in enumerate(positions):
            self._file.seek(position * width)
            found[row] = np.frombuffer(self._file.read(width), dtype=np.float32)
        return torch.from_numpy(found)


def padded(images: Tensor, rows: int) -> Tensor:
    """(n, 3, H, W), n <= rows -> (rows, 3, H, W), filled with copies of the first row."""
    missing = rows - len(images)
    return images if missing == 0 else torch.cat([images, images[:1].expand(missing, *images.shape[1:])])
