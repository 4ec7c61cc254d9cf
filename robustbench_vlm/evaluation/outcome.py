"""The outcome of a cell: counts of verdicts, and the flags that they raise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from robustbench_vlm.data import miniature
from robustbench_vlm.evaluation.cells import Cell, Subject
from robustbench_vlm.results import verdicts
from robustbench_vlm.threat import eps_text

CONSTANT = 0.95  # share of one class among the clean predictions from which a model counts as constant
ZERO_GRADIENT = 0.01  # share of attacked images with an exactly zero gradient from which CE is unreliable
NO_PROGRESS = 0.01  # share of survivors whose objective never rose from which an attack did not work
BLACK_BOX = 0.002  # share of images that only a black-box stage broke from which gradients are unreliable


def tally(cell: Cell, table: pd.DataFrame, failed: Sequence[str]) -> dict[str, Any]:
    """Counts of verdicts, flags, and what ran otherwise than written.

    Args:
        cell: which was measured.
        table: its verdicts.
        failed: names of the checks that the model failed; they are flags too.
    """
    subject, chain = cell.subject, cell.chain
    n_classes, eps = subject.card.n_classes, eps_text(cell.settings.norm, cell.threat.eps)
    black_box_only = verdicts.broken_in(table, chain.black_box(n_classes), eps)
    counts = verdicts.counts(table, chain.stage_names, eps)
    flags = {
        "constant-predictor": counts["largest_prediction_share"] >= CONSTANT and n_classes > 1,
        "zero-gradient": verdicts.zero_gradient_share(table) > ZERO_GRADIENT,
        "error-rows": counts["errors"] > 0,
        "no-progress": verdicts.no_progress_share(table) > NO_PROGRESS,
        "square-beats-white-box": black_box_only > BLACK_BOX * len(table),
        "untrained-words": bool(subject.untrained),
        "bad-images": bool(subject.split.bad),
        "generated-images": (subject.split.folder / miniature.MARKER).exists(),
    }
    return {
        **counts,
        "n_classes": n_classes,
        "square_only": black_box_only,
        "exposure": exposure(subject),
        "flags": sorted({name for name, raised in flags.items() if raised}.union(failed)),
        "substitutions": chain.substitutions(n_classes),
    }


def exposure(subject: Subject) -> str:
    """Whether the model or one of its parents was trained on the dataset: `seen`, `unseen` or `unknown`."""
    trained_on = subject.loaded.card.trained_on
    if subject.card.name in (trained_on or ()):
        return "seen"
    complete = trained_on is not None and "unknown" not in trained_on  # for every parent
    return "unseen" if complete else "unknown"
