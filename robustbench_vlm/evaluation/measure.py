"""Measure cells: a clean pass, then every stage of the chain, then one Parquet and one JSON file each."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from robustbench_vlm import store
from robustbench_vlm.engine import attacked_view, canonical, losses, model_checks
from robustbench_vlm.engine.attack_watch import AttackWatch
from robustbench_vlm.engine.isolation import isolated, restored_buffers
from robustbench_vlm.engine.job import Cost, Model, total
from robustbench_vlm.engine.tied_classes import DistinctClasses
from robustbench_vlm.errors import InputError
from robustbench_vlm.evaluation import bundling, provenance
from robustbench_vlm.evaluation.cells import Cell, EvalSettings, Subject
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.evaluation.outcome import tally
from robustbench_vlm.evaluation.stages import CellRun, Remark, Report
from robustbench_vlm.models.clip import Classifier
from robustbench_vlm.results import evidence, result_file, verdicts
from robustbench_vlm.results.result_file import Content

SPOOLED = 32 * 2**20  # bytes of clean logits up to which they stay in memory

Examine = Callable[[], model_checks.Examined]
Begin = Callable[[Cell, pd.DataFrame | None], CellRun]


def evaluate(
    subject: Subject, settings: EvalSettings, report: Report, remark: Remark = lambda _: None
) -> Iterator[Path]:
    """Measure every cell of one model on one dataset; yields the JSON file of each cell once it is finished.

    A finished cell whose files are damaged is made again; findings that its ledgers have are not run again.

    Raises:
        AttackError: an attack left the ball or the box.
    """
    for chain in settings.chains:
        examined: Examine = cache(partial(examine, subject, chain, settings))
        smaller: Cell | None = None
        for rung in range(len(settings.ladder)):
            cell = Cell(subject, chain, settings, settings.ladder[: rung + 1])
            fault = _fault(cell) if cell.finished else ""
            if fault:
                remark(f"note: {fault}; this result is made again")
            if fault or not cell.finished:
                tf32 = settings.backend.precision.tf32
                kept = restored_buffers(subject.loaded.model)  # what calls change is no part of later cells
                with isolated(tf32=tf32), kept, tempfile.SpooledTemporaryFile(SPOOLED) as file:
                    clean = canonical.Record(file)
                    _measure(cell, smaller, report, examined, partial(_begin, clean=clean, remark=remark))
            smaller = cell
            yield cell.path


def tables(
    subject: Subject, chain: Chain, settings: EvalSettings, report: Report, remark: Remark = lambda _: None
) -> list[pd.DataFrame]:
    """The verdicts under one chain at every radius of the ladder, without checks and without a result file.

    What is found is recorded in the ledgers, and what they have is not run again.

    Raises:
        AttackError: an attack left the ball or the box.
    """
    found: list[pd.DataFrame] = []
    for rung in range(len(settings.ladder)):
        cell = Cell(subject, chain, settings, settings.ladder[: rung + 1])
        tf32, kept = settings.backend.precision.tf32, restored_buffers(subject.loaded.model)
        with isolated(tf32=tf32), kept, tempfile.SpooledTemporaryFile(SPOOLED) as file:
            run = _begin(cell, found[-1] if found else None, canonical.Record(file), remark)
            _attack(run, report)
        found.append(run.table)
    return found


def _attack(run: CellRun, report: Report) -> list[Cost]:
    """Run every stage of the chain; returns the model calls of each group of stages."""
    number, costs = 0, []
    for group in run.cell.settings.backend.groups(run.cell.chain.stages):
        costs.append(run.attack(number, group, report))
        number += len(group)
    return costs


def examine(subject: Subject, chain: Chain, settings: EvalSettings) -> model_checks.Examined:
    """Check on some images of the subset what the chain takes for granted about the model."""
    device, keys = settings.device, subject.split.keys
    positions = model_checks.chosen(keys, chain.rows, settings.seed)
    classifier, labels = subject.classifier(device), subject.labels[positions].to(device)
    tied = subject.tied
    return model_checks.examine(
        classifier if tied is None else DistinctClasses(classifier, tied),
        subject.images.floats(positions).to(device),
        labels if tied is None else tied.labels(labels),
        [keys[i] for i in positions],
        rows=chain.rows,
        seed=settings.seed,
        **chain.needs(subject.n_distinct),
    )


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


def _measure(cell: Cell, smaller: Cell | None, report: Report, examine: Examine, begin: Begin) -> None:
    """Measure one cell.

    The JSON file is written last, so a cell that has one is complete.

    Args:
        cell: to be measured.
        smaller: the cell of the next smaller radius. Images broken there count as broken here too, with the
            same adversarial image as evidence.
        report: called as images finish.
        examine: checks the model; called once for all radii of a chain.
        begin: makes the verdicts before any attack.
    """
    started = time.perf_counter()
    subject, settings, path = cell.subject, cell.settings, cell.path
    path.parent.mkdir(parents=True, exist_ok=True)  # a name that the disk refuses must not cost an attack
    examined = examine()
    run = begin(cell, None if smaller is None else result_file.read_one(smaller.path).verdicts())
    costs = _attack(run, report)
    later, cost = run.attack_checks()
    examined, costs = examined.joined(later), [*costs, cost]
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
    made = provenance.of_run(settings.device, seconds, settings.active_rows)
    beside = {"checks": examined.record, "run": made | {"calls": asdict(total(costs))}}
    if settings.suite is not None:
        bundle = bundling.bundle(cell, smaller, content, table, images)
        store.write(evidence.path_of(path), evidence.encoded(bundle))
        beside["evidence"] = {"root": bundle.root, "images": bundle.kinds()}
    result_file.write(path, content, beside)


def _begin(cell: Cell, smaller: pd.DataFrame | None, clean: canonical.Record, remark: Remark) -> CellRun:
    """The model on its device, and the verdicts before any attack.

    Args:
        cell: to be measured.
        smaller: the verdicts at the next smaller radius.
        clean: gets the clean logits.
        remark: see `CellRun`.
    """
    subject, settings, rows = cell.subject, cell.settings, cell.chain.rows
    classifier = subject.classifier(settings.device)
    predictions, margins = _clean_pass(cell, classifier, clean)
    lost = None if smaller is None else smaller[smaller.broken_at_eps != ""]
    split = subject.split
    table = verdicts.begin(split.keys, split.labels, subject.image_shas, predictions, margins, lost)
    first = subject.images.floats(range(len(table))[:rows]).to(settings.device)
    view = attacked_view.build(
        classifier,
        settings.backend.precision,
        canonical.padded(first, rows),
        subject.classifier(settings.device, bf16=True),
    )
    return CellRun(cell, AttackWatch(Model(classifier, view), rows), clean, table, remark)


def _clean_pass(
    cell: Cell, classifier: Classifier, record: canonical.Record
) -> tuple[np.ndarray, np.ndarray]:
    """The canonical pass on the clean images; logits go to the record.

    Returns:
        (N,) int64 predictions and (N,) float32 margins.
    """
    subject, device, rows = cell.subject, cell.settings.device, cell.chain.rows
    predictions, margins = [], []
    for part in subject.images.parts(range(len(subject.images)), rows):
        logits = canonical.logits(classifier, subject.images.floats(part).to(device), rows)
        record.add(logits)
        labels, tied = subject.labels[part].to(device), subject.tied
        found = logits.argmax(1) if tied is None else tied.predictions(logits)
        margin = (losses if tied is None else tied).correct_margin(logits, labels)
        predictions.append(found.cpu().numpy())
        margins.append(margin.cpu().numpy())
    return np.concatenate(predictions), np.concatenate(margins)
