"""Two models on the same images: an exact paired test on each dataset, and on all of a suite together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from robustbench_vlm import stats
from robustbench_vlm.errors import InputError
from robustbench_vlm.leaderboard import Cell
from robustbench_vlm.stats import Paired


@dataclass(frozen=True)
class Comparison:
    """One line of a comparison.

    Attributes:
        attack: chain and threat.
        dataset: its name, or `all`, the pooled images of every dataset that both models have.
        clean: paired test of clean correctness.
        robust: paired test of the final verdicts.
    """

    attack: str
    dataset: str
    clean: Paired
    robust: Paired


def compare(cells: Sequence[Cell], a: str, b: str) -> list[Comparison]:
    """Paired tests of model `a` against `b` wherever both were evaluated in the same contest.

    The pooled line tests all discordant images of all datasets together: under the hypothesis of no
    difference each is a fair coin, whichever dataset it comes from.

    Raises:
        InputError: a model without results, or two without a contest in common.
    """
    mine, theirs = _of(cells, a), _of(cells, b)
    shared = [place for place in mine if place in theirs]
    if not shared:
        raise InputError(f"compare {a} {b}", "no dataset and attack in common", do="evaluate both alike")
    lines: list[Comparison] = []
    pooled: dict[str, list[pd.DataFrame]] = {}
    for place in shared:
        merged = _joined(mine[place], theirs[place])
        config = mine[place].config
        attack = f"{config['attack']} {config['norm']} {config['eps']} n={config['n_requested']}"
        lines.append(_test(attack, config["dataset"], merged))
        pooled.setdefault(attack, []).append(merged)
    return lines + [
        _test(attack, "all", pd.concat(parts)) for attack, parts in pooled.items() if len(parts) > 1
    ]


def _of(cells: Sequence[Cell], name: str) -> dict[tuple[object, ...], Cell]:
    own = [cell for cell in cells if name == cell.model[0] or cell.model[1].startswith(name)]
    shas = {cell.model[1] for cell in own}
    if not own:
        known = ", ".join(sorted({cell.model[0] for cell in cells})) or "none"
        raise InputError(f"model {name!r}", "no results", f"one of: {known}", "run vlmrob eval first")
    if len(shas) > 1:
        raise InputError(
            f"model {name!r}", f"{len(shas)} models of that name", "the first digits of its sha256"
        )
    return {(cell.contest, cell.config["dataset"]): cell for cell in own}


def _joined(a: Cell, b: Cell) -> pd.DataFrame:
    columns = ["key", "image_sha256", "clean_correct", "robust"]
    left, right = (_verdicts(cell)[columns] for cell in (a, b))
    merged = left.merge(right, on=["key", "image_sha256"], suffixes=("_a", "_b"), validate="one_to_one")
    if len(merged) != len(left) or len(merged) != len(right):
        raise InputError(str(b.path), "other images", f"those of {a.path}", "evaluate both on the same data")
    return merged


def _verdicts(cell: Cell) -> pd.DataFrame:
    table = pd.read_parquet(cell.path.with_suffix(".parquet"))
    return table.assign(robust=table.clean_correct & (table.broken_at_eps == "") & (table.error == ""))


def _test(attack: str, dataset: str, merged: pd.DataFrame) -> Comparison:
    clean = stats.mcnemar(merged.clean_correct_a.tolist(), merged.clean_correct_b.tolist())
    robust = stats.mcnemar(merged.robust_a.tolist(), merged.robust_b.tolist())
    return Comparison(attack, dataset, clean, robust)
