"""Cells: which results an evaluation makes, and what each of them is named by.

A cell is one model on one dataset under one chain at one radius on one subset of images. Everything that
decides its outcome is written as plain values, whose hash names it. What an attack finds out about an image
depends on model, image, threat, attack and seed alone, so it is written to a *ledger* that cells share:
`autoattack` starts from what `aa2` found, n = 500 from n = 100, and a killed run from its last image.
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
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.data.canvas_images import CanvasImages, decodable_images, resized_as
from robustbench_vlm.data.dataset import TOLERATED, Split
from robustbench_vlm.engine import tied_classes
from robustbench_vlm.engine.tied_classes import TiedClasses
from robustbench_vlm.errors import DataError
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.models import context_length
from robustbench_vlm.models.clip import Classifier
from robustbench_vlm.models.text_bank import render, text_bank, untrained
from robustbench_vlm.models.zoo import Loaded
from robustbench_vlm.results import evidence, result_file
from robustbench_vlm.threat import Norm, Threat


@dataclass(frozen=True)
class EvalSettings:
    """How models are evaluated, whichever model and dataset it is.

    Attributes:
        chains: each is run on the clean images.
        norm: of the ball.
        ladder: radii in ascending order; an image that is broken at one counts as broken at the larger ones.
        n: images of every dataset; 0 means all.
        seed: of the subset and of the attacks' noise.
        results: folder of result files and ledgers.
        device: where to attack.
        backend: what runs the attacks, and in which precision the model is attacked.
        batch_size: most images in a call of the attacked model; None for `auto`. See `Job.batch_size`.
        save_images: write the adversarial images too.
        suite: write a bundle of evidence too, as a result of this suite; None for no bundle.
        tags: further facts that tell results apart: protocol, list of images and stop rule; empty for none.
    """

    chains: tuple[Chain, ...]
    norm: Norm
    ladder: tuple[Fraction, ...]
    n: int
    seed: int
    results: Path
    device: torch.device
    backend: Backend = field(default_factory=Backend)
    batch_size: int | None = None
    save_images: bool = False
    suite: Suite | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    def keeps_image(self, *, broken: bool) -> bool:
        """Whether the adversarial image of a finding is written beside its ledger."""
        return self.save_images or (self.suite is not None and broken)

    @cached_property
    def numerics(self) -> dict[str, str]:
        """What computed the numbers: part of every fingerprint."""
        return {"precision": self.backend.precision.label, "engine": self.backend.label}


@dataclass(frozen=True)
class Subject:
    """One model on one dataset, ready to be attacked.

    Attributes:
        loaded: the model with its card.
        card: of the dataset.
        images: N of them; pixels are read when they are needed.
        bank: (C, D) unit text embeddings of the classes.
    """

    loaded: Loaded
    card: DatasetCard
    images: CanvasImages
    bank: Tensor

    @classmethod
    def of(
        cls,
        loaded: Loaded,
        card: DatasetCard,
        split: Split,
        bank: Tensor | None = None,
        tolerated: float = TOLERATED,
    ) -> Subject:
        """Look at the images of `split`, and encode the sentences of `card` with one model.

        Args:
            loaded: the model.
            card: of the dataset.
            split: which images.
            bank: (C, D) what encoding the sentences gave before; None to encode them.
            tolerated: share of undecodable images up to which they are left out.
        """
        split = resized_as(split, loaded.model.preprocess.canvas_resize)
        card = card.model_copy(update={"resize": split.card.resize})
        images = decodable_images(split, loaded.model.image_size, tolerated)
        if bank is None:
            bank = text_bank(loaded.model, render(card.names, card.templates))
        return cls(loaded, card, images, bank)

    def classifier(self, device: torch.device, *, bf16: bool = False) -> Classifier:
        """The model as a classifier of pixels on a device."""
        return Classifier(self.loaded.model, self.bank, bf16=bf16).to(device)

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
    def tied(self) -> TiedClasses | None:
        """Classes with the same sentences or the same embedding; None if all classes differ."""
        sentences = render(self.card.names, self.card.templates)
        names = tied_classes.grouped([tuple(group) for group in sentences])
        rows = tied_classes.of_bank(self.bank)
        tied = names if rows is None or (names and len(names.distinct) < len(rows.distinct)) else rows
        if tied is not None and len(tied.distinct) < 2:
            found = f"all {self.card.n_classes} classes have the same text"
            raise DataError(
                f"dataset {self.card.name}", found, "two different class names", "correct its card"
            )
        return tied

    @property
    def n_distinct(self) -> int:
        """Number of classes that have different text."""
        return self.card.n_classes if self.tied is None else len(self.tied.distinct)

    @cached_property
    def cut(self) -> list[str]:
        """Sentences that are longer than the text tower's context, so that their end is not read."""
        sentences = [text for group in render(self.card.names, self.card.templates) for text in group]
        return context_length.cut_sentences(self.loaded.model.tokenize, sentences)

    @cached_property
    def untrained(self) -> list[str]:
        """The template and the class names that have a word which the text tower never met in training."""
        return untrained(self.loaded.model, self.card.names, self.card.templates[0])

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the model computes on which canvas, apart from the attack: part of every fingerprint."""
        return {
            "model_sha256": self.loaded.card.sha256,
            "bank_sha256": hashlib.sha256(self.bank.cpu().numpy().tobytes()).hexdigest(),
            "canvas": self.card.canvas,
            "canvas_px": self.images.side,
            **({} if self.card.resize in ("model", "bicubic") else {"resize": self.card.resize}),
            **({} if self.tied is None else {"tied_classes": store.fingerprint(list(self.tied.first))}),
            **({} if self.loaded.model.preprocess.antialias else {"antialias": False}),
        }


@dataclass(frozen=True)
class Cell:
    """One result, measured already or still to be measured.

    Attributes:
        subject: model and images.
        chain: attacks.
        settings: of the evaluation.
        ladder: radii up to and including the cell's own.
    """

    subject: Subject
    chain: Chain
    settings: EvalSettings
    ladder: tuple[Fraction, ...]

    @property
    def threat(self) -> Threat:
        """The ball: norm, and the last radius of the ladder."""
        return Threat(self.settings.norm, self.ladder[-1])

    @cached_property
    def config(self) -> dict[str, Any]:
        """Everything that decides the outcome, as plain values; its hash names the cell.

        Radii are exact fractions here, since they are hashed.
        """
        subject, card, settings = self.subject, self.subject.card, self.settings
        return {
            **subject.facts,
            **settings.numerics,
            **settings.tags,
            "model": subject.loaded.card.name,
            "dataset": card.name,
            "dataset_version": card.version,
            "split": subject.split.split,
            "n_requested": settings.n,
            "seed": settings.seed,
            "subset_sha256": subject.split.sha256,
            "images_sha256": store.fingerprint(list(subject.image_shas)),
            "names_sha256": store.fingerprint(list(card.names)),
            "templates_sha256": store.fingerprint(list(card.templates)),
            "norm": settings.norm,
            "eps": str(self.ladder[-1]),
            "eps_ladder": [str(eps) for eps in self.ladder],
            "attack": self.chain.name,
            "attack_version": self.chain.card.version,
            "attack_sha256": self.chain.sha256,
        }

    @property
    def path(self) -> Path:
        """The cell's JSON file; verdicts and images are files of the same name with other endings."""
        return result_file.path_of(self.settings.results, self.config, len(self.subject.split))

    @property
    def finished(self) -> bool:
        """Whether all files of the cell exist."""
        images = [".safetensors"] if self.settings.save_images else []
        bundle = [evidence.SUFFIX] if self.settings.suite is not None else []
        path = self.path
        return all(path.with_suffix(suffix).exists() for suffix in (".json", ".parquet", *images, *bundle))

    def ledger(self, number: int) -> Path:
        """The file with the findings of stage `number`.

        It is named by everything that decides a finding: the chain up to this stage and, where the backend
        draws noise in batches, also the subset, which decides what is in a batch.
        """
        subject, settings = self.subject, self.settings
        drawn = store.fingerprint([subject.split.sha256, *subject.image_shas])
        config = {
            **({} if settings.backend.keyed else {"drawn": drawn}),
            **subject.facts,
            **settings.numerics,
            "norm": settings.norm,
            "ladder": [str(eps) for eps in self.ladder],
            "seed": settings.seed,
            "rows": self.chain.rows,
            "stop": self.chain.stop,
            "stages": self.chain.stage_records[: number + 1],
        }
        folder = settings.results / "ledger" / store.file_name(subject.card.name)
        return folder / f"{store.fingerprint(config)[:32]}.jsonl"
