"""Two models on the same images: an exact paired test on each dataset, and on all of a suite together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import pandas as pd

from robustbench_vlm.errors import InputError, nearest
from robustbench_vlm.results import stats, verdicts
from robustbench_vlm.results.result_file import Cell
from robustbench_vlm.results.stats import Paired
from robustbench_vlm.threat import eps_text

COLUMNS = ("attack", "dataset", "n", "clean A-B", "clean p", "robust A-B", "robust p")


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

    @property
    def texts(self) -> list[str]:
        """The line as `COLUMNS` has it; differences in points."""
        tests = (self.clean, self.robust)
        numbers = [text for test in tests for text in (f"{100 * test.difference:+.2f}", f"{test.p:.3g}")]
        return [self.attack, self.dataset, str(self.robust.n), *numbers]


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
    for contest in dict.fromkeys(cell.contest for cell in (mine[place] for place in shared)):
        parts = []
        for place in shared:
            if mine[place].contest == contest:
                merged = _joined(mine[place], theirs[place])
                attack = _title(mine[place])
                lines.append(_test(attack, mine[place].config["dataset"], merged))
                parts.append(merged)
        if len(parts) > 1:
            lines.append(_test(attack, "all", pd.concat(parts)))
    return lines


def _title(cell: Cell) -> str:
    """Chain and threat; a ladder of radii is named, since its rows are a contest of their own."""
    config = cell.config
    smaller = [eps_text(config["norm"], Fraction(eps)) for eps in config["eps_ladder"][:-1]]
    after = f" after {', '.join(smaller)}" if smaller else ""
    under = f" protocol={config['protocol']}" if config.get("protocol") else ""
    return f"{config['attack']} {cell.threat}{after} n={config['n_requested'] or 'all'}{under}"


def _of(cells: Sequence[Cell], name: str) -> dict[tuple[object, ...], Cell]:
    own = [cell for cell in cells if name == cell.model[0]]
    own = own or [cell for cell in cells if name and cell.model[1].startswith(name)]
    shas = {cell.model[1] for cell in own}
    if not own:
        hint = nearest(name, {cell.model[0] for cell in cells})
        raise InputError(f"model {name!r}", "no results of it", do=f"{hint}; or run vlmrob eval first")
    if len(shas) > 1:
        prints = ", ".join(sorted(sha[:8] for sha in shas))
        raise InputError(f"model {name!r}", f"{len(shas)} models of that name", f"one of: {prints}")
    return {(cell.contest, cell.config["dataset"]): cell for cell in own}


def _joined(a: Cell, b: Cell) -> pd.DataFrame:
    columns = ["key", "image_sha256", "clean_correct", "robust"]
    left, right = (cell.verdicts().assign(robust=verdicts.standing)[columns] for cell in (a, b))
    merged = left.merge(right, on=["key", "image_sha256"], suffixes=("_a", "_b"), validate="one_to_one")
    if len(merged) != len(left) or len(merged) != len(right):
        raise InputError(str(b.path), "other images", f"those of {a.path}", "evaluate both on the same data")
    return merged


def _test(attack: str, dataset: str, merged: pd.DataFrame) -> Comparison:
    clean = stats.mcnemar(merged.clean_correct_a.tolist(), merged.clean_correct_b.tolist())
    robust = stats.mcnemar(merged.robust_a.tolist(), merged.robust_b.tolist())
    return Comparison(attack, dataset, clean, robust)
