"""Attack models over datasets: verdicts per image in ledgers, summed into one JSON and Parquet a cell."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from robustbench_vlm import provenance, store, verdicts
from robustbench_vlm.attacks import canonical, checks, engines, finder, losses
from robustbench_vlm.attacks.engine import Cost
from robustbench_vlm.attacks.interface import Attack
from robustbench_vlm.cards import AttackCard
from robustbench_vlm.cells import Cell, Request, Subject, black_box, needs, plugin
from robustbench_vlm.data import miniature
from robustbench_vlm.data.dataset import majority
from robustbench_vlm.models.zeroshot import ZeroShot
from robustbench_vlm.threat import eps_text
from robustbench_vlm.types import Classify, Finding

SCHEMA = "vlmrob-cell/1"
CONSTANT = 0.95  # share of one class among the clean predictions from which a model counts as constant
ZERO_GRADIENT = 0.01  # share of attacked images with an exactly zero gradient from which CE is unreliable
NO_PROGRESS = 0.01  # share of survivors whose objective never rose from which an attack did not work
BLIND = 0.002  # share of images that only a black-box stage broke from which gradients are not to be trusted

Line = dict[str, Any]
Report = Callable[[str, int, int], None]
"""Called with (what, done, total) as images finish."""

Examine = Callable[[], checks.Examined]


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


def _examine(what: Subject, card: AttackCard, request: Request) -> checks.Examined:
    """What the chain takes for granted about the model, on images of this subset."""
    device = request.device
    return checks.examine(
        ZeroShot(what.loaded.model, what.bank).to(device),
        what.images.to(device),
        what.labels.to(device),
        what.split.keys,
        rows=card.rows,
        seed=request.seed,
        **needs(card, what.card.n_classes),
    )


def _fill(cell: Cell, smaller: Cell | None, report: Report, examine: Examine) -> None:
    """Clean pass, every stage over the survivors, then Parquet and JSON (last: a cell with JSON is whole).

    What the cell of the next smaller radius broke is lost here too, with the same image as evidence.
    """
    with finder.numerics(tf32=cell.request.sight.tf32):
        _measure(cell, smaller, report, examine)


def _measure(cell: Cell, smaller: Cell | None, report: Report, examine: Examine) -> None:
    started = time.perf_counter()
    examined = examine()
    what, request = cell.what, cell.request
    classify = ZeroShot(what.loaded.model, what.bank).to(request.device)
    images = what.images.to(request.device)
    clean = canonical.logits(classify, images, cell.attack.rows)
    margins = losses.judge(clean, what.labels.to(clean.device)).cpu().numpy()
    predictions = clean.argmax(1).cpu().numpy()
    lost = None if smaller is None else pd.read_parquet(smaller.path.with_suffix(".parquet"))
    lost = None if lost is None else lost[lost.broken_at_eps != ""]
    table = verdicts.begin(what.split.keys, what.split.labels, what.image_shas, predictions, margins, lost)
    lower = ZeroShot(what.loaded.model, what.bank, bf16=True).to(request.device)
    sample = canonical.padded(images[: cell.attack.rows], cell.attack.rows)
    arena = _Arena(cell, classify, images, clean, finder.finder(classify, request.sight, sample, lower))
    eps = eps_text(request.norm, cell.threat.eps)
    stages = [(stage.name, plugin(cell.attack, stage)) for stage in cell.attack.stage]
    number, costs = 0, []
    for group in engines.tables(cell.request.by, stages):
        alive = [int(i) for i in table.index[verdicts.standing(table)]]
        lines, cost = arena.attack(number, group, alive, report)
        costs.append(cost)
        for i in alive:
            for name, line in lines[what.split.keys[i]].items():
                verdicts.enter(table, i, line, name, eps)
        number += len(group)
    store.write(cell.path.with_suffix(".parquet"), table.to_parquet(index=False))
    if request.keep_images:
        kept = {} if smaller is None else load_file(smaller.path.with_suffix(".safetensors"))
        store.write(cell.path.with_suffix(".safetensors"), save(kept | arena.broken_images(table, eps)))
    outcome = tally(cell, table, examined.failed)
    content = {
        "config": cell.config,
        "outcome": outcome,
        "model": provenance.of_model(what.loaded),
        "stages": [stage.model_dump(mode="json") for stage in cell.attack.stage],
    }
    spent = asdict(engines.total(costs))  # by this run; what ledgers held was paid for by an earlier one
    run = provenance.of_run(request.device, time.perf_counter() - started, request.live) | {"calls": spent}
    # what failed is hashed, in `flags`; the numbers behind it may differ in rounding from device to device
    beside = {"checks": examined.record, "run": run}
    whole = {"schema": SCHEMA, "sha256": store.fingerprint(content), **content, **beside}
    store.write_json(cell.path, whole)


@dataclass(frozen=True)
class _Arena:
    """A cell with its model and pixels on the device."""

    cell: Cell
    classify: ZeroShot
    images: Tensor  # (N, 3, H, W)
    clean: Tensor  # (N, C) logits of the canonical clean pass
    find: Classify  # the model as attacks see it

    def attack(
        self, number: int, stages: Sequence[tuple[str, Attack]], alive: Sequence[int], report: Report
    ) -> tuple[dict[str, dict[str, Line]], Cost]:
        """The findings of stages that share rows on the images at `alive`: by key, then by stage.

        Also what it took now.

        Args:
            number: position of the first of these stages in the chain.
            stages: name and attack of each.
            alive: positions of the images.
            report: told as images finish.

        Only what the ledgers lack is run.
        """
        cell, request, what = self.cell, self.cell.request, self.cell.what
        names = [name for name, _ in stages]
        ledgers = {name: cell.ledger(number + i) for i, name in enumerate(names)}
        lines, begin = self.resumed(ledgers, alive)
        name = f"{what.loaded.card.name} · {what.card.name} · {' + '.join(names)} · {cell.threat}"
        done = len(alive) - len(begin)
        report(name, done, len(alive))
        if not begin:
            return lines, engines.total([])
        for ledger in ledgers.values():
            store.mend(ledger)
        rows = {what.split.keys[i]: i for i in begin}

        def take(finding: Finding) -> None:
            nonlocal done
            i = rows.get(finding.key)
            if i is None:
                return
            line = verdicts.line(
                finding, what.images[i], what.image_shas[i], int(what.labels[i]), cell.threat
            )
            ledger = ledgers[finding.stage]
            if request.keep_images:
                store.write(_image_path(ledger, line), save({"adv": finding.adv.contiguous()}))
            store.append(ledger, line)
            lines[finding.key][finding.stage] = line
            done += _ended(line) or finding.stage == names[-1]
            report(name, done, len(alive))

        # where noise is drawn in batches, a batch is run again whole: then a line that is there is met again
        members = engines.batches(request.by, alive, begin, cell.attack.rows)
        index = torch.tensor(members)
        chosen = index.to(self.images.device)
        cost = engines.run(
            request.by,
            self.classify,
            self.images[chosen],
            what.labels[index].to(self.images.device),
            [what.split.keys[i] for i in members],
            stages,
            cell.threat,
            seed=request.seed,
            n_classes=what.card.n_classes,
            rows=cell.attack.rows,
            live=None if request.live is None else min(request.live, cell.attack.rows),
            stop=cell.attack.stop,
            clean=self.clean[chosen],
            begin=[begin.get(i, 0) for i in members],
            find=self.find,
            on_finding=take,
        )
        return lines, cost

    def resumed(
        self, ledgers: Mapping[str, Path], alive: Sequence[int]
    ) -> tuple[dict[str, dict[str, Line]], dict[int, int]]:
        """What the ledgers say about the images at `alive`, and where each of the others begins.

        Returns:
            Lines by key and stage, and the stage in which each unfinished image goes on, by its position.
        """
        known = {name: self.known(ledger) for name, ledger in ledgers.items()}
        lines: dict[str, dict[str, Line]] = {}
        begin: dict[int, int] = {}
        for i in alive:
            key = self.cell.what.split.keys[i]
            met = lines[key] = {}
            for stage, (name, found) in enumerate(known.items()):
                if key not in found:
                    begin[i] = stage
                    break
                met[name] = found[key]
                if _ended(found[key]):
                    break
        return lines, begin

    def known(self, ledger: Path) -> dict[str, Line]:
        """The lines of a ledger about this subset's own images: the same files, with the same labels."""
        facts, keep = self.cell.what.identities, self.cell.request.keep_images
        return {
            line["key"]: line
            for line in store.records(ledger)
            if facts.get(line["key"]) == (line["image"], line["label"])
            and (not keep or _image_path(ledger, line).exists())
        }

    def broken_images(self, table: pd.DataFrame, eps: str) -> dict[str, Tensor]:
        """Key -> (3, H, W) adversarial image of every image that was broken at this cell's own radius."""
        found: dict[str, Tensor] = {}
        own = table[table.broken_at_eps == eps]
        for number, stage in enumerate(self.cell.attack.stage):
            ledger = self.cell.ledger(number)
            lines = self.known(ledger)
            for key in own.key[own.broken_by == stage.name]:
                found[key] = load_file(_image_path(ledger, lines[key]))["adv"]
        return found


