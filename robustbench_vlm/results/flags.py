"""What each flag of a result says, in words for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

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


def legend(rows: pd.DataFrame) -> Iterator[str]:
    """`FLAG (MODEL on DATASET, ...): WORDS` for every flag in the rows of results; means repeat theirs."""
    marked = rows[(rows.flag != "") & (rows.cell_sha256 != "")]
    where: dict[str, list[str]] = {}
    for model, dataset, flags in zip(marked.model_id, marked.dataset, marked.flag, strict=True):
        for flag in flags.split(";"):
            where.setdefault(flag, []).append(f"{model} on {dataset}")
    for flag in sorted(where):
        yield f"{flag} ({', '.join(dict.fromkeys(where[flag]))}): {WORDS.get(flag, 'see docs/attacks.md')}"
