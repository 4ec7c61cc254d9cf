"""Intervals and tests by resampling training seeds and images together.

Images are drawn with replacement within their dataset, and the same images for all models (Efron 1979).
Seeds are drawn with replacement too, one fewer than there are: so the variance of a mean over few seeds is
estimated without bias (Rao and Wu, JASA 1988). Both draws are shared by the models that are compared, whose
runs of one seed saw the same training images in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

DRAWS = 2000
LOST = 0.025  # share of draws in which a statistic may be without a value


@dataclass(frozen=True)
class Models:
    """Models of one method under one measurement, on the datasets of one group.

    Attributes:
        verdicts: by dataset, (S, P, 2, N) bool: seeds, interpolations, clean and robust, images.
    """

    verdicts: Mapping[str, np.ndarray]

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return int(next(iter(self.verdicts.values())).shape[0])

    @property
    def images(self) -> int:
        """Number of images, over all datasets."""
        return sum(bits.shape[-1] for bits in self.verdicts.values())

    def points(self) -> np.ndarray:
        """(P, 2) clean and robust accuracy in points: mean over datasets and seeds."""
        found: np.ndarray = self.of_seeds().mean(axis=0)
        return found

    def of_seeds(self) -> np.ndarray:
        """(S, P, 2) the same for each seed."""
        shares: np.ndarray = np.mean([bits.mean(axis=3) for bits in self.verdicts.values()], axis=0)
        return 100 * shares


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval, and the p-value of the hypothesis that it is zero.

    Attributes:
        value: of the models as they are; NaN where it has none.
        low, high: percentiles of the draws; NaN where more than `LOST` of the draws have no value.
        p: two-sided; at least 2 / (draws + 1).
    """

    value: float
    low: float
    high: float
    p: float


Statistics = Callable[[Sequence[np.ndarray]], Sequence[float]]
"""From the (P, 2) points of each group of models to some numbers; NaN where one has no value."""


def estimates(models: Sequence[Models], statistics: Statistics, *, draws: int = DRAWS) -> list[Estimate]:
    """Statistics of models with their intervals, all from the same draws.

    Args:
        models: each on the same datasets and images; with the same seeds, or a single one.
        statistics: of the points.
        draws: of seeds and images.

    Raises:
        ValueError: models on other images or with other numbers of seeds.
    """
    shapes = {
        (name, one.verdicts[name].shape[0], one.verdicts[name].shape[-1])
        for one in models
        for name in one.verdicts
    }
    if len(shapes) != len(models[0].verdicts):
        raise ValueError("models with other seeds or images cannot be paired")
    values = statistics([one.points() for one in models])
    drawn = _draws(models, draws)
    found = np.array([statistics([points[draw] for points in drawn]) for draw in range(draws)])
    return [_estimate(value, column) for value, column in zip(values, found.T, strict=True)]


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    known = drawn[~np.isnan(drawn)]
    if math.isnan(value) or len(known) < (1 - LOST) * len(drawn):
        return Estimate(value, math.nan, math.nan, math.nan)
    low, high = np.percentile(known, [2.5, 97.5])
    tail = 1 + min((known <= 0).sum(), (known >= 0).sum())
    return Estimate(value, float(low), float(high), min(1.0, 2 * float(tail) / (len(known) + 1)))


def _draws(models: Sequence[Models], draws: int) -> list[np.ndarray]:
    """(draws, P, 2) points of every group of models, from the same seeds and images.

    Products of matrices have whole numbers alone, which float32 adds without rounding up to 2**24 images: so
    no draw depends on the order in which a machine adds them, and pages have equal bytes everywhere.
    """
    names = sorted(models[0].verdicts)
    sizes = tuple(models[0].verdicts[name].shape[-1] for name in names)
    of_seeds, of_sets = _counts(models[0].seeds, sizes, draws)
    found = [np.zeros((draws, *one.points().shape)) for one in models]
    for name, of_images in zip(names, of_sets, strict=True):
        for one, total in zip(models, found, strict=True):
            bits = one.verdicts[name].astype(np.float32)
            right = np.einsum("spkn,rn->rspk", bits, of_images, optimize=True).astype(np.float64)
            total += np.einsum("rspk,rs->rpk", right, of_seeds) / (of_seeds[0].sum() * bits.shape[-1])
    return [100 * total / len(names) for total in found]


@lru_cache(maxsize=4)  # a study asks for the same few again and again, and drawing is most of the work
def _counts(seeds: int, sizes: tuple[int, ...], draws: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """How often each seed is in each draw, (draws, S), and each image of each dataset, (draws, N)."""
    rng = np.random.default_rng(0)
    of_seeds = rng.multinomial(max(seeds - 1, 1), np.full(seeds, 1 / seeds), size=draws)
    of_sets = [rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float32) for n in sizes]
    return of_seeds.astype(np.float64), of_sets
