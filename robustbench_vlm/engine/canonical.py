"""The canonical pass: how a model's logits are computed wherever they decide anything."""

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
            said = classify(padded(chunk, rows).clone())  # a model may write into its input
            if not isinstance(said, Tensor):
                what = f"a {type(said).__name__}"
                raise AttackError(f"the model returns {what}; expected a tensor of logits ({rows}, classes)")
            if said.ndim != 2 or len(said) != rows or said.shape[1] < 2 or not said.is_floating_point():
                what = f"{str(said.dtype).removeprefix('torch.')} of shape {tuple(said.shape)}"
                wanted = f"logits of shape ({rows}, classes), 2 classes or more (write one score s as (0, s))"
                raise AttackError(f"the model returns {what} for {rows} images; expected {wanted}")
            found.append(said[: len(chunk)].detach().float())
    return torch.cat(found)


class Record:
    """(N, C) canonical logits, written down in order and read again by position.

    Of many images and classes they take more memory than all else that is known about an image, and little
    of them is wanted at a time.
    """

    def __init__(self, file: IO[bytes]) -> None:
        """`file` is empty; a temporary one will do."""
        self._file = file
        self._classes = 0

    def add(self, found: Tensor) -> None:
        """(n, C) float32, of the next n images."""
        self._classes = found.shape[1]
        self._file.seek(0, os.SEEK_END)
        self._file.write(found.cpu().contiguous().numpy().tobytes())

    def rows(self, positions: Sequence[int]) -> Tensor:
        """(n, C) float32 of the images at n positions, on the CPU."""
        found = np.empty((len(positions), self._classes), dtype=np.float32)
        width = found.itemsize * self._classes
        for place, i in enumerate(positions):
            self._file.seek(i * width)
            found[place] = np.frombuffer(self._file.read(width), dtype=np.float32)
        return torch.from_numpy(found)


def position_dependence(classify: Classify, images: Tensor, rows: int) -> float:
    """Largest change of a logit when the same images stand in other rows of the same shape.

    Anything but 0 means that the numbers of a row depend on which row it is, and then findings may differ in
    their last bits with scheduling. For integrity checks and self-tests.
    """
    batch = padded(images[:rows], rows)
    straight = logits(classify, batch, rows)
    turned = logits(classify, batch.roll(rows // 2 + 1, 0), rows).roll(-(rows // 2 + 1), 0)
    return float((straight - turned).abs().max())


def padded(images: Tensor, rows: int) -> Tensor:
    """(n, 3, H, W), n <= rows -> (rows, 3, H, W), filled with copies of the first row."""
    missing = rows - len(images)
    return images if missing == 0 else torch.cat([images, images[:1].expand(missing, *images.shape[1:])])