def _ended(line: Line) -> bool:
    """Whether no later stage is given this image."""
    return bool(line["broken"] or line["error"])


def _image_path(ledger: Path, line: Line) -> Path:
    identity = store.fingerprint([line["key"], line["image"], line["label"]])
    return ledger.with_suffix("") / f"{identity[:24]}.safetensors"


def tally(cell: Cell, table: pd.DataFrame, failed: Sequence[str]) -> dict[str, Any]:
    """The outcome of a cell: counts of verdicts, flags, and what ran otherwise than written.

    Args:
        cell: whose outcome.
        table: its verdicts.
        failed: names of failed examinations of the model.
    """
    what, stages = cell.what, cell.attack.stage
    n_classes = what.card.n_classes
    eps = eps_text(cell.request.norm, cell.threat.eps)
    blind = verdicts.broken_in(table, black_box(cell.attack, n_classes), eps)
    share = verdicts.largest_prediction_share(table)
    errors = int((table.error != "").sum())
    flags = {
        "constant-predictor": share >= CONSTANT and n_classes > 1,
        "zero-gradient": verdicts.zero_gradient_share(table) > ZERO_GRADIENT,
        "error-rows": errors > 0,
        "no-progress": verdicts.no_progress_share(table) > NO_PROGRESS,
        "square-beats-white-box": blind > BLIND * len(table),
        "untrained-words": bool(what.untrained),
        "bad-images": bool(what.split.bad),
        "generated-images": (what.split.folder / miniature.MARK).exists(),
    }
    trained_on = what.loaded.card.trained_on
    seen = what.card.name in (trained_on or ())
    whole = trained_on is not None and "unknown" not in trained_on  # of every parent
    exposure = "seen" if seen else "unseen" if whole else "unknown"
    changed = [
        (stage.name, text) for stage in stages for text in plugin(cell.attack, stage).substitutions(n_classes)
    ]
    return {
        "n": len(table),
        "n_classes": n_classes,
        "clean_correct": int(table.clean_correct.sum()),
        "robust": verdicts.robust_after(table, [stage.name for stage in stages], eps),
        "errors": errors,
        "square_only": blind,
        "majority": round(majority(what.split.labels, n_classes), 6),
        "largest_prediction_share": round(share, 6),
        "exposure": exposure,
        "flags": sorted({name for name, raised in flags.items() if raised}.union(failed)),
        "substitutions": [f"{stage}: {text}" for stage, text in changed],
        "forwards": int(table.forwards.sum()),
        "backwards": int(table.backwards.sum()),
        "verdicts_sha256": verdicts.sha256(table),
    }
