"""Findings as tables: one with a row a probe, one with a row an arm, and one of seconds.

The first two are functions of verdicts and fingerprints: the same outcomes give the same bytes. Seconds are
measurements, which no second run repeats, so they have a table of their own.
"""

from __future__ import annotations

import math

import pandas as pd

from robustbench_vlm.results import leaderboard
from robustbench_vlm.results.stats import Mean
from robustbench_vlm.studies.findings import KINDS, VAL, Findings, geometric, median

Row = dict[str, str]

NEVER = "never"


def curve(findings: Findings) -> pd.DataFrame:
    """One row an arm, seed and probe: steps, images and accuracies in percent."""
    rows = [
        {
            "arm": run.run.arm,
            "seed": str(run.run.seed),
            "steps": str(step),
            "images": str(step * run.run.recipe.optim.batch_size),
            "clean": f"{clean:.2f}",
            "robust": f"{robust:.2f}",
            "recipe_sha256": run.run.recipe.fingerprint,
        }
        for arm in findings.study.arm
        for run in findings.of(arm.name)
        for step, clean, robust in zip(run.curve.steps, run.curve.clean, run.curve.robust, strict=True)
    ]
    return pd.DataFrame(rows, dtype=object)


def seconds(findings: Findings) -> pd.DataFrame:
    """One row an arm and seed: seconds of a step, that over the baseline's, and seconds to its accuracy."""
    rows = []
    for arm in findings.study.arm:
        reached = findings.reach(arm.name)
        for (run, base), at in zip(findings.pairs(arm.name), reached, strict=True):
            rows.append(
                {
                    "arm": arm.name,
                    "seed": str(run.run.seed),
                    "clock": run.clock,
                    "steps_timed": str(run.timed),
                    "seconds_per_step": f"{run.step_seconds:.5f}",
                    "over_baseline": f"{run.step_seconds / base.step_seconds:.4f}",
                    "seconds_to_target": NEVER if at is None else f"{at * run.step_seconds:.1f}",
                }
            )
    return pd.DataFrame(rows, dtype=object)


def summary(findings: Findings) -> pd.DataFrame:
    """One row an arm: means over seeds, paired differences from the baseline, and steps to its accuracy."""
    return pd.DataFrame([_row(findings, arm.name) for arm in findings.study.arm], dtype=object)


def _row(findings: Findings, name: str) -> Row:
    study = findings.study
    arm = next(arm for arm in study.arm if arm.name == name)
    row: Row = {
        "arm": name,
        "title": arm.title,
        "recipe": arm.recipe,
        "set": " ".join([*study.set, *arm.set]),
    }
    row |= {"attack": study.final.attack, "suite": study.final.suite, "n": str(study.final.n)}
    row["seeds"] = " ".join(map(str, findings.seeds))
    for part in findings.parts:
        for kind in KINDS:
            key = f"{part}_{kind}"
            row |= _interval(key, findings.mean(name, part, kind))
            paired = name != study.baseline
            row |= _interval(f"{key}_diff", findings.difference(name, part, kind) if paired else None)
            if part != VAL:
                tests = findings.p_values(name, part, kind) if paired else []
                row[f"{key}_p"] = " ".join(f"{p:.3g}" for p in tests)
    if study.curves:
        row |= _reach(findings, name)
    row["recipes_sha256"] = " ".join(run.run.recipe.fingerprint[:12] for run in findings.of(name))
    return row


def _reach(findings: Findings, name: str) -> Row:
    """How soon an arm has the baseline's last robust accuracy."""
    reached = findings.reach(name)
    ratios = findings.speedups(name, timed=False)
    return {
        "reached": str(sum(at is not None for at in reached)),
        "steps_to_target": " ".join(NEVER if at is None else f"{at:.1f}" for at in reached),
        "steps_to_target_median": _or_never(median(reached, math.inf)),
        "speedup_median": f"{median(ratios, 0.0):.3f}",
        **_interval("speedup", geometric(ratios), 3),
    }


def _or_never(steps: float) -> str:
    return NEVER if math.isinf(steps) else f"{steps:.1f}"


def _interval(key: str, mean: Mean | None, digits: int = 2) -> Row:
    """Value and limits as three fields; empty without a mean, and limits also where one seed has none."""
    values = (math.nan,) * 3 if mean is None else (mean.value, mean.low, mean.high)
    texts = ["" if math.isnan(value) else f"{value:.{digits}f}" for value in values]
    return dict(zip((key, f"{key}_low", f"{key}_high"), texts, strict=True))


def csv(table: pd.DataFrame) -> bytes:
    """The CSV: fixed columns, LF."""
    return leaderboard.csv(table)
