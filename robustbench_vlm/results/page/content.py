"""What the page knows, as plain values: models, contests, and of every result its counts and verdicts.

The page computes every mean, interval, test and rank from these values; none of them is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.special import ndtri

from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.results import flags, published, stop_rule, verdicts, verification
from robustbench_vlm.results.contest import Contest
from robustbench_vlm.results.page import checks, command, pack
from robustbench_vlm.results.page.gallery import Gallery
from robustbench_vlm.results.result_file import Result
from robustbench_vlm.threat import in_ladder

SCHEMA = "vlmrob-page/1"
DIGITS = 16
"""Hexadecimal digits of a fingerprint in the page; the CSV has all 64."""


@dataclass(frozen=True)
class Seen:
    """What the page takes from the verdicts of one result.

    Attributes:
        counts: images that are right when clean; how many of them were lost before any attack at this radius
            (broken at a smaller one, or an error); how many each stage broke.
        images: number of the list of images; -1 without verdicts.
        bits: numbers of the bits that say which images are right when clean, and after the whole chain.
        iterations: see `pack.iterations`.
    """

    counts: list[int]
    images: int = -1
    bits: list[int] = field(default_factory=list)
    iterations: list[list[int]] = field(default_factory=list)


class Content:
    """Collects the values of a page, result by result.

    Attributes:
        suite: the page's.
        table: rows of the leaderboard; flags are read from them.
        levels: how well results are supported, by fingerprint (`verification.levels`); by their verdicts
            alone if nothing is said.
        with_bits: whether verdicts, names of images, histograms and fingerprints are included.
        gallery: which pictures are included; None for none.
    """

    def __init__(
        self,
        suite: Suite,
        table: pd.DataFrame,
        *,
        levels: Mapping[str, str],
        with_bits: bool,
        gallery: Gallery | None,
    ) -> None:
        self.suite, self.levels, self.with_bits, self.gallery = suite, levels, with_bits, gallery
        self.table = {row["cell_sha256"]: row for row in table.to_dict("records") if row["cell_sha256"]}
        self.bits, self.flags = pack.Pool(), pack.Pool()
        self.images: dict[tuple[str, ...], int] = {}
        self.names: list[list[str]] = []
        self.seen: dict[Path, Seen] = {}

    def of(self, results: Sequence[Result]) -> dict[str, Any]:
        """All values of the page, ready to be written as JSON.

        Args:
            results: of the suite; see `result_file.of_suite`.
        """
        self.seen = {result.path: self._look(result) for result in results}
        models = list(dict.fromkeys(sorted(result.model for result in results)))
        groups: dict[Contest, dict[int, dict[str, Result]]] = {}
        for result in sorted(results, key=lambda found: (*found.contest.position, found.contest)):
            rows = groups.setdefault(result.contest, {})
            rows.setdefault(models.index(result.model), {})[result.dataset] = result
        first = {result.model: result for result in reversed(results)}
        contests = [self._contest(contest, rows) for contest, rows in groups.items()]
        return {
            "schema": SCHEMA,
            "suite": {"name": self.suite.name, "title": self.suite.title, "version": self.suite.version},
            "sets": list(self.suite.datasets),
            "means": {f"mean:{name}": list(sets) for name, sets in self.suite.means.items()},
            "models": [_model(first[model]) for model in models],
            "contests": contests,
            "flags": [_flag(flag) for flag in self.flags.values],
            "images": self.names,
            "bits": self.bits.values,
        }

    def _contest(self, contest: Contest, rows: Mapping[int, Mapping[str, Result]]) -> dict[str, Any]:
        """A contest with its rows, the datasets of each in suite order."""
        one = {result.dataset: result for row in rows.values() for result in row.values()}
        sets = [one.get(name) for name in self.suite.datasets]
        any_result = next(iter(one.values()))
        return {
            **{k: str(v) if k in ("norm", "eps") else v for k, v in contest.columns.items()},
            "id": contest.digits,
            "title": contest.title,
            "command": command.parts(contest, self.suite.name),
            "level": (1 + stop_rule.confidence(contest.stop_rule)) / 2,
            "z": float(ndtri((1 + stop_rule.confidence(contest.stop_rule)) / 2)),
            "radius": float(contest.eps),
            "radii": contest.radii,
            "stages": any_result.stages,
            "numbers": any_result.content.stages if self.with_bits else [],
            "n": [0 if result is None else result.outcome["n"] for result in sets],
            "chance": [0 if result is None else round(result.outcome["majority"], 4) for result in sets],
            "images": [-1 if result is None else self.seen[result.path].images for result in sets],
            "printed": published.under(contest, self.suite.datasets),
            "rows": [self._row(model, rows[model]) for model in sorted(rows)],
        }

    def _row(self, model: int, row: Mapping[str, Result]) -> dict[str, Any]:
        """The results of one model: `cells` has, for each dataset, `Seen.counts`, or 0 without a result."""
        sets = [row.get(name) for name in self.suite.datasets]
        lines = [None if result is None else self.table[result.content.sha256] for result in sets]
        marked = {
            str(i): [self.flags.number(flag) for flag in line["flag"].split(";")]
            for i, line in enumerate(lines)
            if line is not None and line["flag"]
        }
        there = [result for result in sets if result is not None]
        levels = {self.levels.get(result.content.sha256, verification.VERDICTS) for result in there}
        found = {
            "model": model,
            "cells": [0 if result is None else self.seen[result.path].counts for result in sets],
            "exposure": "".join("-" if r is None else r.outcome["exposure"][:1] for r in sets),
            "flags": marked,
            "evidence": sorted(levels),
        }
        if self.gallery is not None:
            found["pictures"] = self.gallery.of_row(there)
        if self.with_bits:
            found |= {
                "bits": [0 if result is None else self.seen[result.path].bits for result in sets],
                "iterations": [0 if r is None else self.seen[r.path].iterations for r in sets],
                "sha256": ["" if r is None else r.content.sha256[:DIGITS] for r in sets],
                "checks": checks.worst(there),
            }
        return found

    def _look(self, result: Result) -> Seen:
        """Read the verdicts of a result, once."""
        found, contest = result.verdicts(), result.contest
        robust = verdicts.standing(found)
        texts = [text for text in found.broken_at_eps.unique() if text]
        here = [text for text in texts if in_ladder(text, contest.norm, contest.ladder) == contest.eps]
        start = int((robust | found.broken_at_eps.isin(here)).sum())
        survivors = [start, *(result.outcome["robust"][stage] for stage in result.stages)]
        fewer = [more - less for more, less in pairwise([result.outcome["clean_correct"], *survivors])]
        counts = [result.outcome["clean_correct"], *fewer]
        if not self.with_bits:
            return Seen(counts)
        order = found.key.argsort(kind="stable")
        images = tuple(found.key.iloc[order])
        if images not in self.images:
            self.images[images] = len(self.names)
            self.names.append(pack.names(images))
        values = [mask.to_numpy()[order] for mask in (found.clean_correct, robust)]
        bits = [self.bits.number(pack.bits(value)) for value in values]
        return Seen(counts, self.images[images], bits, pack.iterations(found, result.stages))


def _flag(flag: str) -> list[str | bool]:
    """The flag, its sentence, and whether it is a failed check; the others are facts."""
    return [flag, flags.WORDS.get(flag, "see docs/attacks.md"), flags.severity(flag) == "failed"]


def _model(result: Result) -> dict[str, Any]:
    """Facts about a model that the page shows and filters by."""
    facts = result.content.model
    trained = f"{facts['train_norm']} {facts['train_eps']}".strip()
    return {
        "id": facts["id"],
        "quoted": command.quoted([facts["id"]]),
        "sha256": result.model[1],
        "arch": facts["arch"],
        "parameters": facts["parameters"],
        "defense": facts["defense"],
        "kind": "undefended" if facts["defense"] == "none" else "training-time",
        "trained": trained,
        "data": [str(name) for name in facts.get("trained_on") or []],
    }
