"""Pictures of images that were broken, where an evaluation kept them: they travel inside the page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from robustbench_vlm import safe_text
from robustbench_vlm.results import adversarial_images, pictures
from robustbench_vlm.results.pictures import Clean
from robustbench_vlm.results.result_file import Result

LABELS = {"perturbation": "perturbation, scaled"}


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
        image, of the perturbation, and of the adversarial image; see `pictures.of_verdict`. A verdict without
        any image is left out.

        Args:
            results: of one model in one contest; those without kept images are left out.
        """
        kept = [result for result in results if pictures.kept(result)]
        lines = []
        for order, result in enumerate(kept):
            found = result.verdicts()
            broken = found[found.broken_by != ""].sort_values("key").head(self.most)
            lines += [(k, order, result, row) for k, (_, row) in enumerate(broken.iterrows())]
        lines.sort(key=lambda line: line[:2])
        shown = [self._picture(result, verdict) for _, _, result, verdict in lines[: self.most]]
        return [picture for picture in shown if picture["images"]]

    def _picture(self, result: Result, verdict: pd.Series) -> dict[str, Any]:
        images = pictures.of_verdict(result, verdict, self.clean)
        addresses = [(LABELS.get(kind, kind), _address(image)) for kind, image in images.items()]
        text = f"class {verdict.label} became {verdict.adv_prediction}, by {verdict.broken_by}"
        return {"key": verdict.key, "text": safe_text.line(text), "images": addresses}


def _address(image: np.ndarray) -> str:
    png = adversarial_images.png(image)
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
