"""Rows of a leaderboard: one for each result, and one for each mean over the datasets of a suite.

A row is a function of verdict counts and fingerprints alone, so the same results give the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustbench_vlm.cards.dataset import Metric
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.errors import InputError
from robustbench_vlm.results import columns, mean_interval, stats, stop_rule, verdicts
from robustbench_vlm.results.result_file import Result
from robustbench_vlm.results.stats import Interval
from robustbench_vlm.threat import eps_text, parse_eps

PGD_ONLY_FLAG = 0.002  # share of images that only PGD broke from which a stronger chain's row is flagged

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Datasets of a suite that are averaged.

    Attributes:
        name: column `dataset` of the row.
        results: of one model in one contest, one for each dataset.
    """

    name: str
    results: Sequence[Result]


def of_result(result: Result, suite: Suite, metric: Metric, pgd_only: int | None) -> Row:
    """The row of one result.

    Args:
        result: counts and configuration.
        suite: the table's.
        metric: of the dataset's makers.
        pgd_only: images that plain PGD broke and this chain did not; None where that is not known.
    """
    outcome, config = result.outcome, result.config
    n, robust = outcome["n"], outcome["robust"]
    confidence = stop_rule.confidence(result.contest.stop_rule)
    flags = set(outcome["flags"])
    if pgd_only and pgd_only > PGD_ONLY_FLAG * n:
        flags.add("pgd-beats-chain")
    return {
        **_shared(result, suite),
        "dataset": result.dataset,
        "exposure": outcome["exposure"],
        "n": n,
        "n_classes": outcome["n_classes"],
        "subset_sha256": config["subset_sha256"],
        "canvas_px": config["canvas_px"],
        "threat_space": config["canvas"],
        "clean": _percent(outcome["clean_correct"] / n),
        **_limits("clean_", stats.wilson(outcome["clean_correct"], n, confidence)),
        **{columns.STAGE + stage: _percent(count / n) for stage, count in robust.items()},
        "robust": _percent(robust[result.stages[-1]] / n),
        **_limits("", stats.wilson(robust[result.stages[-1]], n, confidence)),
        **(_per_class(result) if metric == "mean-per-class" else {}),
        "metric": metric,
        "chance": _percent(outcome["majority"]),
        "pgd_only": "" if pgd_only is None else pgd_only,
        "flag": ";".join(sorted(flags)),
        "samples_sha256": outcome["verdicts_sha256"],
        "cell_sha256": result.content.sha256,
    }


def of_means(results: Sequence[Result], suite: Suite) -> Iterator[Row]:
    """The rows of the means over the results of one model in one contest."""
    for part in parts(results, suite):
        outcomes = [result.outcome for result in part.results]
        first, stages = part.results[0], part.results[0].stages
        after = {stage: [(o["robust"][stage], o["n"]) for o in outcomes] for stage in stages}
        clean = [(o["clean_correct"], o["n"]) for o in outcomes]
        confidence = stop_rule.confidence(first.contest.stop_rule)
        yield {
            **_shared(first, suite),
            "dataset": part.name,
            "n": sum(o["n"] for o in outcomes),
            "clean": _percent(_mean_share(clean)),
            **_limits("clean_", mean_interval.mean_interval(clean, confidence)),
            **{columns.STAGE + stage: _percent(_mean_share(counts)) for stage, counts in after.items()},
            "robust": _percent(_mean_share(after[stages[-1]])),
            **_limits("", mean_interval.mean_interval(after[stages[-1]], confidence)),
            **_sensitivity(after[stages[-1]]),
            "chance": _percent(sum(o["majority"] for o in outcomes) / len(outcomes)),
            "flag": ";".join(sorted({flag for o in outcomes for flag in o["flags"]})),
        }


def parts(results: Sequence[Result], suite: Suite) -> Iterator[Part]:
    """The parts of a suite that are averaged, as far as every dataset of a part has a result.

    A mean over fewer datasets would be the mean of another suite. `mean:unseen` averages the datasets that
    the model was not trained on, where that is neither none of them nor all.
    """
    by_dataset = {result.dataset: result for result in results}
    members: dict[str, Sequence[str]] = {"mean": suite.datasets}
    members |= {f"mean:{name}": datasets for name, datasets in suite.means.items()}
    if all(name in by_dataset for name in suite.datasets):
        unseen = [name for name in suite.datasets if by_dataset[name].outcome["exposure"] == "unseen"]
        if unseen and len(unseen) < len(suite.datasets):
            members["mean:unseen"] = unseen
    for name, datasets in members.items():
        if all(dataset in by_dataset for dataset in datasets):
            yield Part(name, [by_dataset[dataset] for dataset in datasets])


def _shared(result: Result, suite: Suite) -> Row:
    """What the row of a result and the row of a mean over it have in common."""
    config, model = result.config, result.content.model
    return {
        "schema_version": columns.SCHEMA,
        "suite": suite.name,
        "suite_version": suite.version,
        **_model(model, config["model_sha256"]),
        **result.contest.columns,
        "attack_version": config["attack_version"],
        "metric": "top1",
        "status": "measured",
    }


def _per_class(result: Result) -> Row:
    clean, robust = verdicts.per_class(result.verdicts())
    return {"clean_per_class": _percent(clean), "robust_per_class": _percent(robust)}


def _model(facts: Mapping[str, Any], sha256: str) -> Row:
    return {
        "model_id": facts["id"],
        "checkpoint_sha256": sha256,
        "defense": facts["defense"],
        "arch": facts["arch"],
        "params_m": f"{facts['parameters'] / 1e6:.3f}",
        "train_norm": facts["train_norm"],
        "train_eps": _radius(facts["train_eps"], facts["train_norm"]),
    }


def _radius(typed: object, norm: str) -> str:
    """The training radius of a recipe, spelled as all radii are; one that cannot be read stays as it is."""
    try:
        return eps_text(norm, parse_eps(str(typed), norm)) if typed else ""
    except InputError:
        return str(typed)


def _mean_share(counts: Sequence[tuple[int, int]]) -> float:
    """Unweighted mean of (hits, n)."""
    return sum(hits / n for hits, n in counts) / len(counts)


def _limits(prefix: str, interval: Interval) -> Row:
    return {f"{prefix}ci_low": _percent(interval.low), f"{prefix}ci_high": _percent(interval.high)}


def _sensitivity(counts: Sequence[tuple[int, int]]) -> Row:
    """How far the mean moves when one dataset is left out; empty for a single one."""
    if len(counts) < 2:
        return {}
    low, high = mean_interval.leave_one_out(counts)
    return {"leave_one_out_low": _percent(low), "leave_one_out_high": _percent(high)}


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
