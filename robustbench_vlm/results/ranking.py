"""Which rows of a leaderboard are ranked against each other, and the columns that say how.

Rows are ranked where they are of one contest, of one name (a dataset, or a mean) and over the same datasets.
So a model whose datasets are incomplete has no mean and no rank there, and unseen means are ranked only among
models with the same unseen datasets. A row without another one to be compared with has no rank. Nor has a row
that was stopped by a rule: a test at a time that the results chose does not hold its level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.errors import InputError
from robustbench_vlm.results import ranks, rows, verdicts
from robustbench_vlm.results.contest import Contest
from robustbench_vlm.results.result_file import Result

Model = tuple[str, str]
"""Name and fingerprint."""

Ranking = tuple[Contest, str, tuple[str, ...]]
"""Contest, name of the row and its datasets: what rows that are ranked together share."""


def ranked(
    groups: Mapping[tuple[Contest, Model], Sequence[Result]], suite: Suite
) -> dict[tuple[Contest, Model, str], dict[str, Any]]:
    """The columns `rank_low`, `rank_high` and `tie_group` of every row that has a rank.

    Args:
        groups: the results of each contest and model.
        suite: the table's.

    Raises:
        InputError: results of one contest and dataset over other images.
    """
    rankings: dict[Ranking, dict[Model, Sequence[Result]]] = {}
    for (contest, model), results in sorted(groups.items(), key=lambda item: item[0]):
        if contest.stop_rule:
            continue
        alone = {result.dataset: [result] for result in results}
        means = {part.name: part.results for part in rows.parts(results, suite)}
        for name, members in (alone | means).items():
            datasets = tuple(result.dataset for result in members)
            rankings.setdefault((contest, name, datasets), {})[model] = members
    bits: dict[str, pd.Series[bool]] = {}
    found = {}
    for (contest, name, datasets), models in rankings.items():
        if len(models) < 2:
            continue
        stacked = [_stacked([each[k] for each in models.values()], bits) for k in range(len(datasets))]
        for model, standing in zip(models, ranks.standings(stacked), strict=True):
            columns = {"rank_low": standing.low, "rank_high": standing.high, "tie_group": standing.group}
            found[contest, model, name] = columns
    return found


def _stacked(results: Sequence[Result], bits: dict[str, pd.Series[bool]]) -> np.ndarray:
    """(M, n) bool: whether each result is right on each image after the whole chain.

    Args:
        results: of one contest and dataset.
        bits: the same of results that were read before, by path; gets those that were not.
    """
    for result in results:
        if str(result.path) not in bits:
            table = result.verdicts()
            standing = verdicts.standing(table)
            bits[str(result.path)] = standing.set_axis(table.key + " " + table.image_sha256).sort_index()
    first, *others = [bits[str(result.path)] for result in results]
    for other, result in zip(others, results[1:], strict=True):
        if not other.index.equals(first.index):
            expected, do = f"those of {results[0].path}", "evaluate both on the same data"
            raise InputError(str(result.path), "other images", expected, do)
    return np.stack([first.to_numpy(bool), *(other.to_numpy(bool) for other in others)])
