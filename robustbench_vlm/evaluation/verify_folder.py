"""Verify a bundle, a folder of results or a leaderboard CSV: each result and row, a share of survivors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustbench_vlm import store
from robustbench_vlm.errors import InputError
from robustbench_vlm.evaluation import reattack
from robustbench_vlm.evaluation.reattack import Drawn
from robustbench_vlm.evaluation.stages import Report
from robustbench_vlm.evaluation.verify import CellReport, Verifier
from robustbench_vlm.evaluation.verify_images import Claim
from robustbench_vlm.results import evidence, result_file, row_check, submission
from robustbench_vlm.results.row_check import RowReport
from robustbench_vlm.results.verification import Checked

UNKNOWN = (
    "survivors are checked for clean correctness only: that no attack was left out is shown by --reattack",
    "a result without a bundle is unproven, which does not say that it is wrong",
    "which stage broke an image, at which iteration and at what cost is not computed again",
)
"""What verification does not show."""


@dataclass(frozen=True)
class Target:
    """What is to be verified.

    Attributes:
        bundles: bundles of evidence.
        bare: JSON files of results without a bundle.
        tables: leaderboard CSVs, whose rows must follow from those results.
        submitted: the folder of a submission, which must be complete and have evidence for every result;
            None for anything else.
    """

    bundles: tuple[Path, ...]
    bare: tuple[Path, ...] = ()
    tables: tuple[Path, ...] = ()
    submitted: Path | None = None

    @classmethod
    def of(cls, path: Path, results: Path) -> Target:
        """What is at a path.

        Args:
            path: a bundle, a folder or a CSV.
            results: folder of the results of a CSV.

        Raises:
            InputError: none of them, or a folder without results.
        """
        if path.is_dir():
            found = cls._below(path)
            if not (found.bundles or found.bare or found.tables):
                do = f"name a folder of vlmrob eval --save-evidence, or a file *{evidence.SUFFIX}"
                raise InputError(str(path), "no result, no bundle and no table", do=do)
            return found
        if not path.is_file():
            raise InputError(str(path), "no such file or folder", "a bundle, a folder of results or a CSV")
        if path.name.endswith(evidence.SUFFIX):
            return cls((path,))
        if path.suffix != ".csv":
            raise InputError(str(path), "no bundle", f"*{evidence.SUFFIX}, *.csv or a folder of results")
        listed = {*row_check.read(path).cell_sha256}
        beside = cls._below(results) if results.is_dir() else cls(())
        return cls(
            tuple(file for file in beside.bundles if _sha256(file) in listed),
            tuple(file for file in beside.bare if _sha256(file) in listed),
            (path,),
        )

    @classmethod
    def _below(cls, folder: Path) -> Target:
        bundles = tuple(sorted(folder.rglob(f"*{evidence.SUFFIX}")))
        proved = {evidence.result_of(path) for path in bundles}
        below = folder.parent  # what lies above it has a name of its own
        cells = sorted(
            path
            for path in folder.rglob("*.json")
            if result_file.FOLDER in path.relative_to(below).parts or _schema(path) == result_file.SCHEMA
        )
        submitted = folder if (folder / submission.FILE).is_file() else None
        tables = tuple(sorted(folder.glob("*.csv")))
        return cls(bundles, tuple(path for path in cells if path not in proved), tables, submitted)


def _schema(path: Path) -> str:
    """What a JSON file says that it is; empty where it says nothing."""
    try:
        found = store.read_json(path)
    except (InputError, OSError):
        return ""
    return str(found.get("schema", "")) if isinstance(found, dict) else ""


def _sha256(path: Path) -> str:
    """The fingerprint that a bundle or a result states; empty where it cannot be read."""
    try:
        if path.name.endswith(evidence.SUFFIX):
            return str(evidence.read(path).result.get("sha256"))
        return result_file.read_one(path).content.sha256
    except InputError:
        return ""


@dataclass(frozen=True)
class Verification:
    """What was found out about a target.

    Attributes:
        cells: one report a result.
        tables: one report a CSV.
        drawn: the survivors that were attacked again; None without `--reattack`.
        submitted: whether it is a submission.
        files: what in its folder is not as it was submitted; one sentence a file.
    """

    cells: tuple[CellReport, ...]
    tables: tuple[RowReport, ...]
    drawn: Drawn | None
    submitted: bool
    files: tuple[str, ...] = ()

    def faults(self) -> list[str]:
        """One sentence for everything that does not hold."""
        lines = list(self.files)
        for report in self.cells:
            lines += [f"{_name(report)}: {claim.name}: {claim.fault}" for claim in report.faults]
        lines += [f"{table.path}: {fault}" for table in self.tables for fault in table.faults]
        return lines + (self.lacking() if self.submitted else [])

    def refused(self) -> list[str]:
        """One sentence for every result whose survivors should have been attacked again and cannot be."""
        refusals = {} if self.drawn is None else self.drawn.refused
        return [f"{_name(self.cells[i])}: not attacked again: {why}" for i, why in refusals.items()]

    def lacking(self) -> list[str]:
        """One sentence for everything without evidence, and for datasets that a model lacks."""
        lines = [
            f"{_name(report)}: unproven, there is no bundle"
            for report in self.cells
            if report.status == "unproven"
        ]
        for table in self.tables:
            lines += [f"{table.path}: {text}" for text in (*table.unproven, *table.incomplete)]
        return lines

    @property
    def checked(self) -> dict[str, Checked]:
        """What was found about each result with evidence, to be kept beside the results."""
        return {
            report.result.content.sha256: Checked(report.status, store.file_sha256(report.path))
            for report in self.cells
            if report.result is not None and report.proved and report.path.name.endswith(evidence.SUFFIX)
        }

    @property
    def record(self) -> dict[str, Any]:
        """The whole report as plain values."""
        drawn = self.drawn and {
            **{"seed": self.drawn.seed, "survivors": self.drawn.survivors, "drawn": self.drawn.count},
            "refused": self.refused(),
            "detection": {f"{share:g}": chance for share, chance in self.drawn.detection().items()},
        }
        return {
            "passed": not self.faults(),
            "faults": self.faults(),
            "lacking": self.lacking(),
            "cells": [_record(report) for report in self.cells],
            "tables": [
                dataclasses.asdict(table) | {"path": str(table.path), "passed": not table.faults}
                for table in self.tables
            ],
            "reattack": drawn,
            "unknown": list(UNKNOWN),
        }


def verify(
    target: Target, verifier: Verifier, share: float | None, seed: int, on_image: Report
) -> Verification:
    """Check every result and every table of a target.

    Args:
        target: what.
        verifier: with what.
        share: of the survivors that are attacked again; None for none of them.
        seed: by which these are drawn.
        on_image: called as results and images are finished.

    Raises:
        InputError: a model, dataset, suite or chain is not at hand.
    """
    reports: list[CellReport] = []
    for i, path in enumerate(target.bundles):
        on_image("verify", i, len(target.bundles))
        reports.append(verifier.verify(path))
    reports = [*_without_copies(reports), *map(_bare, target.bare)]
    results = {report.result.content.sha256: report.result for report in reports if report.result is not None}
    tables = tuple(row_check.check(path, results.values()) for path in target.tables)
    drawn = None
    if share is not None:
        drawn = reattack.draw(reports, share, seed)
        for i, keys in drawn.keys.items():
            broken = reattack.attack(reports[i], keys, on_image)
            fault = f"{len(broken)} of {len(keys)} attacked again are broken: {broken[0]}" if broken else ""
            claims = (*reports[i].claims, Claim("survivors", fault))
            reports[i] = dataclasses.replace(reports[i], claims=claims, reattacked=len(keys))
    files = submission.faults(target.submitted) if target.submitted else []
    return Verification(tuple(reports), tables, drawn, target.submitted is not None, tuple(files))


def _bare(path: Path) -> CellReport:
    """The report of a result without a bundle: its files are read as for a leaderboard, and that is all."""
    try:
        result = result_file.read_one(path)
        return CellReport(path, (), result, result.verdicts() if result.outcome else None)
    except InputError as error:
        return CellReport(path, (Claim("result", str(error)),))


def _without_copies(reports: Sequence[CellReport]) -> list[CellReport]:
    """The reports, in which a result that stands twice is a fault of its second copy."""
    first: dict[str, Path] = {}
    found = []
    for report in reports:
        sha256 = "" if report.result is None else report.result.content.sha256
        other = first.setdefault(sha256, report.path) if sha256 else report.path
        copied = f"the same result as {other}" if other != report.path else ""
        claims = (*report.claims, Claim("only copy", copied)) if sha256 else report.claims
        found.append(dataclasses.replace(report, claims=claims))
    return found


def _name(report: CellReport) -> str:
    """Model, dataset and threat of a result; its file if it cannot be read."""
    if report.result is None:
        return str(report.path)
    return f"{report.result.model[0]} on {report.result.dataset}, {report.result.threat}"


def _record(report: CellReport) -> dict[str, Any]:
    result, table = report.result, report.table
    facts = {} if result is None else {"model": result.model[0], "dataset": result.dataset}
    if result is not None:
        facts |= {"attack": result.contest.attack, "threat": str(result.threat)}
        facts["cell_sha256"] = result.content.sha256
    return {
        "path": str(report.path),
        **facts,
        "status": report.status,
        "images": 0 if table is None else len(table),
        "broken": 0 if table is None else int((table.broken_by != "").sum()),
        "survivors": len(report.survivors),
        "reattacked": report.reattacked,
        "near": report.near,
        "packed": {kind: list(sizes) for kind, sizes in report.kinds.items()},
        "claims": [dataclasses.asdict(claim) for claim in report.claims],
    }
