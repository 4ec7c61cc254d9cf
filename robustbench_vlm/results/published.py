"""Numbers that papers printed, copied with their source: shown beside measured rows, never ranked with them.

`leaderboards/published.csv` has columns of the leaderboard, status `copied`, and `source` at the end. A row
names a protocol only where the paper evaluates as the protocol card does, on the same split; the images that
the paper drew from the split are still others. Rows without a protocol are compared with nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from robustbench_vlm.errors import InputError, nearest
from robustbench_vlm.results import result_file, stats
from robustbench_vlm.results.contest import Contest
from robustbench_vlm.results.result_file import Result

COLUMNS = ("protocol", "dataset", "eps", "model", "clean", "robust", "95 %", "source")


def path() -> Path:
    """The file: inside the wheel, or in the checkout."""
    packaged = Path(__file__).parents[1] / "_leaderboards" / "published.csv"
    return packaged if packaged.is_file() else Path(__file__).parents[2] / "leaderboards" / "published.csv"


def read() -> pd.DataFrame:
    """All copied rows, as text exactly as the CSV has them."""
    return pd.read_csv(path(), dtype=str, keep_default_na=False)


def beside(results: Sequence[Result], model: str) -> list[list[str]]:
    """Each measured row of a model under a protocol, and below it what was printed under the same one.

    Args:
        results: of any models.
        model: name of the model, or the first digits of its fingerprint.

    Returns:
        Lines in the order of `COLUMNS`; measured ones have an interval and the source `measured here`.

    Raises:
        InputError: no results of the model, or none under a protocol.
    """
    own = result_file.of_model(results, model)
    if not own:
        hint = nearest(model, {result.model[0] for result in results})
        raise InputError(f"model {model!r}", "no results of it", do=hint)
    under = [result for result in own if result.contest.protocol]
    if not under:
        do = "run vlmrob eval --protocol NAME; see vlmrob list protocols"
        raise InputError(f"model {model!r}", "no results under a protocol", "some to print others beside", do)
    printed = read()
    lines: list[list[str]] = []
    for result in under:
        head = [result.contest.protocol, result.dataset, result.contest.columns["eps"]]
        lines.append([*head, result.model[0], *_measured(result), "measured here"])
        protocol, dataset, eps = head
        same = (printed.protocol == protocol) & (printed.dataset == dataset) & (printed.eps == eps)
        for row in printed[same].itertuples():
            lines.append([*head, str(row.model_id), str(row.clean), str(row.robust), "", str(row.source)])
    return lines


def _measured(result: Result) -> list[str]:
    """Clean and robust accuracy in percent, and the interval of the latter."""
    n, robust = result.outcome["n"], result.outcome["robust"][result.stages[-1]]
    interval = stats.wilson(robust, n)
    shares = [f"{100 * count / n:.1f}" for count in (result.outcome["clean_correct"], robust)]
    return [*shares, f"{100 * interval.low:.1f} to {100 * interval.high:.1f}, n = {n}"]


def under(contest: Contest, datasets: Sequence[str]) -> list[list[str]]:
    """[model, dataset, clean, robust, source] of every copied row under a contest's protocol and radius.

    Args:
        contest: without a protocol nothing is comparable, and the list is empty.
        datasets: only rows on these are taken.
    """
    if not contest.protocol:
        return []
    printed, eps = read(), contest.columns["eps"]
    same = (printed.protocol == contest.protocol) & (printed.eps == eps) & printed.dataset.isin(datasets)
    names = ["model_id", "dataset", "clean", "robust", "source"]
    return [[str(value) for value in line] for line in printed.loc[same, names].to_numpy()]
