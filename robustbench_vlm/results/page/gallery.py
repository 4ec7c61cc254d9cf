"""Pictures of images that were broken, where an evaluation kept them: they travel inside the page."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from robustbench_vlm import safe_text
from robustbench_vlm.results import adversarial_images
from robustbench_vlm.results.result_file import Result

Clean = Callable[[Result, pd.Series, np.ndarray], np.ndarray | None]
"""The clean image of a result's verdict and adversarial image; None where its dataset is not at hand."""


@dataclass(frozen=True)
class Gallery:
    """Which pictures a page has.

    Attributes:
        most: pictures of each row of each contest.
        clean: where clean images come from.
    """

    most: int
    clean: Clean

    def of_row(self, results: Sequence[Result]) -> list[dict[str, Any]]:
        """Pictures of one row: the first broken image of each dataset, then the second ones, and so on.

        Each has the image's key, what happened to it, and [kind, data address of a PNG file] of the clean
        image, of the perturbation, and of the adversarial image; of the last alone where the clean image is
        not at hand.

        Args:
            results: of one model in one contest; those without kept images are left out.
        """
        kept = [result for result in results if adversarial_images.path(result).is_file()]
        lines = []
        for order, result in enumerate(kept):
            found = result.verdicts()
            broken = found[found.broken_by != ""].sort_values("key").head(self.most)
            lines += [(k, order, result, row) for k, (_, row) in enumerate(broken.iterrows())]
        lines.sort(key=lambda line: line[:2])
        return [self._picture(result, verdict) for _, _, result, verdict in lines[: self.most]]

    def _picture(self, result: Result, verdict: pd.Series) -> dict[str, Any]:
        adversarial = adversarial_images.read(result, verdict)
        images = [("adversarial", adversarial)]
        clean = self.clean(result, verdict, adversarial)
        if clean is not None:
            scaled = adversarial_images.perturbation(clean, adversarial)
            images = [("clean", clean), ("perturbation, scaled", scaled), *images]
        addresses = [(kind, _address(adversarial_images.png(image))) for kind, image in images]
        text = f"class {verdict.label} became {verdict.adv_prediction}, by {verdict.broken_by}"
        return {"key": verdict.key, "text": safe_text.line(text), "images": addresses}


def _address(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
