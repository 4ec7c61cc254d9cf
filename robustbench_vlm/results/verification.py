"""What `vlmrob verify --record` found, kept in the folder of the results; the page shows it for each row.

It is the word of whoever has that folder. It is no part of a result, so a CSV does not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from robustbench_vlm import store
from robustbench_vlm.errors import DataError
from robustbench_vlm.results import evidence
from robustbench_vlm.results.result_file import Result

FILE = "verification.json"
SCHEMA = "vlmrob-verification/1"
DO = "delete it, or run vlmrob verify --record again"

VERDICTS, BUNDLE = "verdicts", "bundle"
"""Levels of a result that nobody has verified: without a bundle of evidence, and with one."""

FOUND = ("verified", "re-attacked", "failed")
"""Levels of a result that was verified."""


@dataclass(frozen=True)
class Checked:
    """What was found about one bundle.

    Attributes:
        level: one of `FOUND`.
        bundle_sha256: of the bundle's file; a bundle that changed since then was not verified.
    """

    level: str
    bundle_sha256: str


def write(results: Path, checked: Mapping[str, Checked]) -> Path:
    """Keep what was found about results, by their fingerprints; an earlier record is replaced.

    Args:
        results: the folder of the results.
        checked: by `cell_sha256`.

    Returns:
        The file.
    """
    cells = {sha256: [one.level, one.bundle_sha256] for sha256, one in sorted(checked.items())}
    store.write_json(results / FILE, {"schema": SCHEMA, "cells": cells})
    return results / FILE


def read(results: Path) -> dict[str, Checked]:
    """What was found about results, by their fingerprints; nothing where nobody kept it.

    Raises:
        DataError: the file is no such record.
    """
    path = results / FILE
    if not path.is_file():
        return {}
    found = store.read_json(path)
    cells = found.get("cells") if isinstance(found, dict) and found.get("schema") == SCHEMA else None
    if not isinstance(cells, dict):
        raise DataError(str(path), "not the record of a verification", SCHEMA, DO)
    for sha256, entry in cells.items():
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] in FOUND):
            where = f"{path}, {sha256[:12]}"
            raise DataError(where, f"{entry!r:.60}", f"[one of {', '.join(FOUND)}; the bundle's hash]", DO)
    return {sha256: Checked(*entry) for sha256, entry in cells.items()}


def levels(results: Path, found: Sequence[Result]) -> dict[str, str]:
    """By fingerprint of a result: how well it is supported, one of `VERDICTS`, `BUNDLE` and `FOUND`.

    Args:
        results: the folder of the results.
        found: results in it.

    Raises:
        DataError: the record of the verification cannot be read.
    """
    checked = read(results)
    return {result.content.sha256: _level(result, checked.get(result.content.sha256)) for result in found}


def _level(result: Result, checked: Checked | None) -> str:
    bundle = evidence.path_of(result.path)
    if not bundle.is_file():
        return VERDICTS
    same = checked is not None and checked.bundle_sha256 == store.file_sha256(bundle)
    return checked.level if checked is not None and same else BUNDLE
