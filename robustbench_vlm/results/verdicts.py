"""The verdicts of one result: a table with one row an image (columns: `columns.VERDICTS`), and its counts.

Everything else, result files and leaderboards, is counted from this table.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from robustbench_vlm.results import columns
from robustbench_vlm.store import canonical, fingerprint
from robustbench_vlm.threat import Threat

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Finding

EVIDENCE = (
    "key",
    "label",
    "clean_prediction",
    "broken_by",
    "broken_at_eps",
    "adv_prediction",
    "adv_sha256",
    "error",
)
"""Columns that the fingerprint of a table is taken of."""

TEXTS = ("key", "image_sha256", "broken_by", "broken_at_eps", "adv_sha256", "error")
KINDS: Mapping[str, str] = {
    **dict.fromkeys(TEXTS, "O"),
    **dict.fromkeys(("clean_margin", "adv_margin", "distance", "progress"), "f"),
    "clean_correct": "b",
}
"""Kinds of numpy types that columns have; those that are not here have whole numbers."""

SPENT = ("forwards", "backwards", "zero_gradients")
FOUND = (
    *("broken_by", "broken_at_eps", "target", "restart", "iteration"),
    *("adv_prediction", "adv_margin", "distance", "adv_sha256"),
)
"""Columns about the adversarial image. An image that was broken at a smaller radius has them from there."""

LINE: Mapping[tuple[type, ...], Sequence[str]] = {
    (str,): ("key", "image", "error", "adv_sha256"),
    (bool,): ("broken",),
    (int,): ("label", "target", "restart", "iteration", "prediction", *SPENT),
    (int, float): ("distance",),
    (int, float, type(None)): ("margin", "progress"),
}
"""Entries of a line of a ledger by the types that they may have."""
OLDEST = {"progress": type(None)}
"""Entries that are missing in ledgers of the first version, as if they had this type."""


def begin(
    keys: Sequence[str],
    labels: np.ndarray,
    image_shas: Sequence[str],
    predictions: np.ndarray,
    margins: np.ndarray,
    lost: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """The table before any attack.

    Args:
        keys: N names.
        labels: (N,) int64.
        image_shas: SHA-256 of each image's file.
        predictions: (N,) int64 clean predictions of the canonical pass.
        margins: (N,) float32, true logit minus the largest other; not finite where a logit is not.
        lost: rows of the table at the next smaller radius whose images were broken there; they count as
            broken at this radius too, with the same adversarial image.

    `iteration` is that of the success, and -1 without one; 0 after a random start means that the noise alone
    was enough. `progress` is how far the objective rose above its first value, in the stage with gradients
    where it rose most; NaN if there was no such stage, or if one of them broke the image.
    """
    n = len(keys)
    finite = np.isfinite(margins)
    zeros = {column: np.zeros(n, dtype=np.int64) for column in SPENT}
    table = pd.DataFrame(
        {
            "key": list(keys),
            "label": labels,
            "image_sha256": list(image_shas),
            "clean_prediction": predictions,
            "clean_margin": margins.astype(np.float32),
            "clean_correct": (predictions == labels) & finite,
            "broken_by": [""] * n,
            "broken_at_eps": [""] * n,
            "target": np.full(n, -1),
            "restart": np.full(n, -1),
            "iteration": np.full(n, -1),
            "adv_prediction": predictions,
            "adv_margin": margins.astype(np.float32),
            "distance": np.zeros(n, dtype=np.float32),
            "adv_sha256": [""] * n,
            **zeros,
            "progress": np.full(n, np.nan, dtype=np.float32),
            "error": ["" if ok else "a logit of the clean image is not finite" for ok in finite],
        }
    )
    if lost is not None and len(lost):
        positions = table.index[table.key.isin(lost.key)]
        found = lost.set_index("key").loc[table.key[positions], list(FOUND)]
        for column in FOUND:
            table.loc[positions, column] = found[column].to_numpy()
    return table


def standing(table: pd.DataFrame) -> pd.Series:
    """(N,) bool: classified correctly, not broken at this radius or a smaller one, and without error."""
    return table.clean_correct & (table.broken_at_eps == "") & (table.error == "")


def line(finding: Finding, image: Tensor, image_sha: str, label: int, threat: Threat) -> dict[str, Any]:
    """A finding as a line of a ledger. The adversarial image is recorded by its hash and its distance.

    Args:
        finding: of one stage on one image.
        image: (3, H, W) the clean image, on the CPU.
        image_sha: SHA-256 of its file.
        label: its class.
        threat: the ball; the distance is in its norm, computed in float64.
    """
    delta = (finding.adv.double() - image.double()).flatten()
    return {
        "key": finding.key,
        "image": image_sha,
        "label": label,
        "broken": finding.broken,
        "target": finding.target,
        "restart": finding.restart,
        "iteration": finding.iteration,
        "forwards": finding.forwards,
        "backwards": finding.backwards,
        "prediction": finding.prediction,
        "margin": finding.margin if math.isfinite(finding.margin) else None,
        "zero_gradients": finding.zero_gradients,
        "progress": finding.progress,
        "error": finding.error,
        "distance": _distance(delta, threat.norm),
        "adv_sha256": image_sha256(finding.adv),
    }


def image_sha256(image: Tensor) -> str:
    """SHA-256 of the values of an image on the CPU."""
    return hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()


def _distance(delta: Tensor, norm: str) -> float:
    if norm == "linf":
        return float(delta.abs().max())
    return float(delta.abs().sum() if norm == "l1" else delta.norm())


def robust_after(table: pd.DataFrame, stages: Iterable[str], eps: str) -> dict[str, int]:
    """Number of images that are right and not broken after each stage at radius `eps`, in chain order.

    An image with an error counts as not robust. An image broken at a smaller radius is already broken before
    the first stage.
    """
    alive = table.clean_correct & (table.error == "") & table.broken_at_eps.isin(["", eps])
    counts = {}
    for stage in stages:
        alive &= table.broken_by != stage
        counts[stage] = int(alive.sum())
    return counts


def per_class(table: pd.DataFrame) -> tuple[float, float]:
    """Mean over classes of the accuracy on clean images, and of the robust accuracy after the whole chain.

    Classes without an image in the table do not count.
    """
    right = pd.DataFrame({"clean": table.clean_correct, "robust": standing(table)})
    of_class = right.groupby(table.label).mean()
    return float(of_class.clean.mean()), float(of_class.robust.mean())


def zero_gradient_share(table: pd.DataFrame, least: float = 0.0) -> float:
    """Share of attacked images of whose gradients more than a share of `least` were exactly zero."""
    attacked = table[table.backwards > 0]
    return float((attacked.zero_gradients > least * attacked.backwards).mean()) if len(attacked) else 0.0


def no_progress_share(table: pd.DataFrame) -> float:
    """Share of images attacked with gradients, and not broken by them, whose objective never rose."""
    survived = table.progress.dropna()
    return float((survived <= 0).mean()) if len(survived) else 0.0


def broken_in(table: pd.DataFrame, stages: Sequence[str], eps: str) -> int:
    """Images that these stages broke at radius `eps` (as text)."""
    return int((table.broken_by.isin(list(stages)) & (table.broken_at_eps == eps)).sum())


def largest_prediction_share(table: pd.DataFrame) -> float:
    """Share of the most frequent clean prediction; near 1 for a constant predictor."""
    return float(table.clean_prediction.value_counts(normalize=True).max())


def majority(table: pd.DataFrame) -> float:
    """Accuracy of the best constant predictor: share of the most frequent class among the labels."""
    return float(table.label.value_counts(normalize=True).max())


def counts(table: pd.DataFrame, stages: Sequence[str], eps: str) -> dict[str, Any]:
    """Every number of an outcome that is a function of the verdicts, under the names that results give them.

    Results are written with these counts, and read back only if the verdicts still give them.

    Args:
        table: the verdicts.
        stages: names of the stages of the chain, in order.
        eps: the radius as the table spells it.
    """
    return {
        "n": len(table),
        "clean_correct": int(table.clean_correct.sum()),
        "robust": robust_after(table, stages, eps),
        "errors": int((table.error != "").sum()),
        "majority": round(majority(table), 6),
        "largest_prediction_share": round(largest_prediction_share(table), 6),
        "forwards": int(table.forwards.sum()),
        "backwards": int(table.backwards.sum()),
        "verdicts_sha256": sha256(table),
        "table_sha256": table_sha256(table),
    }


def fault(table: pd.DataFrame, stages: Sequence[str], threat: Threat) -> str:
    """What in a table of verdicts cannot be, whoever wrote it; empty if nothing.

    Args:
        table: the verdicts.
        stages: names of the stages of the chain.
        threat: the ball, of the largest radius that was attacked.
    """
    for name in columns.VERDICTS:
        if [*table.columns].count(name) != 1:
            return f"{'two columns' if name in table else 'no column'} {name!r}"
        values = table[name].to_numpy()
        whole = name not in TEXTS or all(isinstance(value, str) for value in values)
        if values.dtype.kind not in KINDS.get(name, "iu") or not whole:
            return f"column {name!r} has values of another kind"
    right = (table.clean_prediction == table.label) & np.isfinite(table.clean_margin)
    faults = {
        "a key that occurs twice": table.key.duplicated(),
        "clean_correct that is not whether clean_prediction is the label": table.clean_correct != right,
        "a stage that the chain does not have": ~table.broken_by.isin(["", *stages]),
        "broken_by without broken_at_eps": (table.broken_by == "") != (table.broken_at_eps == ""),
        "a broken image that is wrong when clean": (table.broken_by != "") & ~right,
        f"a distance above the radius {threat}": ~(table.distance <= float(threat.eps) + 2 * threat.slack),
    }
    for what, rows in faults.items():
        if rows.any():
            return f"image {table.key[rows.to_numpy()].iloc[0]}: {what}"
    return ""


def sha256(table: pd.DataFrame) -> str:
    """Fingerprint of the evidence, independent of file format and of how the work was scheduled."""
    return fingerprint(table[list(EVIDENCE)].to_numpy().tolist())


def table_sha256(table: pd.DataFrame) -> str:
    """Fingerprint of every value of every column of `columns.VERDICTS`, independent of the file format."""
    digest = hashlib.sha256()
    for name in columns.VERDICTS:
        values = table[name].to_numpy()
        if values.dtype.kind in "biuf":
            wide = values.astype("<f8" if values.dtype.kind == "f" else "<i8")
            if values.dtype.kind == "f":
                wide[np.isnan(wide)] = np.nan  # every NaN has the same bits
            content = wide.tobytes()
        else:
            content = canonical(values.tolist())
        digest.update(canonical([name, len(values)]) + content)
    return digest.hexdigest()


@lru_cache(maxsize=64)  # a million lines have a handful of them
def _wrong_kind(entries: tuple[str, ...], types: tuple[type, ...]) -> str:
    """The first entry of a line that is missing or of another type than `LINE` says; empty if none is."""
    found = OLDEST | dict(zip(entries, types, strict=True))
    wrong = (name for kinds, names in LINE.items() for name in names if found.get(name) not in kinds)
    return next(wrong, "")


def farthest(threat: Threat) -> float:
    """The largest distance that a line may state; adversarial images are rounded to float32."""
    return float(threat.eps) + threat.slack


def line_fault(line: Mapping[str, Any], farthest: float, n_classes: int) -> str:
    """What in a line of a ledger cannot be, whoever wrote it; empty if nothing.

    Args:
        line: as `line` makes it.
        farthest: see the function of that name; of the ball of the ledger.
        n_classes: of the dataset.
    """
    name = _wrong_kind(tuple(line), tuple(map(type, line.values())))
    if name:
        return f"{name} is {line[name]!r:.40}" if name in line else f"no {name}"
    if not 0 <= line["distance"] <= farthest:
        return f"distance {line['distance']:.6g} is outside the ball, whose radius is {farthest:.6g}"
    if line["forwards"] < 0 or line["backwards"] < 0 or line["zero_gradients"] < 0:
        return "a negative count of model calls"
    if not 0 <= line["prediction"] < n_classes or not 0 <= line["label"] < n_classes:
        return f"a class outside 0 to {n_classes - 1}"
    if line["broken"] and line["prediction"] == line["label"]:
        return "a broken image whose prediction is its label"
    return ""
