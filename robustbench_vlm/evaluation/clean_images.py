"""The clean image of a verdict, on the canvas on which it was attacked."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data.dataset import Split, open_split
from robustbench_vlm.errors import DataError
from robustbench_vlm.results.adversarial_images import require_distance
from robustbench_vlm.results.result_file import Result


def read(result: Result, verdict: pd.Series, adversarial: np.ndarray | None, root: Path) -> np.ndarray:
    """(3, H, W) float32 in [0, 1]: the image as the attack met it before its first step.

    Args:
        result: tells the dataset, its split and the canvas.
        verdict: one row of its verdicts.
        adversarial: (3, H, W) the image that broke the model; its distance must be that of the verdict. None
            where it is yet to be made from the clean image, as in a bundle of evidence.
        root: folder of the datasets.

    Raises:
        DataError: the dataset is not below `root`, or the image there is another one.
    """
    config = result.config
    canvas, resize = config["canvas"], config.get("resize", "bicubic")
    split = _split(result.dataset, config["split"], root, canvas, resize)
    if verdict.key not in split.keys:
        raise DataError(f"dataset {result.dataset}", f"no image {verdict.key}", "the dataset of the result")
    found = split.read(split.keys.index(verdict.key), config["canvas_px"])
    if found.sha256 != verdict.image_sha256:
        do = "use the data that the result was measured on"
        raise DataError(f"image {verdict.key}", "another file than at the evaluation", "the same bytes", do)
    pixels: np.ndarray = np.moveaxis(found.pixels, -1, 0).astype(np.float32) / np.float32(255)
    if adversarial is not None:
        require_distance(pixels, adversarial, config["norm"], float(verdict.distance))
    return pixels


@cache
def _split(dataset: str, split: str, root: Path, canvas: str, resize: str) -> Split:
    """The split on a canvas; opened once for all of its images."""
    card = reader.read("datasets", dataset, DatasetCard)
    return open_split(card.model_copy(update={"canvas": canvas, "resize": resize}), root, split)
