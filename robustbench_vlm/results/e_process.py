"""Tests that may be looked at at any time: an e-process for each pair of models, and Holm over the pairs.

Images come in an order that is random with respect to the models, and at every look each dataset has given
equally many. An image that only one of two models gets right is a toss. With k of m tosses won by A,

    E = integral over u in [-1, 1] of (1 + u)^k (1 - u)^(m - k) / 2 = 2^m B(k + 1, m - k + 1).

For each u the product is the capital of a gambler who bets the share u on A at every image. If both models
have the same mean over datasets, its expectation never rises, whether single datasets favour one of them or
not. So the probability that E ever reaches 1/a is at most a (Ville 1939), and 1 / max E is a p-value at
whatever time the race ends. Mixtures of bets: Waudby-Smith and Ramdas (2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaln

from robustbench_vlm.results import stats
from robustbench_vlm.results.ranks import symmetric


def log_e(won: ArrayLike, lost: ArrayLike) -> np.ndarray:
    """Natural logarithm of E after `won` and `lost` tosses; 0 before the first."""
    k, rest = np.asarray(won), np.asarray(lost)
    found: np.ndarray = (k + rest) * np.log(2.0) + betaln(k + 1, rest + 1)
    return found


def adjusted(looks: Sequence[np.ndarray]) -> np.ndarray:
    """(M, M) p-values of all pairs of models after some looks, adjusted by Holm; 1 on the diagonal.

    They only fall from look to look, so a pair that is decided stays decided.

    Args:
        looks: at each look (M, M) integers, the number of images so far that row i alone gets right of the
            two. The counts of a pair that is attacked no more stay as they are.

    Raises:
        ValueError: no looks.
    """
    if not looks:
        raise ValueError("no looks")
    greatest = np.max([log_e(only, only.T) for only in looks], axis=0)
    p = np.exp(-np.maximum(greatest, 0.0))
    return symmetric(p, stats.holm)
