"""Result files: where they are, what is in them, how they are written and read back.

A result is one model on one dataset under one attack. Its JSON file has the verdicts of every image beside
it, in a Parquet file of the same name, and on request the adversarial images as safetensors and a bundle of
evidence (`evidence`):

    <results>/cells/<model>-<its fingerprint>/<dataset>/<attack>-<norm>-<radius>-n<images>-<hash>.json

The hash at the end is that of the configuration, and alone decides: whatever stands before it is for people
and has been spelled otherwise by earlier versions. The configuration holds the radius as an exact fraction,
since it is hashed; `threat` beside it, and every other file, has the radius as `threat.eps_text` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from robustbench_vlm import store
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.errors import DataError, some
from robustbench_vlm.results import facts, verdicts
from robustbench_vlm.results.contest import Contest
from robustbench_vlm.threat import Threat, eps_text, in_ladder

SCHEMA = "vlmrob-cell/1"
HASHED = ("config", "outcome", "model", "stages")
"""Blocks that the fingerprint of a result is taken of; the others depend on machine and time."""

COUNTED = ("n", "clean_correct", "robust", "errors")
"""Counts that are compared with the verdicts in every result; results with `table_sha256` have more."""

FOLDER = "cells"
SAME_IMAGES = ("subset_sha256", "images_sha256", "names_sha256", "templates_sha256", "canvas")
"""Facts about a dataset that results in one table must agree on; on a native canvas also `canvas_px`."""


@dataclass(frozen=True)
class Content:
    """The part of a result that is a function of model, data and attack.

    Attributes:
        config: everything that decides the outcome, as plain values; its hash is the name of the result.
        outcome: counts of verdicts, flags, and the fingerprint of the verdicts.
        model: facts about the model that a table prints.
        stages: name, attack and every number of each stage of the chain.
    """

    config: Mapping[str, Any]
    outcome: Mapping[str, Any]
    model: Mapping[str, Any]
    stages: list[dict[str, Any]]

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the result."""
        return store.fingerprint({name: getattr(self, name) for name in HASHED})


@dataclass(frozen=True)
class Result:
    """One result, read from its file.

    Attributes:
        path: of the JSON file.
        content: what is in it, apart from when and where it was measured.
    """

    path: Path
    content: Content

    @property
    def config(self) -> Mapping[str, Any]:
        """Everything that decided the outcome."""
        return self.content.config

    @cached_property
    def outcome(self) -> Mapping[str, Any]:
        """Counts of verdicts, and flags; given out only if the verdicts give the same counts.

        Every table takes its counts from here.

        Raises:
            DataError: see `verdicts`.
        """
        self.verdicts()
        return self.content.outcome

    @cached_property
    def contest(self) -> Contest:
        """What another result must share to be comparable."""
        return Contest.of(self.config)

    @property
    def model(self) -> tuple[str, str]:
        """Name and fingerprint of the model."""
        return self.config["model"], self.config["model_sha256"]

    @property
    def dataset(self) -> str:
        """Name of the dataset."""
        return str(self.config["dataset"])

    @property
    def stages(self) -> list[str]:
        """Names of the chain's stages, in order."""
        return [stage["name"] for stage in self.content.stages]

    @property
    def threat(self) -> Threat:
        """The ball."""
        return self.contest.threat

    def verdicts(self) -> pd.DataFrame:
        """The verdicts of every image, which must be those that the result was counted from.

        Raises:
            DataError: the Parquet file is missing, unreadable or another one; its values cannot be; or the
                counts in the JSON file are not its counts.
        """
        path = self.path.with_suffix(".parquet")
        do = f"delete {self.path} and run the same eval again"
        try:
            found = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            what = f"unreadable ({str(error).splitlines()[0] if str(error) else 'no content'})"
            raise DataError(str(path), what, "the verdicts of the result", do) from None
        fault = verdicts.fault(found, self.stages, self.threat)
        if fault:
            raise DataError(str(path), fault, "verdicts as an evaluation writes them", do)
        self._require_counts(found, path, do)
        return found

    def _require_counts(self, found: pd.DataFrame, path: Path, do: str) -> None:
        """Refuse counts that are not those of the verdicts; older results state fewer of them."""
        stated = self.content.outcome
        known = verdicts.counts(found, self.stages, self._spelled(found))
        for name in ("verdicts_sha256", "table_sha256"):
            if name in stated and stated[name] != known[name]:
                raise DataError(str(path), "other verdicts than the result was counted from", do=do)
        for name in known if "table_sha256" in stated else COUNTED:
            if stated.get(name) != known[name]:
                raise DataError(
                    str(self.path),
                    f"{name} is {json.dumps(stated.get(name)):.60}",
                    f"{json.dumps(known[name]):.60}, counted from {path.name}",
                    do,
                )

    def _spelled(self, found: pd.DataFrame) -> str:
        """The radius as the table spells it, which differs between versions."""
        norm, eps = self.threat.norm, self.threat.eps
        texts = [text for text in found.broken_at_eps.unique() if text]
        ladder = self.contest.ladder
        return next((text for text in texts if in_ladder(text, norm, ladder) == eps), eps_text(norm, eps))


