"""The columns of a leaderboard CSV, in order, and what each of them means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SCHEMA = "vlmrob-leaderboard/2"
"""Raised whenever a column changes its meaning or spelling."""

STAGE = "robust_"
"""Prefix of the columns that hold robust accuracy after one stage of a chain."""

BEFORE_STAGES: Mapping[str, str] = {
    "schema_version": "version of these columns",
    "suite": "name of the suite",
    "suite_version": "version of the suite card",
    "model_id": "name of the model",
    "checkpoint_sha256": "fingerprint of the model: configuration, preprocessing, logit scale, weights",
    "defense": "how the model was trained; `none` for a model that was not trained here",
    "arch": "architecture of the model",
    "params_m": "parameters of the image tower, in millions",
    "train_norm": "norm of the attack in training; empty without one",
    "train_eps": "radius of the attack in training; empty without one",
    "dataset": "name of the dataset; `mean`: unweighted mean over the suite; `mean:NAME`: over a part of it",
    "exposure": "whether the model or a parent lists the dataset: `seen`, `unseen`; `unknown` without a list",
    "split": "split of the dataset",
    "n": "number of images; of a mean, of all its datasets together",
    "n_requested": "number of images asked for of every dataset; 0 means all",
    "stop_rule": "rule that ended the evaluation before all images; empty for a number that was fixed before",
    "n_classes": "number of classes; empty for a mean",
    "subset_sha256": "fingerprint of the drawn images' keys",
    "threat_space": "size at which the ball lies: `native`, of the images; `model`, of the model's input",
    "canvas_px": "side of the images under attack, in pixels",
    "protocol": "name and version of the evaluation protocol; empty without one",
    "attack": "name of the chain of attacks",
    "attack_version": "version of the chain's card",
    "attack_config_sha256": "fingerprint of the chain: every number of every stage",
    "engine": "what ran the attack, with its version",
    "norm": "norm of the ball: `linf`, `l2`, `l1`",
    "eps": "radius of the ball in units of the pixel range [0, 1]: `4/255` for linf, `0.5` for l2 and l1",
    "eps_ladder": "radii attacked one after the other; images broken at a smaller one are not attacked again",
    "precision": "of the model as the attack saw it; verdicts are always decided in fp32",
    "seed": "of the subset and of the attack's noise",
    "metric": "what the dataset's makers report: `top1`, `mean-per-class` or `auroc`; of means always `top1`",
    "clean": "accuracy on clean images, %: top-1, whatever the makers of the dataset report",
    "clean_ci_low": "lower limit of its 95 % interval, %: Wilson; of a mean, the stratified Clopper-Pearson",
    "clean_ci_high": "upper limit of the same",
}

AFTER_STAGES: Mapping[str, str] = {
    "robust": "accuracy after the whole chain, %: images that are right when clean and were not broken",
    "ci_low": "lower limit of its 95 % interval, %: Wilson; of a mean, the stratified Clopper-Pearson",
    "ci_high": "upper limit of the same",
    "rank_low": "best rank that `robust` may have: 1 + number of rows that are significantly better",
    "rank_high": "worst rank: number of rows minus those that are significantly worse",
    "tie_group": "letters of tie groups, separated by blanks; rows without a common letter differ",
    "leave_one_out_low": "smallest mean of `robust` with one dataset left out, %: a sensitivity, no interval",
    "leave_one_out_high": "largest mean of the same",
    "clean_per_class": "mean over classes of clean accuracy, %; empty unless `metric` is `mean-per-class`",
    "robust_per_class": "the same of `robust`",
    "chance": "accuracy of always predicting the most frequent class, %",
    "pgd_only": "images that PGD broke and this chain did not; empty for PGD itself, and where none was run",
    "flag": "failed checks and facts (docs/attacks.md), separated by `;`; of a mean, those of its rows",
    "samples_sha256": "fingerprint of the per-image verdicts",
    "cell_sha256": "fingerprint of the result file",
    "status": "`measured` here, or `copied` from a publication",
}


VERDICTS: Mapping[str, str] = {
    "key": "name of the image: dataset, split and file",
    "label": "index of the true class",
    "image_sha256": "SHA-256 of the image's file",
    "clean_prediction": "class of the clean image",
    "clean_margin": "logit of the true class minus the largest other one, on the clean image",
    "clean_correct": "whether the clean image is classified correctly; false where a logit is not finite",
    "broken_by": "stage that broke the image; empty if none did, also where the clean image is misclassified",
    "broken_at_eps": "radius at which it was broken, which may be a smaller one; empty if it was not",
    "target": "class that the successful trajectory aimed at; -1 without one",
    "restart": "restart of the successful trajectory, from 0; -1 if there is none",
    "iteration": "model evaluation at which it succeeded, from 0; -1 if it did not",
    "adv_prediction": "class of the adversarial image, else of the last iterate, else of the clean image",
    "adv_margin": "logit of the true class minus the largest other one, on the same image",
    "distance": "distance of that image from the clean one, in the norm of the ball",
    "adv_sha256": "SHA-256 of that image's float32 values; empty without attack",
    "forwards": "forward passes that the attacks spent on the image",
    "backwards": "image gradients that the attacks spent on the image",
    "zero_gradients": "evaluations whose image gradient was exactly zero",
    "progress": "how far the objective rose, at most, in stages with gradients; NaN if they broke the image",
    "error": "why there is no verdict; empty otherwise",
}
"""Columns of the Parquet file of a result, in order: one row an image."""


def names(stages: Sequence[str]) -> list[str]:
    """Columns of a table, in order: the same for all rows first, then what was measured.

    Args:
        stages: names of the stages of all chains in the table.
    """
    return [*BEFORE_STAGES, *(STAGE + stage for stage in stages), *AFTER_STAGES]


TEXTS = frozenset(name for name in (*BEFORE_STAGES, *AFTER_STAGES)) - {
    *("params_m", "n", "n_requested", "n_classes", "canvas_px", "seed", "chance", "pgd_only"),
    *("clean", "clean_ci_low", "clean_ci_high", "robust", "ci_low", "ci_high"),
    *("clean_per_class", "robust_per_class"),
    *("rank_low", "rank_high", "leave_one_out_low", "leave_one_out_high"),
}
"""Columns that are no numbers, or numbers with a unit: a radius such as `4/255` stays a text."""


def typed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its numbers as numbers; an empty entry is None."""
    return {name: value if name in TEXTS else _number(value) for name, value in row.items()}


def _number(value: object) -> int | float | None:
    if isinstance(value, int | float):
        return value
    text = str(value)
    if not text:
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)
