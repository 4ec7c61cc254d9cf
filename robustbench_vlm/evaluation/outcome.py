"""The outcome of a cell: counts of verdicts, and the flags that they raise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from scipy.special import bdtr

from robustbench_vlm.cards import reader
from robustbench_vlm.data import miniature
from robustbench_vlm.evaluation.cells import Cell, Subject
from robustbench_vlm.results import verdicts
from robustbench_vlm.threat import eps_text

CONSTANT = 0.95  # share of one class among the clean predictions from which a model counts as constant
UNLIKELY = 0.01  # chance of so few right images by guessing from which labels count as wrong
NONE_RIGHT = 20  # images from which none right counts as below chance, however many classes there are


def tally(cell: Cell, table: pd.DataFrame, failed: Sequence[str]) -> dict[str, Any]:
    """Counts of verdicts, flags, and what ran otherwise than written.

    Args:
        cell: which was measured.
        table: its verdicts.
        failed: names of the checks that model and attack failed; they are flags too.
    """
    subject, chain = cell.subject, cell.chain
    n_classes, eps = subject.card.n_classes, eps_text(cell.settings.norm, cell.threat.eps)
    black_box_only = verdicts.broken_in(table, chain.black_box(subject.n_distinct), eps)
    counts = verdicts.counts(table, chain.stage_names, eps)
    flags = {
        "constant-predictor": counts["largest_prediction_share"] >= CONSTANT and n_classes > 1,
        "error-rows": counts["errors"] > 0,
        "untrained-words": bool(subject.untrained),
        "bad-images": bool(subject.split.bad),
        "generated-images": (subject.split.folder / miniature.MARKER).exists(),
        "tied-classes": subject.tied is not None,
        "sentences-cut": bool(subject.cut),
        "below-chance": below_chance(int(table.clean_correct.sum()), len(table), n_classes),
        **dict.fromkeys(subject.split.flags, True),
    }
    return {
        **counts,
        "n_classes": n_classes,
        "square_only": black_box_only,
        "exposure": exposure(subject),
        "flags": sorted({name for name, raised in flags.items() if raised}.union(failed)),
        "substitutions": chain.substitutions(subject.n_distinct),
    }


def below_chance(correct: int, n: int, n_classes: int) -> bool:
    """Whether fewer images are right than guessing would give, as with labels that begin at 1.

    It is said where guessing gives so few in less than 1 % of draws, and where none of 20 images or more is
    right.
    """
    if correct * n_classes >= n:
        return False
    return (correct == 0 and n >= NONE_RIGHT) or float(bdtr(correct, n, 1 / n_classes)) < UNLIKELY


def exposure(subject: Subject) -> str:
    """Whether the model or one of its parents was trained on the dataset: `seen`, `unseen` or `unknown`."""
    trained_on = subject.loaded.card.trained_on
    if reader.plain_name(subject.card.name) in map(reader.plain_name, trained_on or ()):
        return "seen"
    complete = trained_on is not None and "unknown" not in trained_on  # for every parent
    return "unseen" if complete else "unknown"
