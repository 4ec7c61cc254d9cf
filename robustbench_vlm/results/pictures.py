"""The images of one verdict, to be looked at: clean, perturbation, adversarial, as an evaluation kept them.

`vlmrob eval --save-adversarial` keeps adversarial images as they are. `--save-evidence` keeps what has to be
added to the clean image, so that without the dataset there is nothing to show.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from robustbench_vlm.errors import DataError
from robustbench_vlm.results import adversarial_images, evidence, packing
from robustbench_vlm.results.result_file import Result
from robustbench_vlm.threat import Threat, in_ladder

Clean = Callable[[Result, pd.Series, np.ndarray | None], np.ndarray | None]
"""The clean image of a result's verdict and of its adversarial image, where that is known before.

None where the dataset is not at hand.
"""


def kept(result: Result) -> bool:
    """Whether an evaluation kept the adversarial images of a result, in either form."""
    return adversarial_images.path(result).is_file() or evidence.path_of(result.path).is_file()


def of_verdict(result: Result, verdict: pd.Series, clean: Clean) -> dict[str, np.ndarray]:
    """Images (3, H, W) float32 in [0, 1] by what they show, in the order in which they are looked at.

    The perturbation is scaled so that its largest value is 0 or 1. Without the clean image there is the
    adversarial one alone, and nothing where a bundle of evidence alone was kept.

    Args:
        result: with kept images.
        verdict: of a broken image.
        clean: where clean images come from.

    Raises:
        DataError: nothing was kept, or what was kept is not of this verdict.
    """
    if adversarial_images.path(result).is_file() or not evidence.path_of(result.path).is_file():
        adversarial = adversarial_images.read(result, verdict)
        original = clean(result, verdict, adversarial)
    else:
        original = clean(result, verdict, None)
        if original is None:
            return {}
        adversarial = _from_evidence(result, verdict, original)
    if original is None:
        return {"adversarial": adversarial}
    scaled = adversarial_images.perturbation(original, adversarial)
    return {"clean": original, "perturbation": scaled, "adversarial": adversarial}


def _from_evidence(result: Result, verdict: pd.Series, clean: np.ndarray) -> np.ndarray:
    """The adversarial image that the bundle beside a result holds.

    Raises:
        DataError: the bundle is of another result, lacks the image, or holds other bytes than an image.
    """
    path = evidence.path_of(result.path)
    bundle = _bundle(path)
    where, do = f"{path}, image {verdict.key}", evidence.DO
    if bundle.result.get("sha256") != result.content.sha256:
        raise DataError(str(path), "evidence of another result", result.path.name, do)
    packed = bundle.images.get(verdict.key)
    if packed is None:
        raise DataError(where, "no such image", "every image that was broken", do)
    norm = result.contest.norm
    radius = in_ladder(verdict.broken_at_eps, norm, result.contest.ladder)
    if radius is None:
        raise DataError(where, f"broken at {verdict.broken_at_eps}", "a radius of the result", do)
    try:
        return packing.unpack(packed, clean, Threat(norm, radius))
    except ValueError as error:
        raise DataError(where, f"no image ({error})", "one of the clean image's shape", do) from None


@lru_cache(maxsize=4)
def _bundle(path: Path) -> evidence.Bundle:
    """A bundle; a gallery asks for one image of it after the other."""
    return evidence.read(path)
