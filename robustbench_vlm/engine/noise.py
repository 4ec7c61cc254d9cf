"""Random numbers of rows, by default drawn from the rows' own names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from robustbench_vlm import rng


class Noise(Protocol):
    """Random numbers for n rows that are about to start, on the CPU."""

    def uniform(self, shape: tuple[int, ...], part: str = "") -> Tensor:
        """(n, *shape) float32 on [0, 1); several draws of one row have different `part`s."""
        ...

    def normal(self, shape: tuple[int, ...], part: str = "") -> Tensor:
        """(n, *shape) float32, standard normal."""
        ...

    def streams(self) -> Sequence[np.random.Generator]:
        """One generator for each row, for attacks that draw more than a start."""
        ...


@dataclass(frozen=True)
class Keyed:
    """Numbers that are a function of each row's name: the same in any batch, in any order, on any device.

    Attributes:
        names: `seed/key/stage/target/restart` of each row.
    """

    names: tuple[str, ...]

    def uniform(self, shape: tuple[int, ...], part: str = "") -> Tensor:
        """(n, *shape) float32 on [0, 1)."""
        return torch.from_numpy(np.stack([rng.uniform(name, shape) for name in self._named(part)]))

    def normal(self, shape: tuple[int, ...], part: str = "") -> Tensor:
        """(n, *shape) float32, standard normal."""
        return torch.from_numpy(np.stack([rng.normal(name, shape) for name in self._named(part)]))

    def streams(self) -> list[np.random.Generator]:
        """One generator for each row."""
        return [rng.generator(name) for name in self.names]

    def _named(self, part: str) -> list[str]:
        return [f"{name}/{part}" if part else name for name in self.names]
