"""Submissions: a folder with results and their evidence, rows, model cards and provenance, to be reviewed.

`submission.json` has licence, contact, commands, versions and the hash of every file; `MODEL-<name>.md` is
the card of a model; `<suite>.csv` has the rows of the leaderboard, which follow from the results; `cells/`
has the results with their bundles, laid out as in a folder of results.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustbench_vlm import safe_text, store
from robustbench_vlm.cards import reader
from robustbench_vlm.errors import DataError, InputError
from robustbench_vlm.results import evidence, leaderboard, result_file, verification
from robustbench_vlm.results.page import command
from robustbench_vlm.results.result_file import Result

FILE = "submission.json"
SCHEMA = "vlmrob-submission/1"


@dataclass(frozen=True)
class Answers:
    """What only the submitter knows.

    Attributes:
        licence: of the weights, as an SPDX identifier or a sentence.
        source: where the weights can be had: an address, a name of a hub, or `not public`.
        contact: a name or an address for questions; empty for none.
    """

    licence: str
    source: str
    contact: str = ""


def write(results: Sequence[Path], out: Path, answers: Answers) -> list[Path]:
    """Make the folder of a submission; returns its files.

    Args:
        results: folders of `vlmrob eval --save-evidence`.
        out: the folder to make.
        answers: licence and source of the weights.

    Raises:
        DataError: no results, a result without a bundle, or with a damaged one.
        InputError: the folder exists already.
    """
    if out.exists():
        raise InputError(f"--out {out}", "it exists already", "a new folder", "remove it or name another one")
    found = [(root, result) for root in results for result in result_file.read(root)]
    if not found:
        where = ", ".join(map(str, results))
        do = "run vlmrob eval --save-evidence first"
        raise DataError(where, f"no results below {result_file.FOLDER}/", "at least one", do)
    by_suite: dict[str, list[Result]] = {}
    for _, result in found:
        by_suite.setdefault(_suite_of(result), []).append(result)
    contents = _copies(found)
    for suite, members in by_suite.items():
        card = reader.suite(suite)
        table = leaderboard.csv(leaderboard.table(result_file.of_suite(members, card), card))
        contents[Path(f"{store.file_name(suite)}.csv")] = table
    for name, card_text in _cards([result for _, result in found], answers).items():
        contents[Path(name)] = card_text.encode()
    for path, content in contents.items():
        if isinstance(content, Path):
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(content, out / path)
        else:
            store.write(out / path, content)
    record = _record([result for _, result in found], sorted(by_suite), answers)
    files = {path.as_posix(): store.file_sha256(out / path) for path in sorted(contents)}
    store.write_json(out / FILE, record | {"files": files})  # last: a folder that has it is whole
    return [out / FILE, *(out / path for path in sorted(contents))]


def faults(folder: Path) -> list[str]:
    """What in the folder of a submission is not as it was submitted; one sentence a file.

    Raises:
        InputError: its record cannot be read.
    """
    path = folder / FILE
    record = store.read_json(path)
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict) or record.get("schema") != SCHEMA:
        raise InputError(str(path), "not the record of a submission", SCHEMA, "make it with vlmrob submit")
    found = [] if str(record.get("licence", "")).strip() else [f"{path}: the licence is not answered"]
    there = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} - {FILE}
    if verification.FILE in there:
        found.append(f"{folder / verification.FILE}: a submission does not bring its own verification")
    found += [f"{folder / name}: missing" for name in sorted({*files} - there)]
    found += [f"{folder / name}: not listed in {FILE}" for name in sorted(there - {*files})]
    for name in sorted(there & {*files}):
        if store.file_sha256(folder / name) != files[name]:
            found.append(f"{folder / name}: other bytes than its hash in {FILE} says")
    return found


def _suite_of(result: Result) -> str:
    """The suite in the bundle of a result, which must be the bundle of this very result."""
    path = evidence.path_of(result.path)
    if not path.is_file():
        do = "run the same eval again with --save-evidence, or move the result elsewhere"
        raise DataError(str(result.path), "no bundle of evidence beside it", path.name, do)
    bundle = evidence.read(path)
    _ = result.outcome
    if bundle.result.get("sha256") != result.content.sha256:
        raise DataError(str(path), "the bundle of another result", result.path.name, evidence.DO)
    return str(bundle.suite.get("name", ""))


def _copies(found: Sequence[tuple[Path, Result]]) -> dict[Path, Path | bytes]:
    """Where each file of the results goes in the submission, and where it is."""
    copies: dict[Path, Path | bytes] = {}
    for root, result in found:
        for path in (result.path, result.path.with_suffix(".parquet"), evidence.path_of(result.path)):
            copies[path.relative_to(root)] = path
    return copies


def _record(results: Sequence[Result], suites: Sequence[str], answers: Answers) -> dict[str, Any]:
    runs = [store.read_json(result.path).get("run") or {} for result in results]
    names = ("vlmrob", "torch", "device")
    versions = {name: sorted({str(run.get(name, "")) for run in runs}) for name in names}
    return {
        "schema": SCHEMA,
        "licence": answers.licence,
        "source": answers.source,
        "contact": answers.contact,
        "suites": list(suites),
        "models": sorted({result.model[0] for result in results}),
        "commands": sorted({_command(result) for result in results}),
        "versions": versions,
    }


def _command(result: Result) -> str:
    """The command that makes a result again, with all datasets of its suite."""
    before, after = command.parts(result.contest, _suite_of(result))
    return f"{before} {command.quoted([result.model[0]])} {after} --save-evidence"


def _cards(results: Sequence[Result], answers: Answers) -> dict[str, str]:
    """By file name, the card of each model as Markdown."""
    cards: dict[str, str] = {}
    for result in results:
        name, sha256 = result.model
        facts: Mapping[str, Any] = result.content.model
        trained = facts.get("trained_on")
        lines = {
            "fingerprint": sha256,
            "architecture": facts["arch"],
            "parameters of the image tower": facts["parameters"],
            "defense": facts["defense"],
            "radius in training": f"{facts['train_norm']} {facts['train_eps']}".strip() or "none",
            "trained on": "not known" if trained is None else ", ".join(map(str, trained)) or "nothing",
            "licence of the weights": answers.licence,
            "weights": answers.source,
            "contact": answers.contact or "none",
        }
        body = [f"- {key}: {safe_text.markdown(str(value))}" for key, value in lines.items()]
        text = [f"# {safe_text.markdown(name)}", "", *body, ""]
        cards[f"MODEL-{store.file_name(name)}-{sha256[:8]}.md"] = "\n".join(text)
    return cards
