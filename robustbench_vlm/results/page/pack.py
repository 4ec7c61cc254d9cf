"""How verdicts travel inside the page: one bit an image, and names without what they have in common."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import pandas as pd

from robustbench_vlm import safe_text


def bits(values: np.ndarray) -> str:
    """(N,) bool as base64: image i is bit i % 8, counted from the lowest, of byte i // 8."""
    return base64.b64encode(np.packbits(values.astype(bool), bitorder="little").tobytes()).decode()


def names(keys: Sequence[str]) -> list[str]:
    """The longest common beginning of some names, and all their endings in one text, a line each.

    Characters that are not printable, line ends among them, are written as `safe_text.line` writes them.
    """
    safe = [safe_text.line(key) for key in keys]
    first, last = min(safe), max(safe)  # what these two share, all share
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    common = "".join(letter for letter, _ in same)
    return [common, "\n".join(key[len(common) :] for key in safe)]


def octave(iteration: int) -> int:
    """The bin of a histogram over iterations: 0, 1, 2 to 3, 4 to 7, 8 to 15, ..."""
    return iteration.bit_length()


def iterations(found: pd.DataFrame, stages: Sequence[str]) -> list[list[int]]:
    """For each stage, in how many images it succeeded, by `octave` of the iteration of the success.

    Args:
        found: the verdicts; an image that was broken at a smaller radius counts with its iteration there.
        stages: names of the chain's stages, in order.
    """
    histograms: list[list[int]] = []
    for stage in stages:
        bins = [octave(max(int(i), 0)) for i in found.iteration[found.broken_by == stage]]
        histograms.append(np.bincount(bins).tolist() if bins else [])
    return histograms


class Pool:
    """Distinct values in order of first use, so that what many rows share is written once."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def number(self, value: Any) -> int:  # noqa: ANN401 - any hashable value
        """The position of a value in `values`."""
        return self._numbers.setdefault(value, len(self._numbers))

    @property
    def values(self) -> list[Any]:
        """All values, each once."""
        return list(self._numbers)
