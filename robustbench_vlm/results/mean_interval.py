"""The interval of a mean over datasets, which keeps its coverage near 0 and 1 too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri
from scipy.stats import beta

from robustbench_vlm.results import stats
from robustbench_vlm.results.stats import Interval


def mean_interval(counts: Sequence[tuple[int, int]], confidence: float = 0.95) -> Interval:
    """Interval of the unweighted mean of independent proportions, each (hits, n).

    At 95 % the interval of one proportion is Wilson's, as in the row of its dataset.

    Raises:
        ValueError: no proportions, or counts that cannot be.
    """
    if not counts:
        raise ValueError("a mean of no proportions")
    hits, n = np.array(counts).T
    if (n < 1).any() or (hits < 0).any() or (hits > n).any():
        raise ValueError(f"{counts}: expected 0 <= hits <= n with n > 0")
    if len(counts) == 1 and confidence == 0.95:
        return stats.wilson(*counts[0])
    low, high = limits(hits, n, confidence)
    return Interval(float(low), float(high))


def limits(hits: np.ndarray, n: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Limits of the mean of K independent proportions; for K = 1 those of Clopper and Pearson (1934).

    The upper limit of one proportion is a quantile of Beta(hits + 1, n - hits). Here each proportion is
    Beta(hits, n - hits), and one of them gets the further hit: the one that raises the limit most. The
    distribution of the mean is taken to be a beta distribution of the same mean and variance, over the range
    that the mean has while proportions without hits, or with nothing but hits, stand still. The lower limit
    is the upper limit of the misses. For rare hits this is the interval of Fay and Feuer (1997).

    Args:
        hits: (..., K) integers.
        n: of a shape that broadcasts with it.
        confidence: two-sided.

    Returns:
        (...) lower and upper limits.
    """
    hits, n = np.broadcast_arrays(hits, n)
    return 1 - _upper(n - hits, n, (1 + confidence) / 2), _upper(hits, n, (1 + confidence) / 2)


def _upper(hits: np.ndarray, n: np.ndarray, level: float) -> np.ndarray:
    """One-sided upper limits at a level; arrays of shape (..., K)."""
    count = hits.shape[-1]
    (before, spread), (after, wider) = _moments(hits, n - hits), _moments(hits + 1, n - hits)
    means = (before.sum(-1, keepdims=True) - before + after) / count
    variances = (spread.sum(-1, keepdims=True) - spread + wider) / count**2
    raised = np.argmax(means + ndtri(level) * np.sqrt(variances), axis=-1)[..., None]

    def chosen(values: np.ndarray) -> np.ndarray:
        taken: np.ndarray = np.take_along_axis(values, raised, -1)[..., 0]
        return taken

    mean, variance, zero = chosen(means), chosen(variances), hits == 0
    floor = (hits == n).sum(-1) / count
    width = 1 - (zero.sum(-1) - chosen(zero)) / count - floor
    moving = variance > 0  # nothing but hits everywhere: the limit is 1
    share = np.divide(mean - floor, width, out=np.full_like(mean, 0.5), where=moving)
    relative = np.divide(variance, width**2, out=np.full_like(mean, 0.05), where=moving)
    size = share * (1 - share) / relative - 1
    quantile = beta.ppf(level, share * size, (1 - share) * size)
    return np.where(moving, floor + width * quantile, 1.0)


def _moments(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of Beta(a, b); of a point mass where one of them is 0."""
    size = a + b
    return a / size, a * b / (size**2 * (size + 1.0))


def leave_one_out(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Smallest and largest mean with one of the proportions left out.

    This is the sensitivity of the mean to the choice of datasets. It is no interval: nobody drew the datasets
    at random.

    Raises:
        ValueError: fewer than two proportions.
    """
    if len(counts) < 2:
        raise ValueError(f"{len(counts)} proportions, expected two at least")
    shares = [hits / n for hits, n in counts]
    means = [(sum(shares) - share) / (len(shares) - 1) for share in shares]
    return min(means), max(means)
