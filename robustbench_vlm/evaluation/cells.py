"""What is evaluated, and the name of a result: everything that decides a number, as plain values with a hash.

A cell is model x dataset x attack x eps x subset. What an attack found out about an image is a property of
(model, image, threat, attack, seed) alone, so it is kept in a *ledger* that every cell shares: `autoattack`
starts from what `aa2` found, n = 500 from n = 100, and a killed run from its last image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustbench_vlm import store
from robustbench_vlm.backends.backend import Backend
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data.canvas_images import CanvasImages, decodable_images
from robustbench_vlm.data.dataset import Split
from robustbench_vlm.engine.attacked_view import PLAIN, Precision
from robustbench_vlm.evaluation.chain import attack_sha256
from robustbench_vlm.models.text_bank import render, text_bank, untrained
from robustbench_vlm.models.zoo import Loaded
from robustbench_vlm.results import result_file
from robustbench_vlm.threat import Norm, Threat


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
        sight: how attacks see the model; verdicts are in fp32 whatever it is.
        marks: what else a row must be told apart by (protocol, list of images); empty for none.
        engine: `native`, or the package that attacks instead.
        mode: of the native engine: `fast`, or `reference`, in lock-step with the reference's noise.
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
    sight: Precision = PLAIN
    marks: Mapping[str, str] = field(default_factory=dict)
    engine: str = "native"
    mode: str = "fast"

    @cached_property
    def by(self) -> Backend:
        """Who attacks and how.

        Raises:
            InputError: no such engine or mode, or two things that do not go together.
        """
        return Backend(self.engine, self.mode, self.sight)

    @cached_property
    def means(self) -> dict[str, str]:
        """How the numbers come about: part of every fingerprint."""
        return {"precision": self.sight.label, "engine": self.by.label}


@dataclass(frozen=True)
class Subject:
    """One model on one dataset, ready to be attacked.

    Attributes:
        images: N of them, whose pixels are read when they are needed.
        bank: (C, D) unit text rows.
    """

    loaded: Loaded
    card: DatasetCard
    images: CanvasImages
    bank: Tensor

    @property
    def split(self) -> Split:
        """Keys and labels of the images."""
        return self.images.split

    @property
    def image_shas(self) -> tuple[str, ...]:
        """SHA-256 of each image's file."""
        return self.images.sha256

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        return torch.from_numpy(self.split.labels)

    @cached_property
    def untrained(self) -> list[str]:
        """Class names with a word that the text tower never met in training."""
        return untrained(self.loaded.model, self.card.names, self.card.templates[0])

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the model computes on which canvas, apart from the attack: part of every fingerprint."""
        return {
            "model_sha256": self.loaded.card.sha256,
            "bank_sha256": hashlib.sha256(self.bank.cpu().numpy().tobytes()).hexdigest(),
            "canvas": self.card.canvas,
            "canvas_px": self.images.side,
            **({} if self.card.resize == "bicubic" else {"resize": self.card.resize}),
            **({} if self.loaded.model.preprocess.antialias else {"antialias": False}),
        }


def subject(loaded: Loaded, card: DatasetCard, split: Split) -> Subject:
    """Look at the images of `split` and encode the sentences of `card` for one model."""
    images = decodable_images(split, loaded.model.image_size)
    bank = text_bank(loaded.model, render(card.names, card.templates))
    return Subject(loaded, card, images, bank)


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
            **self.request.means,
            **self.request.marks,
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
        return result_file.path_of(self.request.results, self.config, len(self.what.split))

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        suffixes = [".json", ".parquet", *([".safetensors"] if self.request.keep_images else [])]
        return all(self.path.with_suffix(suffix).exists() for suffix in suffixes)

    def ledger(self, number: int) -> Path:
        """Where the findings of stage `number` are kept.

        Named by all that decides them: the chain up to this stage, and not the subset, unless images are
        attacked in batches that the subset decides.
        """
        drawn = [self.what.split.sha256, *self.what.image_shas]
        config = {
            **({} if self.request.by.keyed else {"drawn": store.fingerprint(drawn)}),
            **self.what.facts,
            **self.request.means,
            "norm": self.request.norm,
            "ladder": [str(eps) for eps in self.ladder],
            "seed": self.request.seed,
            "rows": self.attack.rows,
            "stop": self.attack.stop,
            "stages": [stage.model_dump(mode="json") for stage in self.attack.stage[: number + 1]],
        }
        folder = self.request.results / "ledger" / self.what.card.name
        return folder / f"{store.fingerprint(config)[:32]}.jsonl"
