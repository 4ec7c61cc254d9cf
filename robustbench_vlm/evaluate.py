"""Attack models over datasets: verdicts per image, kept in ledgers, summed into one JSON and Parquet a cell.

A cell is model x dataset x attack x eps x subset. What an attack found out about an image is a property of
(model, image, threat, attack, seed) alone, so it is kept in a *ledger* that every cell shares: `autoattack`
starts from what `aa2` found, n = 500 from n = 100, and a killed run from its last image.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from robustbench_vlm import provenance, registry, store, verdicts
from robustbench_vlm.attacks import engine, losses
from robustbench_vlm.attacks.interface import Attack
from robustbench_vlm.cards import AttackCard, DatasetCard, Stage
from robustbench_vlm.data import miniature
from robustbench_vlm.data.dataset import Split, majority
from robustbench_vlm.data.loader import as_float
from robustbench_vlm.models.zeroshot import ZeroShot, render, text_bank
from robustbench_vlm.models.zoo import Loaded
from robustbench_vlm.threat import Norm, Threat, eps_text
from robustbench_vlm.types import Finding

SCHEMA = "vlmrob-cell/1"
ENGINE = "native/1"  # to be raised whenever the engine may reach another verdict
CONSTANT = 0.95  # share of one class among the clean predictions from which a model counts as constant
ZERO_GRADIENT = 0.01  # share of attacked images with an exactly zero gradient from which CE is unreliable

Line = dict[str, Any]
Report = Callable[[str, int, int], None]
"""Called with (what, done, total) as images finish."""


@dataclass(frozen=True)
class Request:
    """What to evaluate, apart from the model and the data.

    Attributes:
        attacks: chains, each run on the images as they are.
        norm: of the ball.
        ladder: radii, ascending; an image broken at one counts as broken at the larger ones.
        n: images a dataset, 0 for all.
        seed: of subset and attacks.
        results: folder of cells and ledgers.
        device: where to attack.
        live: rows in use, at most `rows` of the chain; changes speed and memory, never a verdict.
        keep_images: store the adversarial images too.
    """

    attacks: tuple[AttackCard, ...]
    norm: Norm
    ladder: tuple[Fraction, ...]
    n: int
    seed: int
    results: Path
    device: torch.device
    live: int | None = None
    keep_images: bool = False


@dataclass(frozen=True)
class Subject:
    """One model on one dataset, ready to be attacked.

    Attributes:
        images: (N, 3, H, W) float32 in [0, 1] on the canvas, on the CPU.
        image_shas: SHA-256 of each image's file.
        bank: (C, D) unit text rows.
    """

    loaded: Loaded
    card: DatasetCard
    split: Split
    images: Tensor
    image_shas: tuple[str, ...]
    bank: Tensor

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        return torch.from_numpy(self.split.labels)

    @property
    def identities(self) -> dict[str, tuple[str, int]]:
        """SHA-256 of each image's file and its label, by key."""
        facts = zip(self.image_shas, self.split.labels.tolist(), strict=True)
        return dict(zip(self.split.keys, facts, strict=True))

    @cached_property
    def untrained(self) -> list[str]:
        """Class names with a word that the text tower never met in training."""
        sentences = {name: self.card.templates[0].replace("{c}", name) for name in self.card.names}
        found = set(self.loaded.model.untrained_words(list(sentences.values())))
        return [name for name, sentence in sentences.items() if sentence in found]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the model computes on which canvas, apart from the attack: part of every fingerprint."""
        return {
            "model_sha256": self.loaded.card.sha256,
            "bank_sha256": hashlib.sha256(self.bank.cpu().numpy().tobytes()).hexdigest(),
            "canvas": self.card.canvas,
            "canvas_px": int(self.images.shape[-1]),
            "precision": "fp32",
            "engine": ENGINE,
        }


def subject(loaded: Loaded, card: DatasetCard, split: Split) -> Subject:
    """Decode the images of `split` and encode the sentences of `card` for one model."""
    decoded = split.images(loaded.model.image_size)
    bank = text_bank(loaded.model, render(card.names, card.templates))
    return Subject(loaded, card, split, as_float(decoded.pixels), tuple(decoded.sha256), bank)


@dataclass(frozen=True)
class Cell:
    """One result to be: a subject, a chain, and the radii up to its own."""

    what: Subject
    attack: AttackCard
    request: Request
    ladder: tuple[Fraction, ...]

    @property
    def threat(self) -> Threat:
        """The ball of this cell: the last rung of its ladder."""
        return Threat(self.request.norm, self.ladder[-1])

    @cached_property
    def config(self) -> dict[str, Any]:
        """Everything that decides the outcome, as plain values; its hash names the cell."""
        what, card = self.what, self.what.card
        return {
            **what.facts,
            "model": what.loaded.card.name,
            "dataset": card.name,
            "dataset_version": card.version,
            "split": what.split.split,
            "n_requested": self.request.n,
            "seed": self.request.seed,
            "subset_sha256": what.split.sha256,
            "images_sha256": store.fingerprint(list(what.image_shas)),
            "names_sha256": store.fingerprint(list(card.names)),
            "templates_sha256": store.fingerprint(list(card.templates)),
            "norm": self.request.norm,
            "eps": str(self.ladder[-1]),
            "eps_ladder": [str(eps) for eps in self.ladder],
            "attack": self.attack.name,
            "attack_version": self.attack.version,
            "attack_sha256": attack_sha256(self.attack),
        }

    @property
    def path(self) -> Path:
        """The cell's JSON file; Parquet and images stand beside it."""
        card = self.what.loaded.card
        folder = self.request.results / "cells" / f"{card.name}-{card.sha256[:8]}" / self.what.card.name
        eps = self.threat.column
        hashed = store.fingerprint(self.config)[:10]
        return folder / f"{self.attack.name}-{self.request.norm}-{eps}-n{len(self.what.split)}-{hashed}.json"

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        suffixes = [".json", ".parquet", *([".safetensors"] if self.request.keep_images else [])]
        return all(self.path.with_suffix(suffix).exists() for suffix in suffixes)

    def ledger(self, number: int) -> Path:
        """Where the findings of stage `number` are kept.

        Named by all that decides them: the chain up to this stage, and not the subset.
        """
        config = {
            **self.what.facts,
            "norm": self.request.norm,
            "ladder": [str(eps) for eps in self.ladder],
            "seed": self.request.seed,
            "rows": self.attack.rows,
            "stop": self.attack.stop,
            "stages": [stage.model_dump(mode="json") for stage in self.attack.stage[: number + 1]],
        }
        folder = self.request.results / "ledger" / self.what.card.name
        return folder / f"{store.fingerprint(config)[:32]}.jsonl"


