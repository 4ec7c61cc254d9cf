"""A run on a model with tied classes is made on its distinct classes; findings name the model's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from robustbench_vlm.engine.job import ImageBlock, Job, Model, OnFinding
from robustbench_vlm.engine.tied_classes import DistinctClasses, TiedClasses
from robustbench_vlm.types import Finding

Run = tuple[Model, Job, Iterable[ImageBlock], OnFinding]
"""The arguments of `Backend.run`."""


def attacked(
    tied: TiedClasses, model: Model, job: Job, blocks: Iterable[ImageBlock], on_finding: OnFinding
) -> Run:
    """The arguments of a run on the D distinct classes of a model with C classes.

    Args:
        tied: which classes are the same.
        model: with C logits.
        job: with C classes.
        blocks: images with labels of C, each of them the first of its twins, and clean logits (N, C).
        on_finding: is given predictions and targets of C.
    """
    view = None if model.view is None else DistinctClasses(model.view, tied)
    canonical = DistinctClasses(model.canonical, tied)
    same = model.view is model.canonical
    distinct = dataclasses.replace(model, canonical=canonical, view=canonical if same else view)

    def note(finding: Finding) -> None:
        target = finding.target if finding.target < 0 else tied.distinct[finding.target]
        prediction = tied.distinct[finding.prediction]
        on_finding(dataclasses.replace(finding, target=target, prediction=prediction))

    smaller = dataclasses.replace(job, n_classes=len(tied.distinct), tied=None)
    return distinct, smaller, (_of_distinct(tied, block) for block in blocks), note


def _of_distinct(tied: TiedClasses, block: ImageBlock) -> ImageBlock:
    clean = None if block.clean is None else tied.logits(block.clean)
    return dataclasses.replace(block, labels=tied.labels(block.labels), clean=clean)
