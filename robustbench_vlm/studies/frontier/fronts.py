"""Pareto fronts of clean and robust accuracy: who lies on them, how high they are, and what they enclose.

A front is an array (K, 2) of points (clean, robust), by rising clean accuracy and so by falling robust
accuracy. Between neighbours it is taken as linear. Two fronts are compared where both have points, from the
higher of their lowest accuracies to the lower of their highest ones: nothing is extrapolated.
"""

from __future__ import annotations

import math

import numpy as np

CLEAN, ROBUST = 0, 1


def on_front(points: np.ndarray) -> np.ndarray:
    """(K,) int64: the points that no other one dominates, by rising clean accuracy.

    A point dominates another that it equals or exceeds in both accuracies, and exceeds in one. Of equal
    points the first is on the front.

    Args:
        points: (P, 2) clean and robust accuracies.
    """
    order = np.lexsort((np.arange(len(points)), -points[:, ROBUST], -points[:, CLEAN]))
    found, best = [], -math.inf
    for index in order:  # by falling clean accuracy: on the front is who is more robust than all before
        if points[index, ROBUST] > best:
            best = points[index, ROBUST]
            found.append(index)
    return np.array(found[::-1], dtype=np.int64)


def front(points: np.ndarray) -> np.ndarray:
    """(K, 2) the Pareto front of points (P, 2)."""
    chosen: np.ndarray = points[on_front(points)]
    return chosen


def at_equal(own: np.ndarray, kind: int, level: float) -> float:
    """The other accuracy of a front where one accuracy is at least `level`; NaN above the front.

    Below the front's lowest point it is that of this point, which has more than is asked for.

    Args:
        own: (K, 2) a front.
        kind: `CLEAN` to read robust accuracy at equal clean accuracy, `ROBUST` for the reverse.
        level: accuracy of that kind.
    """
    x, y = (own[:, kind], own[:, 1 - kind])
    if level > x.max():
        return math.nan
    order = np.argsort(x)
    return float(np.interp(level, x[order], y[order]))  # below the first point: its own value


def common_range(a: np.ndarray, b: np.ndarray, kind: int = CLEAN) -> tuple[float, float]:
    """The clean (or robust) accuracies that both fronts reach; the first is above the second if none."""
    low = max(a[:, kind].min(), b[:, kind].min())
    high = min(a[:, kind].max(), b[:, kind].max())
    return float(low), float(high)


def height(own: np.ndarray, low: float, high: float, kind: int = CLEAN) -> float:
    """Mean robust accuracy of a front over the clean accuracies from `low` to `high`; NaN if it ends below.

    With `kind` = `ROBUST`: mean clean accuracy over robust accuracies.
    """
    ends = at_equal(own, kind, low), at_equal(own, kind, high)
    if low == high or math.isnan(ends[1]):
        return ends[1]
    inside = own[(own[:, kind] > low) & (own[:, kind] < high)]
    inside = inside[np.argsort(inside[:, kind])]
    x = np.concatenate([[low], inside[:, kind], [high]])
    y = np.concatenate([[ends[0]], inside[:, 1 - kind], [ends[1]]])
    return float(np.trapezoid(y, x) / (high - low))


def above(a: np.ndarray, b: np.ndarray, within: tuple[float, float], kind: int = CLEAN) -> float:
    """Mean height of front A over front B, over what both have of an interval; NaN where that is nothing.

    Args:
        a: (K, 2) a front.
        b: another one.
        within: the interval of clean accuracy, or of robust accuracy with `kind` = `ROBUST`.
        kind: the accuracy that is equal.
    """
    shared = common_range(a, b, kind)
    low, high = max(within[0], shared[0]), min(within[1], shared[1])
    return height(a, low, high, kind) - height(b, low, high, kind) if low <= high else math.nan


def hypervolume(points: np.ndarray, reference: tuple[float, float]) -> float:
    """The area of what is dominated by some point and dominates the reference, in squared points.

    Points that do not exceed the reference in both accuracies add nothing.
    """
    inside = points[(points[:, CLEAN] > reference[CLEAN]) & (points[:, ROBUST] > reference[ROBUST])]
    if not len(inside):
        return 0.0
    total, left = 0.0, reference[CLEAN]
    for clean, robust in front(inside):
        total += (clean - left) * (robust - reference[ROBUST])
        left = clean
    return float(total)
