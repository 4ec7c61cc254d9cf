"""What each flag of a result says, in words for people, and how severe it is.

A flag has one of two severities. A `fact` says what exactly was measured, where dataset and model are used as
they are meant to be. A `failed` check of model, attack or data says that the number may be wrong, or not of
what the row names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import pandas as pd

Severity = Literal["fact", "failed"]

FACTS = frozenset({"sentences-cut", "tied-classes", "untrained-words"})
"""Flags that are facts; every other one is a failed check."""

WORDS: Mapping[str, str] = {
    "bad-images": "image files that could not be decoded are left out",
    "batch-dependent": "logits change with the other images of the batch",
    "below-chance": "clean accuracy is below that of guessing, so labels may be shifted",
    "classes-without-images": "a class folder has no image",
    "constant-predictor": "at least 95 % of the clean predictions are one class",
    "error-rows": "images without a verdict, since something was not finite",
    "generated-images": "the images are a generated miniature and not the dataset",
    "gradient-mismatch": "the gradient is not that of the function, so attacks are misled",
    "images-left-out": "images of the split are hidden or of a format that is not decoded",
    "no-gradient": "the logits do not depend on the image as far as gradients tell",
    "no-progress": "on over 1 % of the images that gradients did not break the objective never rose",
    "non-finite": "logits or gradients that are not finite",
    "outputs-changed": "clean logits are others after the attack than before it",
    "pgd-beats-chain": "plain PGD broke over 0.2 % of the images that this chain did not break",
    "probabilities": "the outputs are probabilities and not logits",
    "random-output": "logits change from call to call",
    "saturated": "logits so large that the cross-entropy has no gradient",
    "square-beats-white-box": "random search broke over 0.2 % of the images that gradients did not break",
    "sentences-cut": "class sentences that are cut at the context length",
    "state-changed": "a call changes weights or buffers",
    "tied-classes": "classes with the same text, which are attacked as one",
    "training-mode": "dropout or batch norm is in training mode",
    "untrained-words": "a template or class names with a word that the text tower never met",
    "zero-gradient": "over 1 % of the images met gradients of exactly zero",
}


def severity(flag: str) -> Severity:
    """Whether a flag is a fact or a failed check; one that is not known here is a failed check."""
    return "fact" if flag in FACTS else "failed"


def failed(flags: str) -> list[str]:
    """The failed checks in an entry of the column `flag`, which separates flags by `;`."""
    return [flag for flag in flags.split(";") if flag and severity(flag) == "failed"]


def places(rows: pd.DataFrame, kind: Severity) -> Iterator[tuple[str, str]]:
    """(flag, `MODEL on DATASET`) of all flags of one severity in the rows of results; means repeat theirs."""
    marked = rows[(rows.flag != "") & (rows.cell_sha256 != "")]
    for model, dataset, flags in zip(marked.model_id, marked.dataset, marked.flag, strict=True):
        for flag in flags.split(";"):
            if severity(flag) == kind:
                yield flag, f"{model} on {dataset}"


def legend(rows: pd.DataFrame, kind: Severity) -> Iterator[str]:
    """`FLAG (MODEL on DATASET, ...): WORDS` for every flag of one severity in the rows of results."""
    where: dict[str, list[str]] = {}
    for flag, place in places(rows, kind):
        where.setdefault(flag, []).append(place)
    for flag in sorted(where):
        yield f"{flag} ({', '.join(dict.fromkeys(where[flag]))}): {WORDS.get(flag, 'see docs/attacks.md')}"
