"""What the folder of a training says about it: how far it is, how fast, and how long it waited for images."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from robustbench_vlm import store
from robustbench_vlm.errors import InputError
from robustbench_vlm.training import log


def summary(folder: Path) -> dict[str, Any]:
    """The facts of one training, running or finished.

    Args:
        folder: its checkpoint folder.

    Returns:
        `recipe`, `fingerprint`, `step`, `steps`, `finished`; the last line of the log under `last`, the last
        probe under `probe`; `images_per_second`, the median over steps; and `data_share`, the share of the
        time of the steps in which the training waited for images, with the first step and its waiting left
        out, since everything starts there. `None` where the log does not say it.

    Raises:
        InputError: no folder of a training, or a damaged file.
    """
    path = folder / "recipe.json"
    if not path.exists():
        expected = "the checkpoint folder of a training, which has a recipe.json"
        raise InputError(f"run {folder}", "no training is there", expected)
    recipe = store.read_json(path)
    lines = list(store.records(folder / log.NAME))
    steps = [line for line in lines if "loss" in line]
    probes = [line for line in lines if "probe" in line]
    rates = [line["images_per_second"] for line in steps]
    return {
        "recipe": recipe["name"],
        "fingerprint": recipe["fingerprint"],
        "step": steps[-1]["step"] if steps else 0,
        "steps": recipe["optim"]["steps"],
        "finished": (folder / "card.json").exists(),
        "last": steps[-1] if steps else None,
        "probe": probes[-1] if probes else None,
        "images_per_second": round(statistics.median(rates), 1) if rates else None,
        "data_share": _data_share(steps[1:], recipe["optim"]["batch_size"]),
    }


def _data_share(steps: list[dict[str, Any]], batch_size: int) -> float | None:
    timed = [line for line in steps if "data_seconds" in line and line["images_per_second"] > 0]
    waited = sum(line["data_seconds"] for line in timed)
    worked = sum(batch_size / line["images_per_second"] for line in timed)
    return round(waited / (waited + worked), 4) if timed else None
