"""Intervals and paired tests for counts of verdicts, and means over repetitions; distributions from scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, t

from robustbench_vlm import rng

DRAWS = 4000  # of a bootstrap


@dataclass(frozen=True)
class Interval:
    """A two-sided 95 % interval of a proportion, as fractions."""

    low: float
    high: float


def wilson(hits: int, n: int) -> Interval:
    """The Wilson score interval of `hits` of `n` (Wilson 1927), 95 %, without continuity correction.

    Raises:
        ValueError: not 0 <= hits <= n with n > 0.
    """
    interval = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def wilson_mean(counts: Sequence[tuple[int, int]]) -> Interval:
    """95 % interval of the unweighted mean of independent proportions, each (hits, n).

    The distances of the single Wilson limits from their proportions are added as a sum of squares (MOVER: Zou
    and Donner, Stat. Med. 2008). For one proportion it is the Wilson interval. Without any hit its width is
    not zero.

    Raises:
        ValueError: no proportions, or counts that cannot be.
    """
    if not counts:
        raise ValueError("a mean of no proportions")
    singles = [(hits / max(n, 1), wilson(hits, n)) for hits, n in counts]
    mean = sum(share for share, _ in singles) / len(singles)
    below = math.hypot(*(share - interval.low for share, interval in singles)) / len(singles)
    above = math.hypot(*(interval.high - share for share, interval in singles)) / len(singles)
    return Interval(max(0.0, mean - below), min(1.0, mean + above))


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
    decided = only_a + only_b
    p = float(binomtest(only_a, decided).pvalue) if decided else 1.0
    return Paired(only_a, only_b, len(a), p)


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


def crossed_mean(tables: Sequence[np.ndarray], name: str) -> Mean:
    """Mean over tables of the mean of each, with a 95 % interval over rows and columns together.

    Both are drawn anew with replacement, the rows of all tables as one and the columns of each table for
    itself: the pigeonhole bootstrap (Owen 2007, Ann. Appl. Stat. 1:386). Of S rows S - 1 are drawn, which
    makes the variance over rows unbiased (Rao and Wu 1988). The limits are percentiles of 4,000 draws; with
    few rows they are narrower than Student's t would have them.

    Args:
        tables: one or more (S, n_t), a row a repetition and a column an image; S is the same in all.
        name: what the random numbers are a function of.

    Raises:
        ValueError: no tables, or tables of different numbers of rows.
    """
    rows = {len(table) for table in tables}
    if len(rows) != 1:
        raise ValueError(f"{len(tables)} tables with {sorted(rows)} rows, expected one number of rows")
    (count,) = rows
    draw = rng.generator(f"bootstrap/{name}")
    drawn = max(count - 1, 1)
    chosen = draw.multinomial(drawn, np.full(count, 1 / count), DRAWS) / drawn
    means = np.zeros(DRAWS)
    for table in tables:
        n = table.shape[1]
        images = draw.multinomial(n, np.full(n, 1 / n), DRAWS) / n
        means += ((chosen @ table) * images).sum(1) / len(tables)
    value = math.fsum(float(table.mean()) for table in tables) / len(tables)
    if count == 1:
        return Mean(value, math.nan, math.nan)
    low, high = np.quantile(means, [0.025, 0.975])
    return Mean(value, float(low), float(high))


def first_reach(steps: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """The step at which a curve, linear between its points, first reaches `target`; None if it never does.

    Raises:
        ValueError: lists of different length, or empty ones.
    """
    if len(steps) != len(values) or not steps:
        raise ValueError(f"{len(steps)} steps and {len(values)} values, expected equally many, at least one")
    if values[0] >= target:
        return float(steps[0])
    for i in range(1, len(steps)):
        if values[i] >= target:
            share = (target - values[i - 1]) / (values[i] - values[i - 1])
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return None
