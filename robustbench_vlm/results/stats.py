"""Intervals and paired tests for counts of verdicts, and means over repetitions; distributions from scipy.

docs/statistics.md gives every formula with its source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import erfc
from scipy.stats import binom, binomtest, t

LEVEL = 0.05
"""p below which a difference is claimed."""


@dataclass(frozen=True)
class Interval:
    """A two-sided interval of a proportion, as fractions."""

    low: float
    high: float


def wilson(hits: int, n: int, confidence: float = 0.95) -> Interval:
    """The Wilson score interval of `hits` of `n` (Wilson 1927), without continuity correction.

    Raises:
        ValueError: not 0 <= hits <= n with n > 0.
    """
    interval = binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return Interval(float(interval.low), float(interval.high))


@dataclass(frozen=True)
class Paired:
    """Two models on the same images.

    Attributes:
        only_a: images that A alone gets right.
        only_b: images that B alone gets right.
        n: images compared.
        p: two-sided exact McNemar p-value: the binomial test of `only_a` against `only_b`.
    """

    only_a: int
    only_b: int
    n: int
    p: float

    @property
    def difference(self) -> float:
        """Accuracy of A minus accuracy of B, as a fraction."""
        return (self.only_a - self.only_b) / self.n


def mcnemar(a: list[bool], b: list[bool]) -> Paired:
    """The exact McNemar test (McNemar 1947) of two lists of verdicts over the same images, in the same order.

    Raises:
        ValueError: lists of different length, or empty ones.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} verdicts, expected equally many and at least one")
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    return Paired(only_a, only_b, len(a), float(sign_test(only_a, only_b)))


def sign_test(more: ArrayLike, less: ArrayLike) -> np.ndarray:
    """Two-sided exact p-values that `more` and `less` are tosses of a fair coin; 1 without a toss.

    Args:
        more: integers.
        less: integers of the same shape, or of one that broadcasts.
    """
    a, b = np.asarray(more), np.asarray(less)
    p: np.ndarray = np.minimum(1.0, 2 * binom.cdf(np.minimum(a, b), a + b, 0.5))
    return p


@dataclass(frozen=True)
class Stratified:
    """Two models on the same images of several datasets, each of which counts alike.

    Attributes:
        difference: mean over datasets of the accuracy of A minus that of B, as a fraction.
        n: images compared, over all datasets.
        p: two-sided; see `stratified_p`.
    """

    difference: float
    n: int
    p: float


def stratified(tests: Sequence[Paired]) -> Stratified:
    """The test of the mean over datasets, from the paired counts of each.

    Raises:
        ValueError: no datasets.
    """
    if not tests:
        raise ValueError("a mean over no datasets")
    counts = np.array([(test.only_a, test.only_b, test.n) for test in tests]).T
    difference = math.fsum(test.difference for test in tests) / len(tests)
    return Stratified(difference, sum(test.n for test in tests), float(stratified_p(*counts)))


def stratified_p(only_a: np.ndarray, only_b: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Two-sided p-values of the hypothesis that two models have the same mean over K datasets.

    With a_k and b_k images that one model alone gets right, and d_k = (a_k - b_k) / n_k, the statistic is

        z = (|sum d_k| - w) / sqrt(sum (a_k + b_k) / n_k^2 + w^2),  w = 1 / min n_k

    against the normal distribution. The variance of a dataset is that under a difference of zero, which is
    never below the estimate without this assumption, smaller by d_k^2 / n_k. Few images make the normal
    distribution a poor one, so one image of the smallest dataset is taken from the difference (as Edwards
    1948 does for one dataset) and one is added to those that tell the models apart. For K = 1 the test is
    `sign_test`.

    Args:
        only_a: (..., K) images of each dataset that A alone gets right.
        only_b: (..., K) images that B alone gets right.
        n: (K,) images compared.

    Returns:
        (...) p-values.
    """
    if np.shape(only_a)[-1] == 1:
        return sign_test(only_a[..., 0], only_b[..., 0])
    one = 1 / n.min()
    distance = np.abs(((only_a - only_b) / n).sum(axis=-1)) - one
    deviation = np.sqrt(((only_a + only_b) / n**2).sum(axis=-1) + one**2)
    p: np.ndarray = erfc(np.maximum(distance, 0.0) / deviation / math.sqrt(2))
    return p


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of Holm (1979): each may be compared with the level of the whole family.

    NaN stays NaN and does not count.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    running = 0.0
    for rank, (p, i) in enumerate(known):
        running = max(running, min(1.0, (len(known) - rank) * p))
        adjusted[i] = running
    return adjusted


@dataclass(frozen=True)
class Mean:
    """A mean over repetitions.

    Attributes:
        value: the mean.
        low, high: two-sided 95 % interval; NaN for a single repetition, whose spread is unknown.
    """

    value: float
    low: float
    high: float


def t_mean(values: Sequence[float]) -> Mean:
    """Mean of independent repetitions, with Student's t interval: mean ± t(0.975, n - 1) s / sqrt(n).

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a mean of nothing")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Mean(mean, math.nan, math.nan)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Mean(mean, mean - half, mean + half)
