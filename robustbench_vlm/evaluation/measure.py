"""Measure cells: a clean pass, then every stage of the chain, then one Parquet and one JSON file each."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from robustbench_vlm import store
from robustbench_vlm.engine import attack_watch, canonical, losses, model_checks
from robustbench_vlm.engine.check_record import Check, Examined
from robustbench_vlm.engine.job import Cost, ImageBlock, total
from robustbench_vlm.errors import InputError
from robustbench_vlm.evaluation import bundling, provenance
from robustbench_vlm.evaluation.cells import Cell, EvalSettings, Subject
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.evaluation.model_work import (
    AttackSetup,
    CellModel,
    ModelWork,
    Works,
    first_images,
    in_process,
)
from robustbench_vlm.evaluation.outcome import tally
from robustbench_vlm.evaluation.stages import CellRun, Remark, Report
from robustbench_vlm.results import evidence, result_file, verdicts
from robustbench_vlm.results.page import checks as page_checks
from robustbench_vlm.results.result_file import Content

SPOOLED = 32 * 2**20  # bytes of clean logits up to which they stay in memory


def evaluate(
    subject: Subject,
    settings: EvalSettings,
    report: Report,
    remark: Remark = lambda _: None,
    works: Works = in_process,
) -> Iterator[Path]:
    """Measure every cell of one model on one dataset; yields the JSON file of each cell once it is finished.

    A finished cell whose files are damaged is made again; findings that its ledgers have are not run again.

    Args:
        subject: model and images.
        settings: chains, radii and folder of the results.
        report: called as images finish.
        remark: called with a line of log.
        works: does what needs the model.

    Raises:
        AttackError: an attack left the ball or the box.
    """
    for chain in settings.chains:
        examined: Examined | None = None  # once for all radii of a chain
        smaller: Cell | None = None
        for rung in range(len(settings.ladder)):
            cell = Cell(subject, chain, settings, settings.ladder[: rung + 1])
            fault = _fault(cell) if cell.finished else ""
            if fault:
                remark(f"note: {fault}; this result is made again")
            if fault or not cell.finished:
                started = time.perf_counter()
                cell.path.parent.mkdir(parents=True, exist_ok=True)  # a refused name must not cost an attack
                with works(cell) as work, tempfile.SpooledTemporaryFile(SPOOLED) as file:
                    examined = examined or work.examine(_examination(cell))
                    lost = None if smaller is None else result_file.read_one(smaller.path).verdicts()
                    run = _begin(cell, work, lost, canonical.Record(file), remark)
                    _measure(run, smaller, report, examined, started)
            smaller = cell
            yield cell.path


def tables(
    subject: Subject,
    chain: Chain,
    settings: EvalSettings,
    report: Report,
    remark: Remark = lambda _: None,
    works: Works = in_process,
) -> list[pd.DataFrame]:
    """The verdicts under one chain at every radius of the ladder, without a result file.

    What is found is recorded in the ledgers, with the checks that fail; what they have is not run again.

    Raises:
        AttackError: an attack left the ball or the box.
    """
    found: list[pd.DataFrame] = []
    for rung in range(len(settings.ladder)):
        cell = Cell(subject, chain, settings, settings.ladder[: rung + 1])
        with works(cell) as work, tempfile.SpooledTemporaryFile(SPOOLED) as file:
            run = _begin(cell, work, found[-1] if found else None, canonical.Record(file), remark)
            _attack(run, report)
        found.append(run.table)
    return found


def _attack(run: CellRun, report: Report) -> list[Cost]:
    """Run every stage of the chain, and keep the checks that fail; returns the model calls of each part.

    An interrupt waits for these checks, unless workers would first have to end what they attack: a run that
    goes on later does not see what this one saw.
    """
    number, costs = 0, []
    try:
        for group in run.cell.settings.backend.groups(run.cell.chain.stages):
            costs.append(run.attack(number, group, report))
            number += len(group)
    except KeyboardInterrupt:
        if run.work.here:
            run.keep_failures()
        raise
    return [*costs, run.keep_failures()]


def _stated_failures(path: Path) -> list[Check]:
    """What attacks brought to light by a result that is made again; of earlier versions, it alone says so."""
    try:
        stated = page_checks.of_result(result_file.read_one(path))
    except InputError:
        return []
    failed = (check for check in stated if check.level == "fail" and check.name in attack_watch.CHECKS)
    return [Check(**check.model_dump()) for check in failed]


def examine(subject: Subject, chain: Chain, settings: EvalSettings) -> Examined:
    """Check on some images of the subset what the chain takes for granted about the model."""
    cell = Cell(subject, chain, settings, settings.ladder[:1])
    model = CellModel(subject.loaded, AttackSetup.of(cell), first_images(cell), settings.device)
    return model.examine(_examination(cell))


def _examination(cell: Cell) -> ImageBlock:
    """The images on which a model is examined."""
    subject, keys = cell.subject, cell.subject.split.keys
    positions = model_checks.chosen(keys, cell.settings.seed)
    images, labels = subject.images.floats(positions), subject.labels[positions]
    return ImageBlock(images, labels, [keys[i] for i in positions])


def _fault(cell: Cell) -> str:
    """Why the files of a finished cell are not what this cell's outcome is read from; empty if they are."""
    subject, path = cell.subject, cell.path
    try:
        result = result_file.read_one(path)
        table = result.verdicts()
        saved: dict[str, Tensor] | None = None
        if cell.settings.save_images:
            saved = load_file(path.with_suffix(".safetensors"))
        bundle = None if cell.settings.suite is None else evidence.read(evidence.path_of(path))
    except (InputError, SafetensorError, OSError) as error:
        return str(error) if isinstance(error, InputError) else f"{path.with_suffix('.safetensors')}: {error}"
    if store.fingerprint(result.config) != store.fingerprint(cell.config):
        return f"{path}: its configuration is not the one that its name is the hash of"
    images = (table.key.tolist(), table.label.tolist(), table.image_sha256.tolist())
    if images != (list(subject.split.keys), subject.split.labels.tolist(), list(subject.image_shas)):
        return f"{path.with_suffix('.parquet')}: verdicts of other images"
    broken = table[table.broken_by != ""]
    proved = None if bundle is None else (bundle.result.get("sha256"), {*bundle.images})
    if proved not in (None, (result.content.sha256, {*broken.key})):
        return f"{evidence.path_of(path)}: evidence of another result"
    for key, sha256 in zip(broken.key, broken.adv_sha256, strict=True):
        if saved is not None and (key not in saved or verdicts.image_sha256(saved[key]) != sha256):
            return f"{path.with_suffix('.safetensors')}: the image {key} is missing or another one"
    return ""


