"""What papers printed, copied with its source: to be read beside measured rows, never ranked with them.

`leaderboards/published.csv` has the leaderboard's own columns, status `copied`, and `source` at the end. A
row names a protocol only where the paper's evaluation is that of the protocol card, on the same split (the
images drawn from it are others); all other rows stand for themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from robustbench_vlm.errors import InputError, nearest
from robustbench_vlm.results import stats
from robustbench_vlm.results.result_file import Cell

COLUMNS = ("protocol", "dataset", "eps", "model", "clean", "robust", "95 %", "source")


def path() -> Path:
    """The file: inside the wheel, or in the checkout."""
    packaged = Path(__file__).parents[1] / "_leaderboards" / "published.csv"
    return packaged if packaged.is_file() else Path(__file__).parents[2] / "leaderboards" / "published.csv"


def read() -> pd.DataFrame:
    """All copied rows, as text exactly as the CSV has them."""
    return pd.read_csv(path(), dtype=str, keep_default_na=False)


def beside(cells: Sequence[Cell], model: str) -> list[list[str]]:
    """Each measured row of a model under a protocol, and below it what was printed under the same one.

    Args:
        cells: results.
        model: name of the model, or the first digits of its fingerprint.

    Returns:
        Lines as `COLUMNS` has them; measured ones have an interval and the source `measured here`.

    Raises:
        InputError: no results of the model, or none under a protocol.
    """
    own = [cell for cell in cells if model == cell.model[0] or cell.model[1].startswith(model)]
    if not own:
        raise InputError(
            f"model {model!r}", "no results of it", do=nearest(model, {c.model[0] for c in cells})
        )
    under = [cell for cell in own if cell.config.get("protocol")]
    if not under:
        do = "run vlmrob eval --protocol NAME; see vlmrob list protocols"
        raise InputError(f"model {model!r}", "no results under a protocol", "some to print others beside", do)
    printed = read()
    lines: list[list[str]] = []
    for cell in under:
        place = (cell.config["protocol"], cell.config["dataset"], cell.threat.column)
        n, clean = cell.outcome["n"], cell.outcome["clean_correct"]
        robust = cell.outcome["robust"][cell.stages[-1]]
        interval = stats.wilson(robust, n)
        numbers = [f"{100 * clean / n:.1f}", f"{100 * robust / n:.1f}"]
        span = f"{100 * interval.low:.1f} to {100 * interval.high:.1f}, n = {n}"
        lines.append([*place, cell.model[0], *numbers, span, "measured here"])
        same = (printed.protocol == place[0]) & (printed.dataset == place[1]) & (printed.eps == place[2])
        for row in printed[same].itertuples():
            lines.append([*place, str(row.model_id), str(row.clean), str(row.robust), "", str(row.source)])
    return lines
