"""Outcomes of a frontier study: what every judged model got right, image by image, in one ledger.

The ledger is `<study>-outcomes.jsonl` beside the tables, one sealed line an outcome. It holds all that tables
and pages are made from, so a study goes on from it on another machine, and can be rendered without any model.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from robustbench_vlm import store
from robustbench_vlm.errors import DataError
from robustbench_vlm.results import verdicts
from robustbench_vlm.results.result_file import Result

KINDS = ("clean", "robust")
SEEN, UNSEEN = "seen", "unseen"  # whether a model or one of its parents was trained on a dataset

Id = tuple[str, float, str]
"""Fingerprint of the recipe, share of the trained weights, fingerprint of the measurement."""


@dataclass(frozen=True)
class OnDataset:
    """What one model got right on one dataset.

    Attributes:
        keys_sha256: of the images' names in their order.
        exposure: `seen`, `unseen` or `unknown` by the model and its parents.
        clean, robust: (N,) bool: right without attack, and under it.
    """

    keys_sha256: str
    exposure: str
    clean: np.ndarray
    robust: np.ndarray

    def of(self, kind: str) -> np.ndarray:
        """The clean or the robust verdicts."""
        return self.clean if kind == "clean" else self.robust


@dataclass(frozen=True)
class Outcome:
    """One model under one measurement.

    Attributes:
        datasets: by name.
        curve: (step, clean, robust) of every probe of its training, accuracies as fractions.
        step_seconds: mean processor time of a training step; None where it was not taken.
        hours: of processor time: training, and this measurement.
    """

    datasets: Mapping[str, OnDataset]
    curve: tuple[tuple[int, float, float], ...]
    step_seconds: float | None
    hours: tuple[float, float]

    def mean(self, kind: str) -> float:
        """Accuracy in points: the mean over the datasets."""
        return 100 * float(np.mean([one.of(kind).mean() for one in self.datasets.values()]))


def packed(result: Result) -> dict[str, Any]:
    """What a result says of its dataset, as JSON values; verdicts are base64 of one bit an image."""
    table = result.verdicts().sort_values("key", ignore_index=True)
    return {
        "n": len(table),
        "keys_sha256": store.fingerprint(table.key.tolist()),
        "exposure": str(result.outcome["exposure"]),
        "clean": _bits(table.clean_correct.to_numpy(bool)),
        "robust": _bits(verdicts.standing(table).to_numpy(bool)),
        "table_sha256": result.outcome["table_sha256"],
    }


def _bits(values: np.ndarray) -> str:
    return base64.b64encode(np.packbits(values).tobytes()).decode()


def _unpacked(text: str, n: int) -> np.ndarray:
    raw = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    return np.unpackbits(raw, count=n).astype(bool)


def ledger(tables: Path, study: str) -> Path:
    """The file of a study's outcomes."""
    return tables / f"{store.file_name(study)}-outcomes.jsonl"


def append(path: Path, found: Iterable[Mapping[str, Any]]) -> None:
    """Add outcomes. Several commands may do so at once, each for other methods."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):  # mending cuts a line that another one is writing
        store.mend(path)
        for record in found:
            store.append(path, record)


def read(path: Path) -> dict[Id, Outcome]:
    """All outcomes of a ledger; of two with one id the first counts.

    Raises:
        InputError: a damaged line.
        DataError: outcomes on other images of one dataset, or a line that is none.
    """
    found: dict[Id, Outcome] = {}
    keys: dict[tuple[str, str], str] = {}
    for number, record in enumerate(store.records(path), 1):
        where = f"{path}, line {number}"
        try:
            run = record["study_run"]
            id_ = (run["recipe"], float(run["interpolation"]), run["measurement"])
            outcome = _outcome(record)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(where, f"no outcome of a study ({error!r:.80})", "one of this version") from None
        for name, one in outcome.datasets.items():
            if keys.setdefault((run["measurement"], name), one.keys_sha256) != one.keys_sha256:
                do = "measure both with one data folder"
                raise DataError(where, f"other images of {name} than the lines before", do=do)
        found.setdefault(id_, outcome)
    return found


def _outcome(record: Mapping[str, Any]) -> Outcome:
    datasets = {
        name: OnDataset(
            one["keys_sha256"],
            one["exposure"],
            _unpacked(one["clean"], one["n"]),
            _unpacked(one["robust"], one["n"]),
        )
        for name, one in record["datasets"].items()
    }
    curve = tuple((int(step), float(clean), float(robust)) for step, clean, robust in record["curve"])
    seconds = record["step_seconds"]
    training = (seconds or 0.0) * (curve[-1][0] if curve else 0)
    return Outcome(datasets, curve, seconds, (training / 3600, float(record["run"]["seconds"]) / 3600))