def attack_sha256(card: AttackCard) -> str:
    """Fingerprint of a chain: its stages with every number, the padded shape and the stopping rule."""
    return store.fingerprint(card.model_dump(mode="json", include={"rows", "stop", "stage"}))


def plugin(card: AttackCard, stage: Stage) -> Attack:
    """The attack of one stage, with its fields.

    Raises:
        CardError: an unknown attack or field.
    """
    attack: Attack = registry.build(
        "attacks", stage.attack, stage.fields, f"attack {card.name}, stage {stage.name}"
    )
    return attack


def evaluate(what: Subject, request: Request, report: Report) -> Iterator[Path]:
    """Evaluate every cell of one model on one dataset; yields each cell's JSON file as it is finished.

    Raises:
        AttackError: an attack left the ball or the box.
    """
    for card in request.attacks:
        smaller: Cell | None = None
        for rung in range(len(request.ladder)):
            cell = Cell(what, card, request, request.ladder[: rung + 1])
            if not cell.finished:
                _fill(cell, smaller, report)
            smaller = cell
            yield cell.path


def _fill(cell: Cell, smaller: Cell | None, report: Report) -> None:
    """Clean pass, every stage over the survivors, then Parquet and JSON (last: a cell with JSON is whole).

    What the cell of the next smaller radius broke is lost here too, with the same image as evidence.
    """
    started = time.perf_counter()
    what, request = cell.what, cell.request
    classify = ZeroShot(what.loaded.model, what.bank).to(request.device)
    images = what.images.to(request.device)
    clean = engine.logits(classify, images, cell.attack.rows)
    margins = losses.judge(clean, what.labels.to(clean.device)).cpu().numpy()
    predictions = clean.argmax(1).cpu().numpy()
    lost = None if smaller is None else pd.read_parquet(smaller.path.with_suffix(".parquet"))
    lost = None if lost is None else lost[lost.broken_at_eps != ""]
    table = verdicts.begin(what.split.keys, what.split.labels, what.image_shas, predictions, margins, lost)
    arena = _Arena(cell, classify, images, clean)
    eps = eps_text(request.norm, cell.threat.eps)
    for number, stage in enumerate(cell.attack.stage):
        alive = [int(i) for i in table.index[verdicts.standing(table)]]
        lines = arena.attack(number, alive, report)
        for i in alive:
            verdicts.enter(table, i, lines[what.split.keys[i]], stage.name, eps)
    store.write(cell.path.with_suffix(".parquet"), table.to_parquet(index=False))
    if request.keep_images:
        kept = {} if smaller is None else load_file(smaller.path.with_suffix(".safetensors"))
        store.write(cell.path.with_suffix(".safetensors"), save(kept | arena.broken_images(table, eps)))
    outcome = tally(cell, table)
    content = {
        "config": cell.config,
        "outcome": outcome,
        "model": provenance.of_model(what.loaded),
        "stages": [stage.model_dump(mode="json") for stage in cell.attack.stage],
    }
    run = provenance.of_run(request.device, time.perf_counter() - started, request.live)
    whole = {"schema": SCHEMA, "sha256": store.fingerprint(content), **content, "run": run}
    store.write_json(cell.path, whole)


