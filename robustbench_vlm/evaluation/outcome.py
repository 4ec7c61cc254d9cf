"""The outcome of a cell: counts of verdicts, and the flags that they raise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from robustbench_vlm.data import miniature
from robustbench_vlm.data.dataset import majority
from robustbench_vlm.evaluation.cells import Cell
from robustbench_vlm.evaluation.chain import black_box, plugin
from robustbench_vlm.results import verdicts
from robustbench_vlm.threat import eps_text

CONSTANT = 0.95  # share of one class among the clean predictions from which a model counts as constant


ZERO_GRADIENT = 0.01  # share of attacked images with an exactly zero gradient from which CE is unreliable


NO_PROGRESS = 0.01  # share of survivors whose objective never rose from which an attack did not work


BLIND = 0.002  # share of images that only a black-box stage broke from which gradients are not to be trusted


def tally(cell: Cell, table: pd.DataFrame, failed: Sequence[str]) -> dict[str, Any]:
    """The outcome of a cell: counts of verdicts, flags, and what ran otherwise than written.

    Args:
        cell: whose outcome.
        table: its verdicts.
        failed: names of failed examinations of the model.
    """
    what, stages = cell.what, cell.attack.stage
    n_classes = what.card.n_classes
    eps = eps_text(cell.request.norm, cell.threat.eps)
    blind = verdicts.broken_in(table, black_box(cell.attack, n_classes), eps)
    share = verdicts.largest_prediction_share(table)
    errors = int((table.error != "").sum())
    flags = {
        "constant-predictor": share >= CONSTANT and n_classes > 1,
        "zero-gradient": verdicts.zero_gradient_share(table) > ZERO_GRADIENT,
        "error-rows": errors > 0,
        "no-progress": verdicts.no_progress_share(table) > NO_PROGRESS,
        "square-beats-white-box": blind > BLIND * len(table),
        "untrained-words": bool(what.untrained),
        "bad-images": bool(what.split.bad),
        "generated-images": (what.split.folder / miniature.MARK).exists(),
    }
    trained_on = what.loaded.card.trained_on
    seen = what.card.name in (trained_on or ())
    whole = trained_on is not None and "unknown" not in trained_on  # of every parent
    exposure = "seen" if seen else "unseen" if whole else "unknown"
    changed = [
        (stage.name, text) for stage in stages for text in plugin(cell.attack, stage).substitutions(n_classes)
    ]
    return {
        "n": len(table),
        "n_classes": n_classes,
        "clean_correct": int(table.clean_correct.sum()),
        "robust": verdicts.robust_after(table, [stage.name for stage in stages], eps),
        "errors": errors,
        "square_only": blind,
        "majority": round(majority(what.split.labels, n_classes), 6),
        "largest_prediction_share": round(share, 6),
        "exposure": exposure,
        "flags": sorted({name for name, raised in flags.items() if raised}.union(failed)),
        "substitutions": [f"{stage}: {text}" for stage, text in changed],
        "forwards": int(table.forwards.sum()),
        "backwards": int(table.backwards.sum()),
        "verdicts_sha256": verdicts.sha256(table),
    }