def folder_of(results: Path, model: str, sha256: str, dataset: str) -> Path:
    """The folder of all results of a model on a dataset."""
    return results / FOLDER / f"{store.file_name(model)}-{sha256[:8]}" / store.file_name(dataset)


def path_of(results: Path, config: Mapping[str, Any], n: int) -> Path:
    """The JSON file of a result: the one that exists, whatever its name begins with, else the one to write.

    Args:
        results: folder of all results.
        config: everything that decides the outcome.
        n: number of images.
    """
    folder = folder_of(results, config["model"], config["model_sha256"], config["dataset"])
    hashed = store.fingerprint(config)[:10]
    norm, eps = config["norm"], Contest.of(config).columns["eps"].replace("/", "_")
    shown = store.file_name(f"{config['attack']}-{norm}-{eps}-n{n}")
    path: Path = folder / f"{shown}-{hashed}.json"
    return path if path.exists() else next(iter(sorted(folder.glob(f"*-{hashed}.json"))), path)


def write(path: Path, content: Content, beside: Mapping[str, Any]) -> None:
    """Write the JSON file of a result, whose Parquet file is written before: a result with JSON is whole.

    Args:
        path: see `path_of`.
        content: what the fingerprint is taken of.
        beside: further blocks, which may differ between two measurements of the same result.
    """
    store.write_json(path, {**blocks(content), **beside})


def blocks(content: Content) -> dict[str, Any]:
    """The blocks of a result's JSON file that are a function of its content."""
    contest = Contest.of(content.config)
    spelled = {name: contest.columns[name] for name in ("norm", "eps", "eps_ladder")}
    hashed = {name: getattr(content, name) for name in HASHED}
    return {"schema": SCHEMA, "sha256": content.sha256, "threat": spelled, **hashed}


def read(results: Path) -> list[Result]:
    """Every result below a folder, in order of path.

    Raises:
        DataError: a JSON file there is no result, or its content is not what its fingerprint says.
    """
    return [read_one(path) for path in sorted((results / FOLDER).rglob("*.json"))]


def read_one(path: Path) -> Result:
    """The result in a JSON file.

    Raises:
        DataError: no result, or its content is not what its fingerprint says.
    """
    found = store.read_json(path)
    do = "move it out of the results folder"
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not found.keys() >= {*HASHED}:
        raise DataError(str(path), "not a result", SCHEMA, do)
    content = Content(**{name: found[name] for name in HASHED})
    again = "delete it and run the same eval again"
    if found.get("sha256") != content.sha256:
        raise DataError(
            str(path), "its content does not match its fingerprint", "it as it was written", again
        )
    facts.require(found, str(path), again)
    return Result(path, content)


def of_model(results: Iterable[Result], name: str) -> list[Result]:
    """The results of a model of that name; else of those whose fingerprint begins with these digits."""
    found = list(results)
    own = [result for result in found if name == result.model[0]]
    return own or [result for result in found if name and result.model[1].startswith(name)]


def of_suite(results: Iterable[Result], suite: Suite) -> list[Result]:
    """The results that belong to `suite`, by its datasets, split, seed and list of images, in suite order.

    Raises:
        DataError: two results of one contest saw different images, names, templates or canvases of a dataset;
            or they are of one model on one dataset, so that a table would have the same row twice.
    """
    draw = (suite.split, suite.seed, suite.subset and (suite.subset_sha256 or suite.subset))
    chosen = [
        result
        for result in results
        if result.dataset in suite.datasets
        and (result.contest.split, result.contest.seed, result.contest.subset) == draw
    ]
    chosen.sort(key=lambda result: suite.datasets.index(result.dataset))
    first_of: dict[tuple[Contest, str], Result] = {}
    one_of: dict[tuple[Contest, str, tuple[str, str]], Result] = {}
    for result in chosen:
        _require_same_images(first_of.setdefault((result.contest, result.dataset), result), result)
        _require_one(one_of.setdefault((result.contest, result.dataset, result.model), result), result)
    return chosen


def _require_same_images(first: Result, other: Result) -> None:
    native = ("canvas_px",) if first.config["canvas"] == "native" else ()
    for name in (*SAME_IMAGES, *native):
        if first.config[name] != other.config[name]:
            raise DataError(
                str(other.path),
                f"{name} is {other.config[name]!s:.12}",
                f"{first.config[name]!s:.12} as in {first.path}",
                "results on different data cannot share a table: keep one of them",
            )


def _require_one(first: Result, other: Result) -> None:
    if first is other:
        return
    keys = sorted({*first.config, *other.config})
    differing = [key for key in keys if first.config.get(key) != other.config.get(key)]
    how = f"differs from {first.path} in {some(differing)}" if differing else f"is that of {first.path} again"
    what = f"a second result of {other.model[0]} on {other.dataset} in one contest, which {how}"
    raise DataError(str(other.path), what, "one", "keep one of them")