def _measure(run: CellRun, smaller: Cell | None, report: Report, examined: Examined, started: float) -> None:
    """Measure one cell.

    The JSON file is written last, so a cell that has one is complete.

    Args:
        run: of the cell, before any attack.
        smaller: the cell of the next smaller radius. Images broken there count as broken here too, with the
            same adversarial image as evidence.
        report: called as images finish.
        examined: checks of the model before any attack.
        started: when the work on the cell began.
    """
    cell = run.cell
    subject, settings, path = cell.subject, cell.settings, cell.path
    costs = _attack(run, report)
    examined = examined.joined([*_stated_failures(path), *run.attack_checks()])
    table = run.table.to_parquet(index=False)
    store.write(path.with_suffix(".parquet"), table)
    images = run.broken_images() if settings.keeps_image(broken=True) else {}
    if settings.save_images:
        inherited = {} if smaller is None else load_file(smaller.path.with_suffix(".safetensors"))
        store.write(path.with_suffix(".safetensors"), save(inherited | images))
    # names of failed checks are hashed, as flags; the numbers behind them differ in rounding between devices
    outcome, facts = tally(cell, run.table, examined.failed), provenance.of_model(subject.loaded)
    content = Content(cell.config, outcome, facts, cell.chain.stage_records)
    seconds = time.perf_counter() - started
    made = provenance.of_run(settings.device, seconds, settings.batch_size)
    made |= run.work.facts
    beside = {"checks": examined.record, "run": made | {"calls": asdict(total(costs))}}
    if settings.suite is not None:
        bundle = bundling.bundle(cell, smaller, content, table, images)
        store.write(evidence.path_of(path), evidence.encoded(bundle))
        beside["evidence"] = {"root": bundle.root, "images": bundle.kinds()}
    result_file.write(path, content, beside)


def _begin(
    cell: Cell, work: ModelWork, smaller: pd.DataFrame | None, clean: canonical.Record, remark: Remark
) -> CellRun:
    """The verdicts of a cell before any attack.

    Args:
        cell: to be measured.
        work: does what needs the model.
        smaller: the verdicts at the next smaller radius.
        clean: gets the clean logits.
        remark: see `CellRun`.
    """
    subject = cell.subject
    predictions, margins = _clean_pass(cell, work, clean)
    lost = None if smaller is None else smaller[smaller.broken_at_eps != ""]
    split = subject.split
    table = verdicts.begin(split.keys, split.labels, subject.image_shas, predictions, margins, lost)
    return CellRun(cell, work, clean, table, remark)


def _clean_pass(cell: Cell, work: ModelWork, record: canonical.Record) -> tuple[np.ndarray, np.ndarray]:
    """The canonical pass on the clean images; logits go to the record.

    Returns:
        (N,) int64 predictions and (N,) float32 margins.
    """
    subject, rows = cell.subject, cell.chain.rows
    predictions, margins = [], []
    parts = list(subject.images.parts(range(len(subject.images)), rows))
    for part, logits in zip(parts, work.logits(parts), strict=True):
        record.add(logits)
        labels, tied = subject.labels[part], subject.tied
        found = logits.argmax(1) if tied is None else tied.predictions(logits)
        margin = (losses if tied is None else tied).correct_margin(logits, labels)
        predictions.append(found.numpy())
        margins.append(margin.numpy())
    return np.concatenate(predictions), np.concatenate(margins)
