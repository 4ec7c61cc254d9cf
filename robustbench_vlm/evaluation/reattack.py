"""Attack a share of the survivors again, drawn by a seed that is given afterwards.

A forward pass cannot show that an image survived: that nothing was found may mean that nothing was tried.
What the native engine finds about an image depends on model, image, threat, chain and seed alone, so an image
that honestly survived survives again.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scipy.stats import hypergeom

from robustbench_vlm import rng
from robustbench_vlm.backends.backend import Backend
from robustbench_vlm.errors import InputError
from robustbench_vlm.evaluation import measure
from robustbench_vlm.evaluation.stages import Report
from robustbench_vlm.evaluation.verify import CellReport
from robustbench_vlm.results import result_file, verdicts

SHARES = (0.01, 0.05, 0.1)
"""Shares of forged survivors for which a report says how likely one is found."""


@dataclass(frozen=True)
class Drawn:
    """The survivors that are attacked again.

    Attributes:
        seed: of the draw.
        survivors: in all results together.
        keys: for each result, by its position, keys of the drawn images.
        refused: by position, why survivors of a verified result cannot be attacked again.
    """

    seed: int
    survivors: int
    keys: dict[int, list[str]]
    refused: dict[int, str]

    @property
    def impossible(self) -> bool:
        """Whether all results were refused."""
        return bool(self.refused) and not self.survivors

    @property
    def count(self) -> int:
        """Number of drawn images."""
        return sum(map(len, self.keys.values()))

    def detection(self) -> dict[float, float]:
        """By share of forged survivors: the chance that at least one of them was drawn."""
        return {share: detection(self.survivors, self.count, share) for share in SHARES}


def detection(survivors: int, drawn: int, share: float) -> float:
    """Chance that a draw without replacement has one of the forged images, which the chain breaks, in it.

    Args:
        survivors: all images that are said to have survived.
        drawn: number of them that are attacked again.
        share: of them that are forged, rounded up to whole images.

    Example:
        >>> round(detection(500, 60, 0.05), 2)
        0.96
    """
    forged = math.ceil(share * survivors)
    return 1 - float(hypergeom.pmf(0, survivors, forged, drawn)) if survivors else 0.0


def share_of(typed: str) -> float:
    """The share that was typed: `2%` or `0.02`.

    Raises:
        InputError: no share above 0 and up to 1.
    """
    where = f"--reattack {typed}"
    try:
        value = float(typed.removesuffix("%")) / (100 if typed.endswith("%") else 1)
    except ValueError:
        raise InputError(where, "not a number", "a share such as 2% or 0.02") from None
    if not 0 < value <= 1:
        raise InputError(where, "not a share", "above 0 and at most 100%")
    return value


def draw(reports: Sequence[CellReport], share: float, seed: int) -> Drawn:
    """Draw survivors of all results together: those with the smallest hashes of seed, result and key.

    Results that failed already, and images of results that the native engine did not attack, are left out.
    """
    verified = {i: report for i, report in enumerate(reports) if report.status == "verified"}
    refused = {i: why for i, report in verified.items() if (why := refusal(report))}
    pool = [
        (rng.rank(seed, f"{report.result.content.sha256}/{key}"), i, key)
        for i, report in verified.items()
        if report.result is not None and i not in refused
        for key in report.survivors
    ]
    keys: dict[int, list[str]] = {}
    for _, i, key in sorted(pool)[: math.ceil(share * len(pool))]:
        keys.setdefault(i, []).append(key)
    return Drawn(seed, len(pool), keys, refused)


def refusal(report: CellReport) -> str:
    """Why the survivors of a result cannot be attacked again here; empty if they can."""
    if report.result is None or report.cell is None:
        return "it cannot be read"
    own, config = report.cell.settings.numerics, report.result.config
    found = [config[name] for name in own if config[name] != own[name]]
    return f"attacked by {', '.join(found)}, and here by {', '.join(own.values())}" if found else ""


def attack(report: CellReport, keys: Sequence[str], on_image: Report) -> list[str]:
    """Run the whole chain, at every radius of the ladder, on some images; returns those that it breaks.

    Args:
        report: a result that was verified.
        keys: of its survivors.
        on_image: called as images finish.
    """
    assert report.cell is not None
    cell, wanted = report.cell, {*keys}
    positions = [i for i, key in enumerate(cell.subject.split.keys) if key in wanted]
    images = cell.subject.images
    chosen = replace(
        images,
        split=replace(images.split, entries=tuple(images.split.entries[i] for i in positions)),
        sha256=tuple(images.sha256[i] for i in positions),
        pixels=None if images.pixels is None else images.pixels[positions],
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(
            cell.settings,
            chains=(cell.chain,),
            ladder=cell.ladder,
            results=Path(folder),
            suite=None,
            backend=Backend(),
        )
        *_, last = measure.evaluate(replace(cell.subject, images=chosen), settings, on_image)
        table = result_file.read_one(last).verdicts()
    return [str(key) for key in table.key[~verdicts.standing(table)]]
