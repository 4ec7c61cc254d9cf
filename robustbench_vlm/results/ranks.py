"""Ranks as far as the images tell them: pure functions of verdict bits.

Rows that share contest and datasets are tested in pairs, and Holm's method (1979) corrects for the number of
pairs. With a probability of 95 % at least, no pair is called different wrongly, and the true rank of every
row lies inside its rank set (the pairwise form of Mogstad, Romano, Shaikh and Wilhelm 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from robustbench_vlm.results import stats

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Standing:
    """What can be said about the rank of a row.

    Attributes:
        low: best rank that it may have: 1 + number of rows that are significantly better.
        high: worst rank: number of rows - number of rows that are significantly worse.
        group: letters of its tie groups, separated by blanks. Rows without a common letter differ
            significantly.
    """

    low: int
    high: int
    group: str


def only_right(bits: np.ndarray) -> np.ndarray:
    """(M, M) number of images that row i gets right and row j does not, from (M, n) bool."""
    counted: np.ndarray = bits.astype(np.int64) @ (~bits).T.astype(np.int64)
    return counted


def adjusted(bits: Sequence[np.ndarray]) -> np.ndarray:
    """(M, M) p-values of all pairs of rows, adjusted by Holm; 1 on the diagonal.

    Of one dataset they are exact McNemar tests, of several `stats.stratified_p`.

    Args:
        bits: of each dataset (M, n) bool: whether row i is right on an image. Rows and images stand in one
            order for all rows.
    """
    only = np.stack([only_right(part) for part in bits], axis=-1)
    n = np.array([part.shape[1] for part in bits])
    return symmetric(stats.stratified_p(only, np.swapaxes(only, 0, 1), n), stats.holm)


def symmetric(p: np.ndarray, adjust: Callable[[list[float]], list[float]]) -> np.ndarray:
    """(M, M) p-values of pairs, each pair adjusted once; 1 on the diagonal."""
    pairs = np.triu_indices(len(p), 1)
    found = np.ones(p.shape)
    found[pairs] = adjust(p[pairs].tolist())
    found.T[pairs] = found[pairs]
    return found


def standings(bits: Sequence[np.ndarray], level: float = stats.LEVEL) -> list[Standing]:
    """The standing of every row, by mean accuracy over datasets.

    Args:
        bits: see `adjusted`.
        level: of the whole family of pairs.

    Raises:
        ValueError: no datasets, or datasets with other numbers of rows.
    """
    if len({len(part) for part in bits}) != 1:
        raise ValueError(
            f"{len(bits)} datasets with {[len(part) for part in bits]} rows, expected one number"
        )
    means = np.mean([part.mean(axis=1) for part in bits], axis=0)
    differ = adjusted(bits) < level
    better = differ & (means[:, None] > means[None, :])
    groups = tie_groups(means, differ)
    sets = rank_sets(better)
    return [Standing(low, high, group) for (low, high), group in zip(sets, groups, strict=True)]


def rank_sets(better: np.ndarray) -> list[tuple[int, int]]:
    """Best and worst rank of every row, from (M, M) bool: whether row i is better than row j."""
    worst = len(better)
    return [
        (1 + int(above), worst - int(below))
        for above, below in zip(better.sum(axis=0), better.sum(axis=1), strict=True)
    ]


def tie_groups(means: np.ndarray, differ: np.ndarray) -> list[str]:
    """The letters of every row.

    Rows are put in order of their means. From each of them a run reaches down to the last row from which it
    does not differ; runs inside others are dropped, and the rest are lettered from the top. So rows without a
    common letter differ, while two rows of one run may differ nevertheless: the rank sets tell.

    Args:
        means: (M,) accuracies; rows with the same one stand as given.
        differ: (M, M) bool, symmetric: whether the pair differs significantly.
    """
    order = np.argsort(-means, kind="stable")
    runs: list[tuple[int, int]] = []
    for first in range(len(order)):
        last = first + int(np.flatnonzero(~differ[order[first], order[first:]]).max())
        if not runs or last > runs[-1][1]:
            runs.append((first, last))
    names: list[list[str]] = [[] for _ in order]
    for number, (first, last) in enumerate(runs):
        for place in range(first, last + 1):
            names[order[place]].append(_letters(number))
    return [" ".join(found) for found in names]


def _letters(number: int) -> str:
    """The name of a group: a to z, then aa, ab and so on."""
    text = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, len(LETTERS))
        text = LETTERS[rest] + text
    return text
