"""The result file of a cell: what is in it, and how it is read back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pandas as pd

from robustbench_vlm import store
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.errors import DataError
from robustbench_vlm.results import verdicts
from robustbench_vlm.threat import Threat

CELL = "vlmrob-cell/1"


HASHED = frozenset({"config", "outcome", "model", "stages"})  # what the fingerprint of a cell is taken of


@dataclass(frozen=True)
class Cell:
    """One result file."""

    path: Path
    content: Mapping[str, Any]

    @property
    def config(self) -> Mapping[str, Any]:
        """What decided the outcome."""
        config: Mapping[str, Any] = self.content["config"]
        return config

    @property
    def outcome(self) -> Mapping[str, Any]:
        """Counts of verdicts."""
        outcome: Mapping[str, Any] = self.content["outcome"]
        return outcome

    @property
    def contest(self) -> tuple[str, ...]:
        """What two cells must share to be compared: attack, threat, images drawn, precision."""
        c = self.config
        shared = (
            "attack",
            "attack_sha256",
            "norm",
            "eps",
            "n_requested",
            "seed",
            "split",
            "precision",
            "engine",
        )
        marks = (str(c.get("protocol", "")), str(c.get("subset", "")))
        return (*(str(c[name]) for name in shared), ",".join(c["eps_ladder"]), *marks)

    @property
    def model(self) -> tuple[str, str]:
        """Name and fingerprint."""
        return self.config["model"], self.config["model_sha256"]

    @property
    def stages(self) -> list[str]:
        """Names of the chain's stages, in order."""
        return [stage["name"] for stage in self.content["stages"]]

    @property
    def threat(self) -> Threat:
        """The ball."""
        return Threat(self.config["norm"], Fraction(self.config["eps"]))

    def verdicts(self) -> pd.DataFrame:
        """The verdict table beside the cell, held to the fingerprint in it.

        Raises:
            DataError: the file is missing, or is not the one that the cell was counted from.
        """
        path = self.path.with_suffix(".parquet")
        do = f"delete {self.path} and run the same eval again"
        try:
            found = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise DataError(str(path), f"unreadable ({error})", "the verdicts of the cell", do) from None
        if verdicts.sha256(found) != self.outcome["verdicts_sha256"]:
            raise DataError(str(path), "other verdicts than the cell was counted from", do=do)
        return found


def read(results: Path) -> list[Cell]:
    """Every cell below `results`, in order of path.

    Raises:
        DataError: a JSON file there is no cell, or its content is not what its fingerprint says.
    """
    return [_read(path) for path in sorted((results / "cells").rglob("*.json"))]


def _read(path: Path) -> Cell:
    content = store.read_json(path)
    if not isinstance(content, dict) or content.get("schema") != CELL or not content.keys() >= HASHED:
        raise DataError(str(path), "not a result cell", CELL, "move it out of the results folder")
    if content.get("sha256") != store.fingerprint({name: content[name] for name in HASHED}):
        do = "delete it and run the same eval again"
        raise DataError(str(path), "its content does not match its fingerprint", "it as it was written", do)
    return Cell(path, content)


def of_suite(cells: Iterable[Cell], suite: Suite) -> list[Cell]:
    """The cells that belong to `suite`, by its datasets, split and seed; in the order of its datasets.

    Raises:
        DataError: two cells of one contest saw different images of a dataset.
    """
    chosen = [
        cell
        for cell in cells
        if cell.config["dataset"] in suite.datasets
        and (cell.config["split"], cell.config["seed"]) == (suite.split, suite.seed)
        and cell.config.get("subset", "") == (suite.subset and (suite.subset_sha256 or suite.subset))
    ]
    chosen.sort(key=lambda cell: suite.datasets.index(cell.config["dataset"]))
    drawn: dict[tuple[Any, ...], Cell] = {}
    for cell in chosen:
        same = ("subset_sha256", "images_sha256", "names_sha256", "templates_sha256")
        first = drawn.setdefault((cell.contest, cell.config["dataset"]), cell)
        for name in same:
            if first.config[name] != cell.config[name]:
                raise DataError(
                    str(cell.path),
                    f"{name} is {cell.config[name][:12]}",
                    f"{first.config[name][:12]} as in {first.path}",
                    "results on different data cannot share a table: keep one of them",
                )
    return chosen


def _place(cell: Cell) -> tuple[Any, ...]:
    """What two attacks must have in common to have seen the same images and the same model."""
    fields = ("dataset", "norm", "eps", "n_requested", "seed", "split", "precision", "engine")
    marks = ("protocol", "subset")  # with other sentences, or on another canvas
    return cell.model, *(cell.config[name] for name in fields), *(cell.config.get(name, "") for name in marks)
