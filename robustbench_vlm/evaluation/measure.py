"""Attack models over datasets: verdicts per image in ledgers, summed into one JSON and Parquet a cell."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from robustbench_vlm import store
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.engine import attacked_view, canonical, losses, model_checks
from robustbench_vlm.engine.job import Cost, ImageBlock, Job, Model, Stages, total
from robustbench_vlm.evaluation import provenance
from robustbench_vlm.evaluation.cells import Cell, Request, Subject
from robustbench_vlm.evaluation.chain import needs, plugin
from robustbench_vlm.evaluation.outcome import tally
from robustbench_vlm.models.clip import Classifier
from robustbench_vlm.results import result_file, verdicts
from robustbench_vlm.results.result_file import Content
from robustbench_vlm.threat import eps_text
from robustbench_vlm.types import Finding

SPOOLED = 32 * 2**20  # bytes of clean logits up to which they stay in memory

Line = dict[str, Any]
Report = Callable[[str, int, int], None]
"""Called with (what, done, total) as images finish."""

Examine = Callable[[], model_checks.Examined]


def evaluate(what: Subject, request: Request, report: Report) -> Iterator[Path]:
    """Evaluate every cell of one model on one dataset; yields each cell's JSON file as it is finished.

    Raises:
        AttackError: an attack left the ball or the box.
    """
    for card in request.attacks:
        examine: Examine = cache(partial(_examine, what, card, request))
        smaller: Cell | None = None
        for rung in range(len(request.ladder)):
            cell = Cell(what, card, request, request.ladder[: rung + 1])
            if not cell.finished:
                _fill(cell, smaller, report, examine)
            smaller = cell
            yield cell.path


def _examine(what: Subject, card: AttackCard, request: Request) -> model_checks.Examined:
    """What the chain takes for granted about the model, on images of this subset."""
    device, keys = request.device, what.split.keys
    looked_at = model_checks.chosen(keys, card.rows, request.seed)
    return model_checks.examine(
        Classifier(what.loaded.model, what.bank).to(device),
        what.images.floats(looked_at).to(device),
        what.labels[looked_at].to(device),
        [keys[i] for i in looked_at],
        rows=card.rows,
        seed=request.seed,
        **needs(card, what.card.n_classes),
    )


def _fill(cell: Cell, smaller: Cell | None, report: Report, examine: Examine) -> None:
    """Clean pass, every stage over the survivors, then Parquet and JSON (last: a cell with JSON is whole).

    What the cell of the next smaller radius broke is lost here too, with the same image as evidence.
    """
    with attacked_view.numerics(tf32=cell.request.sight.tf32), tempfile.SpooledTemporaryFile(SPOOLED) as file:
        _measure(cell, smaller, report, examine, canonical.Record(file))


def _measure(
    cell: Cell, smaller: Cell | None, report: Report, examine: Examine, clean: canonical.Record
) -> None:
    started = time.perf_counter()
    examined = examine()
    what, request, rows = cell.what, cell.request, cell.attack.rows
    classify = Classifier(what.loaded.model, what.bank).to(request.device)
    predictions, margins = _clean(what, classify, rows, clean, request.device)
    lost = None if smaller is None else pd.read_parquet(smaller.path.with_suffix(".parquet"))
    lost = None if lost is None else lost[lost.broken_at_eps != ""]
    table = verdicts.begin(what.split.keys, what.split.labels, what.image_shas, predictions, margins, lost)
    lower = Classifier(what.loaded.model, what.bank, bf16=True).to(request.device)
    sample = canonical.padded(what.images.floats(range(len(table))[:rows]).to(request.device), rows)
    model = Model(classify, attacked_view.build(classify, request.sight, sample, lower))
    arena = _Arena(cell, model, clean, table)
    stages = [(stage.name, plugin(cell.attack, stage)) for stage in cell.attack.stage]
    number, costs = 0, []
    for group in request.by.groups(stages):
        costs.append(arena.attack(number, group, report))
        number += len(group)
    store.write(cell.path.with_suffix(".parquet"), table.to_parquet(index=False))
    if request.keep_images:
        kept = {} if smaller is None else load_file(smaller.path.with_suffix(".safetensors"))
        store.write(cell.path.with_suffix(".safetensors"), save(kept | arena.broken_images()))
    outcome = tally(cell, table, examined.failed)
    stages_as_run = [stage.model_dump(mode="json") for stage in cell.attack.stage]
    content = Content(cell.config, outcome, provenance.of_model(what.loaded), stages_as_run)
    spent = asdict(total(costs))  # by this run; what ledgers held was paid for by an earlier one
    run = provenance.of_run(request.device, time.perf_counter() - started, request.live) | {"calls": spent}
    # what failed is hashed, in `flags`; the numbers behind it may differ in rounding from device to device
    result_file.write(cell.path, content, {"checks": examined.record, "run": run})


def _clean(
    what: Subject, classify: Classifier, rows: int, record: canonical.Record, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """The canonical clean pass: (N,) int64 predictions and (N,) float32 margins; logits go to the record."""
    predictions, margins = [], []
    for part in what.images.parts(range(len(what.images)), rows):
        found = canonical.logits(classify, what.images.floats(part).to(device), rows)
        record.add(found)
        predictions.append(found.argmax(1).cpu().numpy())
        margins.append(losses.correct_margin(found, what.labels[part].to(device)).cpu().numpy())
    return np.concatenate(predictions), np.concatenate(margins)


@dataclass(frozen=True)
class _Arena:
    """A cell with its model on the device, and the table of its verdicts, which attacks fill."""

    cell: Cell
    model: Model
    clean: canonical.Record  # of the canonical clean pass
    table: pd.DataFrame

    @property
    def eps(self) -> str:
        """The radius, as the table has it."""
        return eps_text(self.cell.request.norm, self.cell.threat.eps)

    @cached_property
    def places(self) -> dict[str, int]:
        """The position of each image, by its key."""
        return {key: i for i, key in enumerate(self.cell.what.split.keys)}

    def attack(self, number: int, stages: Stages, report: Report) -> Cost:
        """Run stages that share rows on the images that stand, and enter what they find; what it took now.

        Args:
            number: position of the first of these stages in the chain.
            stages: name and attack of each.
            report: told as images finish.

        Only what the ledgers lack is run.
        """
        cell, request, what = self.cell, self.cell.request, self.cell.what
        names = [name for name, _ in stages]
        ledgers = {name: cell.ledger(number + i) for i, name in enumerate(names)}
        alive = [int(i) for i in self.table.index[verdicts.standing(self.table)]]
        begin = self.resumed(ledgers, alive)
        name = f"{what.loaded.card.name} · {what.card.name} · {' + '.join(names)} · {cell.threat}"
        done = len(alive) - len(begin)
        report(name, done, len(alive))
        if not begin:
            return Cost()
        for ledger in ledgers.values():
            store.mend(ledger)

        pixels: dict[str, Tensor] = {}  # of the images under attack, on the CPU

        def take(finding: Finding) -> None:
            nonlocal done
            i = self.places[finding.key]
            over = finding.broken or bool(finding.error) or finding.stage == names[-1]
            image = pixels.pop(finding.key) if over else pixels[finding.key]
            if i not in begin:
                return
            line = verdicts.line(finding, image, what.image_shas[i], int(what.split.labels[i]), cell.threat)
            ledger = ledgers[finding.stage]
            if request.keep_images:
                store.write(_image_path(ledger, line), save({"adv": finding.adv.contiguous()}))
            store.append(ledger, line)
            verdicts.enter(self.table, i, line, finding.stage, self.eps)
            done += over
            report(name, done, len(alive))

        # where noise is drawn in batches, a batch is run again whole: then a line that is there is met again
        members = request.by.batches(alive, begin, cell.attack.rows)
        parts = what.images.parts(members, cell.attack.rows)
        job = Job(
            stages=stages,
            threat=cell.threat,
            rows=cell.attack.rows,
            n_classes=what.card.n_classes,
            active_rows=None if request.live is None else min(request.live, cell.attack.rows),
            stop=cell.attack.stop,
            seed=request.seed,
        )
        blocks = (self.block(part, begin, pixels) for part in parts)
        return request.by.run(self.model, job, blocks, take)

    def block(
        self, members: Sequence[int], begin: Mapping[int, int], pixels: dict[str, Tensor]
    ) -> ImageBlock:
        """Images that are read together; their pixels on the CPU are put into `pixels` as well, by key.

        Args:
            members: positions of the images.
            begin: the stage in which an image begins, by its position; of others the first.
            pixels: to be filled.
        """
        device, what = self.cell.request.device, self.cell.what
        images = what.images.floats(members)
        keys = [what.split.keys[i] for i in members]
        pixels.update((key, image.clone()) for key, image in zip(keys, images, strict=True))
        logits, labels = self.clean.rows(members).to(device), what.labels[members].to(device)
        return ImageBlock(images.to(device), labels, keys, logits, [begin.get(i, 0) for i in members])

    def resumed(self, ledgers: Mapping[str, Path], alive: Sequence[int]) -> dict[int, int]:
        """Enter what the ledgers say about the images at `alive`; where the others go on.

        Returns:
            The stage in which each unfinished image begins, by its position.
        """
        begin = dict.fromkeys(alive, 0)
        for stage, (name, ledger) in enumerate(ledgers.items()):
            for i, line in self.known(ledger):
                if begin.get(i) != stage:
                    continue
                verdicts.enter(self.table, i, line, name, self.eps)
                begin[i] = stage + 1
                if _ended(line) or stage + 1 == len(ledgers):
                    del begin[i]
        return begin

    def known(self, ledger: Path) -> Iterator[tuple[int, Line]]:
        """Position and line of this subset's own images in a ledger: the same files, with the same labels."""
        what = self.cell.what
        for line in store.records(ledger):
            i = self.places.get(line["key"])
            if i is None or (line["image"], line["label"]) != (what.image_shas[i], what.split.labels[i]):
                continue
            if not self.cell.request.keep_images or _image_path(ledger, line).exists():
                yield i, line

    def broken_images(self) -> dict[str, Tensor]:
        """Key -> (3, H, W) adversarial image of every image that was broken at this cell's own radius."""
        found: dict[str, Tensor] = {}
        own = self.table[self.table.broken_at_eps == self.eps]
        for number, stage in enumerate(self.cell.attack.stage):
            ledger = self.cell.ledger(number)
            wanted = set(own.index[own.broken_by == stage.name])
            for i, line in self.known(ledger):
                if i in wanted:
                    found[line["key"]] = load_file(_image_path(ledger, line))["adv"]
        return found


def _ended(line: Line) -> bool:
    """Whether no later stage is given this image."""
    return bool(line["broken"] or line["error"])


def _image_path(ledger: Path, line: Line) -> Path:
    identity = store.fingerprint([line["key"], line["image"], line["label"]])
    return ledger.with_suffix("") / f"{identity[:24]}.safetensors"
