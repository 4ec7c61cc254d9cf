"""Enter findings into a table of verdicts, one after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd

from robustbench_vlm.results.verdicts import SPENT

COLUMNS = (
    *SPENT,
    *("adv_prediction", "adv_margin", "distance", "adv_sha256", "error", "progress"),
    *("broken_by", "broken_at_eps", "target", "restart", "iteration"),
)
"""Columns that a finding changes."""


class OpenTable:
    """The columns of a table that findings change, as arrays: one entry of a DataFrame takes far longer."""

    def __init__(self, table: pd.DataFrame, eps: str) -> None:
        """Copy the columns.

        Args:
            table: of verdicts, whose rows are numbered from 0.
            eps: the radius of the findings as `threat.eps_text` writes it.
        """
        self._eps = eps
        self.columns: dict[str, Any] = {name: table[name].to_numpy(copy=True) for name in COLUMNS}

    def enter(self, i: int, line: Mapping[str, Any], stage: str) -> None:
        """Write the finding of one stage on one image.

        Args:
            i: row of the image.
            line: the finding as a line of the ledger.
            stage: name of the stage.
        """
        columns = self.columns
        for name in SPENT:
            columns[name][i] += line[name]
        columns["adv_prediction"][i] = line["prediction"]
        columns["adv_margin"][i] = math.nan if line["margin"] is None else line["margin"]
        columns["distance"][i] = line["distance"]
        columns["adv_sha256"][i] = line["adv_sha256"]
        columns["error"][i] = line["error"]
        if line["broken"]:
            if line["backwards"]:
                columns["progress"][i] = math.nan
            columns["broken_by"][i], columns["broken_at_eps"][i] = stage, self._eps
            for name in ("target", "restart", "iteration"):
                columns[name][i] = line[name]
        elif line["backwards"] > line["restart"] + 1 and not line["error"]:  # one step (FGSM) cannot rise
            rise = line.get("progress")  # not in ledgers of the first version
            found = np.float32(math.nan if rise is None else rise)
            columns["progress"][i] = np.fmax(columns["progress"][i], found)


@contextmanager
def opened(table: pd.DataFrame, eps: str) -> Iterator[OpenTable]:
    """Enter findings inside the `with` block; the table has them at its end.

    Args:
        table: is changed in place.
        eps: see `OpenTable`.
    """
    entries = OpenTable(table, eps)
    yield entries
    for name, values in entries.columns.items():
        table[name] = pd.Series(values, index=table.index, dtype=table[name].dtype)
