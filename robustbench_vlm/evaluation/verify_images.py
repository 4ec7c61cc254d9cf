"""What the images of a bundle prove: the dataset's own, in the ball, and misclassified by the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from robustbench_vlm.engine import geometry
from robustbench_vlm.errors import some
from robustbench_vlm.evaluation.bundling import ROUNDING, CanonicalPass
from robustbench_vlm.evaluation.cells import Cell
from robustbench_vlm.results import packing
from robustbench_vlm.results.packing import Packed
from robustbench_vlm.threat import Threat, in_ladder


@dataclass(frozen=True)
class Claim:
    """Something that a result says.

    Attributes:
        name: what it is about.
        fault: why it does not hold; empty if it does.
    """

    name: str
    fault: str = ""


@dataclass(frozen=True)
class Forward:
    """What forward passes say.

    Attributes:
        claims: about clean predictions and about adversarial images.
        near: images that are accepted although a logit is larger than it should be, by at most `ROUNDING`.
    """

    claims: tuple[Claim, ...]
    near: int


def same_images(cell: Cell, table: pd.DataFrame) -> list[Claim]:
    """Compare keys, labels and hashes of the images with those of the published subset.

    Args:
        cell: of the images that the suite draws.
        table: verdicts of the images that were claimed.
    """
    subject = cell.subject
    labels = dict(zip(subject.split.keys, subject.split.labels.tolist(), strict=True))
    hashes = dict(zip(subject.split.keys, subject.image_shas, strict=True))
    foreign = [key for key in table.key if key not in labels]
    absent = sorted({*labels} - {*table.key})
    drawn = [f"{key} is not drawn by the suite" for key in foreign] + [f"{key} is missing" for key in absent]
    known = [
        row for row in table[["key", "label", "image_sha256"]].to_dict("records") if row["key"] in labels
    ]
    relabelled = [row["key"] for row in known if row["label"] != labels[row["key"]]]
    replaced = [row["key"] for row in known if row["image_sha256"] != hashes[row["key"]]]
    twice = pd.Series(table.image_sha256)[table.image_sha256.duplicated()]
    own = len({*hashes.values()}) == len(hashes)
    return [
        Claim("published subset", some(drawn)),
        Claim("labels", some(relabelled)),
        Claim("image files", some(replaced)),
        Claim("distinct images", f"{len(twice)} images occur twice" if own and len(twice) else ""),
    ]


def forward(cell: Cell, table: pd.DataFrame, images: Mapping[str, Packed]) -> Forward:
    """Run the canonical pass over the clean and over the adversarial images that the dataset has.

    Args:
        cell: model, dataset and ball.
        table: the verdicts that are claimed.
        images: the packed adversarial images by key.
    """
    subject, decide = cell.subject, CanonicalPass.of(cell)
    rows = table.set_index("key")
    keys = [key for key in subject.split.keys if key in rows.index]
    position = {key: i for i, key in enumerate(subject.split.keys)}
    clean_wrong, near = _clean(decide, rows.loc[keys], [position[key] for key in keys])
    broken = rows[rows.broken_by != ""]
    lacking = [str(key) for key in broken.index if key not in images]
    surplus = sorted({*images} - {*broken.index})
    faults = _Faults([], [], [], lacking + [f"{key} is not broken" for key in surplus])
    for eps, group in broken.groupby("broken_at_eps"):
        threat = _threat(cell, str(eps))
        if threat is None:
            faults.radius.append(f"{eps}, which was not attacked")
            continue
        members = [key for key in keys if key in group.index and key in images]
        near += _adversarial(
            decide, threat, group.loc[members], [position[k] for k in members], images, faults
        )
    found = {
        "clean predictions": clean_wrong,
        "evidence": faults.evidence,
        "radius": faults.radius,
        "inside the ball": faults.outside,
        "misclassified": faults.right,
    }
    return Forward(tuple(Claim(name, some(list(wrong))) for name, wrong in found.items()), near)


@dataclass
class _Faults:
    """Keys of images, by what is wrong with their evidence."""

    outside: list[str]
    right: list[str]
    radius: list[str]
    evidence: list[str]


def _clean(decide: CanonicalPass, rows: pd.DataFrame, positions: Sequence[int]) -> tuple[list[str], int]:
    """Keys of images whose clean prediction is another one, and how many are accepted within rounding."""
    wrong, near = [], 0
    n_classes, subject = decide.subject.card.n_classes, decide.subject
    done = 0
    for part in subject.images.parts(positions, decide.rows):
        stated = rows.iloc[done : done + len(part)]
        done += len(part)
        classes = stated.clean_prediction.to_numpy()
        able = np.clip(classes, 0, n_classes - 1)
        predictions, margins = decide(subject.images.floats(part), torch.from_numpy(able.astype(np.int64)))
        failed = stated.error.to_numpy() != ""
        same = (predictions == classes) & np.isfinite(margins)
        close = (able == classes) & (margins >= -ROUNDING)
        wrong += [str(key) for key in stated.index[~(same | close | (failed & np.isnan(margins)))]]
        near += int((close & ~same).sum())
    return wrong, near


def _threat(cell: Cell, eps: str) -> Threat | None:
    """The ball at a radius of the ladder; None for another radius."""
    radius = in_ladder(eps, cell.settings.norm, cell.ladder)
    return None if radius is None else Threat(cell.settings.norm, radius)


def _adversarial(
    decide: CanonicalPass,
    threat: Threat,
    rows: pd.DataFrame,
    positions: Sequence[int],
    images: Mapping[str, Packed],
    faults: _Faults,
) -> int:
    """Check adversarial images of one radius; returns how many are accepted within rounding.

    Args:
        decide: the canonical pass.
        threat: the ball in which they must lie.
        rows: verdicts of the images, by key.
        positions: of the images in the dataset.
        images: packed, by key.
        faults: gets the keys of images that do not prove what they should.
    """
    subject, near, done = decide.subject, 0, 0
    for part in subject.images.parts(positions, decide.rows):
        keys, clean = [str(key) for key in rows.index[done : done + len(part)]], subject.images.floats(part)
        done += len(part)
        unpacked, whole = _unpacked(zip(keys, clean.numpy(), strict=True), images, threat, faults)
        if not whole:
            continue
        adv = torch.from_numpy(np.stack(unpacked))
        _, margins = decide(adv, subject.labels[[part[i] for i in whole]])
        excess = geometry.excess(adv, clean[whole], threat).numpy()
        for i, margin, out in zip(whole, margins, excess, strict=True):
            if out > threat.slack:
                faults.outside.append(f"{keys[i]} by {out:.3g}")
            if not margin <= ROUNDING:  # of NaN, too
                faults.right.append(keys[i])
            near += int(0 <= margin <= ROUNDING)
    return near


def _unpacked(
    clean: Iterable[tuple[str, np.ndarray]], images: Mapping[str, Packed], threat: Threat, faults: _Faults
) -> tuple[list[np.ndarray], list[int]]:
    """The images that can be unpacked, and their positions among the given ones."""
    found, whole = [], []
    for i, (key, image) in enumerate(clean):
        try:
            found.append(packing.unpack(images[key], image, threat))
            whole.append(i)
        except ValueError as error:
            faults.evidence.append(f"{key}: {error}")
    return found, whole