@dataclass(frozen=True)
class _Arena:
    """A cell with its model and pixels on the device."""

    cell: Cell
    classify: ZeroShot
    images: Tensor  # (N, 3, H, W)
    clean: Tensor  # (N, C) logits of the canonical clean pass

    def attack(self, number: int, alive: Sequence[int], report: Report) -> dict[str, Line]:
        """The findings of one stage on the images at `alive`, by key; only what the ledger lacks is run."""
        cell, request = self.cell, self.cell.request
        stage, ledger, keys = cell.attack.stage[number], cell.ledger(number), cell.what.split.keys
        lines = self.known(ledger)
        todo = [i for i in alive if keys[i] not in lines]
        name = f"{cell.what.loaded.card.name} · {cell.what.card.name} · {stage.name} · {cell.threat}"
        report(name, len(alive) - len(todo), len(alive))
        if not todo:
            return lines
        store.mend(ledger)
        done = len(alive) - len(todo)
        what, labels = cell.what, cell.what.labels
        rows = {keys[i]: i for i in todo}

        def take(finding: Finding) -> None:
            nonlocal done
            i = rows[finding.key]
            line = verdicts.line(finding, what.images[i], what.image_shas[i], int(labels[i]), cell.threat)
            if request.keep_images:
                store.write(_image_path(ledger, line), save({"adv": finding.adv.contiguous()}))
            store.append(ledger, line)
            lines[finding.key] = line
            done += 1
            report(name, done, len(alive))

        index = torch.tensor(todo)
        chosen = index.to(self.images.device)
        engine.run(
            self.classify,
            self.images[chosen],
            labels[index].to(self.images.device),
            [keys[i] for i in todo],
            plugin(cell.attack, stage),
            cell.threat,
            stage=stage.name,
            seed=request.seed,
            n_classes=cell.what.card.n_classes,
            rows=cell.attack.rows,
            live=cell.attack.rows if request.live is None else min(request.live, cell.attack.rows),
            stop=cell.attack.stop,
            clean=self.clean[chosen],
            on_finding=take,
        )
        return lines

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


def _image_path(ledger: Path, line: Line) -> Path:
    identity = store.fingerprint([line["key"], line["image"], line["label"]])
    return ledger.with_suffix("") / f"{identity[:24]}.safetensors"


def tally(cell: Cell, table: pd.DataFrame) -> dict[str, Any]:
    """The outcome of a cell: counts of verdicts, flags, and what ran otherwise than written."""
    what, stages = cell.what, cell.attack.stage
    n_classes = what.card.n_classes
    share = verdicts.largest_prediction_share(table)
    errors = int((table.error != "").sum())
    flags = {
        "constant-predictor": share >= CONSTANT and n_classes > 1,
        "zero-gradient": verdicts.zero_gradient_share(table) > ZERO_GRADIENT,
        "error-rows": errors > 0,
        "untrained-words": bool(what.untrained),
        "generated-images": (what.split.folder / miniature.MARK).exists(),
    }
    trained_on = what.loaded.card.trained_on
    exposure = "unknown" if trained_on is None else "seen" if what.card.name in trained_on else "unseen"
    changed = [
        (stage.name, text) for stage in stages for text in plugin(cell.attack, stage).substitutions(n_classes)
    ]
    return {
        "n": len(table),
        "n_classes": n_classes,
        "clean_correct": int(table.clean_correct.sum()),
        "robust": verdicts.robust_after(
            table, [stage.name for stage in stages], eps_text(cell.request.norm, cell.threat.eps)
        ),
        "errors": errors,
        "majority": round(majority(what.split.labels, n_classes), 6),
        "largest_prediction_share": round(share, 6),
        "exposure": exposure,
        "flags": sorted(name for name, raised in flags.items() if raised),
        "substitutions": [f"{stage}: {text}" for stage, text in changed],
        "forwards": int(table.forwards.sum()),
        "backwards": int(table.backwards.sum()),
        "verdicts_sha256": verdicts.sha256(table),
    }
