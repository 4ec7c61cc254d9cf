"""The Markdown page of a study: what was asked, what came out, and what a paper claims."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from urllib.parse import quote

from robustbench_vlm import safe_text, store
from robustbench_vlm.results.stats import Mean
from robustbench_vlm.safe_text import code
from robustbench_vlm.studies import levels
from robustbench_vlm.studies.findings import KINDS, MEASURES, SEEN, UNSEEN, VAL, Findings, geometric, median

PART_TITLES = {VAL: "val probe", SEEN: "seen test", UNSEEN: "unseen test"}
OURS = {
    "robust": "robust accuracy on the seen test set, points above the baseline",
    "zeroshot": "clean accuracy on the unseen test sets, points above the baseline",
    "speed": "baseline's steps to its own last robust accuracy over the arm's; in time in brackets",
}


def markdown(findings: Findings) -> bytes:
    """The page; numbers are those of the CSV files beside it."""
    parts = [_head(findings), _accuracies(findings), _differences(findings), _over_images(findings)]
    if findings.study.curves:
        picture = f"![curves]({quote(store.file_name(findings.study.name))}.svg)"
        parts += [_speed(findings), _levels(findings), [picture]]
    if findings.study.claim:
        parts.append(_claims(findings))
    parts.append(_notes(findings))
    return ("\n\n".join("\n".join(lines) for lines in parts) + "\n").encode()


def _head(findings: Findings) -> list[str]:
    study, first = findings.study, findings.of(findings.study.baseline)[0]
    optim, probe = first.run.recipe.optim, study.probe
    inner, student = first.run.recipe.inner, code(first.run.recipe.student)
    split = safe_text.markdown(probe.split)
    ball = f" at {inner.threat}" if inner else ""
    fewer = f" --seeds {len(findings.seeds)}" if len(findings.seeds) < len(study.seeds) else ""
    stem = store.file_name(study.name)
    files = [code(f"{stem}.csv"), *([code(f"{stem}-summary.csv")] if study.curves else [])]
    return [
        f"# {safe_text.markdown(study.title)}",
        "",
        f"Made by {code(f'vlmrob study {study.name}{fewer}')}; the numbers are in {' and '.join(files)}.",
        f"{len(study.arm)} arms, {_count(len(findings.seeds), 'seed')} each: {optim.steps} steps of batch "
        f"{optim.batch_size}, all from {student}; runs of one seed see the same images in",
        f"the same order. Probe: PGD-{probe.steps}{ball} on {probe.n} images of {split}, every "
        f"{probe.every} steps. Final attack: {code(study.final.attack)} on suite {code(study.final.suite)},",
        f"{study.final.n} images a set; unseen is the mean over {_count(len(first.datasets(UNSEEN)), 'set')} "
        "that no model met in training, a teacher or the start included. Brackets are 95 % t",
        "intervals over seeds.",
    ]


def _accuracies(findings: Findings) -> list[str]:
    """Mean accuracies over seeds."""
    columns = ["arm", "", *(f"{PART_TITLES[p]}, {kind}" for p in findings.parts for kind in KINDS)]
    accuracies = {
        arm.name: [_mean(findings.mean(arm.name, p, k)) for p in findings.parts for k in KINDS]
        for arm in findings.study.arm
    }
    rows = [
        [*map(safe_text.markdown, (arm.name, arm.title)), *accuracies[arm.name]] for arm in findings.study.arm
    ]
    return ["## Accuracy at the end, %", "", *_table(columns, rows)]


def _differences(findings: Findings) -> list[str]:
    """Differences from the baseline, paired by seed."""
    study, parts = findings.study, findings.parts
    columns = ["arm", *(f"{PART_TITLES[p]}, {kind}" for p in parts for kind in KINDS)]
    tested = [(part, kind) for part in parts if part != VAL for kind in KINDS]
    columns += [f"p, {PART_TITLES[p]}, {kind}" for p, kind in tested]
    rows = []
    for arm in study.arm:
        if arm.name == study.baseline:
            continue
        row = [safe_text.markdown(arm.name)]
        row += [_mean(findings.difference(arm.name, p, k), "+") for p in parts for k in KINDS]
        row += [", ".join(f"{p:.2g}" for p in findings.p_values(arm.name, *test)) for test in tested]
        rows.append(row)
    return [
        f"## Points above `{study.baseline}`, seed by seed",
        "",
        "p: exact McNemar test of the verdicts, one for each seed, on the images of all sets together.",
        "",
        *_table(columns, rows),
    ]


def _over_images(findings: Findings) -> list[str]:
    """Differences from the baseline with intervals over seeds and images together."""
    study = findings.study
    tested = [(part, kind) for part in findings.parts if part != VAL for kind in KINDS]
    rows = [
        [
            safe_text.markdown(arm.name),
            *(_mean(levels.over_images(findings, arm.name, *test), "+") for test in tested),
        ]
        for arm in study.arm
        if arm.name != study.baseline
    ]
    return [
        f"## Points above `{study.baseline}`, intervals over seeds and images",
        "",
        "The t intervals above hold for these very images. Here seeds and images are drawn anew together",
        "(pigeonhole bootstrap, 2.5 % to 97.5 % of its draws), so these hold for other images of the same",
        "sets too.",
        "",
        *_table(["arm", *(f"{PART_TITLES[p]}, {kind}" for p, kind in tested)], rows),
    ]


def _speed(findings: Findings) -> list[str]:
    """How soon each arm has the baseline's last robust accuracy, in steps and in time."""
    study, baseline = findings.study, findings.study.baseline
    columns = ["arm", "reached", "steps, median", "speed-up in steps", "cost of a step", "speed-up in time"]
    columns.append("baseline's whole run over the arm's steps, median")
    rows = []
    for arm in study.arm:
        reached = findings.reach(arm.name)
        whole = [
            None if at is None else run.curve.steps[-1] / at
            for at, run in zip(reached, findings.of(baseline), strict=True)
        ]
        middle = median(reached, math.inf)
        rows.append(
            [
                safe_text.markdown(arm.name),
                f"{sum(at is not None for at in reached)} of {len(reached)}",
                "never" if math.isinf(middle) else f"{middle:.0f}",
                _ratio(findings.speedups(arm.name, timed=False)),
                _mean(findings.cost(arm.name)),
                _ratio(findings.speedups(arm.name, timed=True)),
                _middle(whole),
            ]
        )
    return [
        f"## Steps and time to the last robust accuracy of `{baseline}`",
        "",
        f"Target: the robust val accuracy at the end of the `{baseline}` run of the same seed. An arm",
        "reaches it at the step where its curve, taken as linear between probes, first crosses it; the",
        "same rule is applied to the baseline's own curve. A speed-up is the baseline's steps over the",
        "arm's: the geometric mean with its interval or, where a seed never reached the target, the",
        "median with 0 for that seed. The last column divides the baseline's whole run instead of its",
        "steps to the first crossing, which flatters every arm: the baseline's own row shows by how",
        "much.",
        "",
        *_table(columns, rows),
    ]


def _levels(findings: Findings) -> list[str]:
    """Speed-ups at fixed accuracies of the validation probe."""
    at = [(kind, level) for kind in KINDS for level in levels.levels(findings, kind)]
    rows = []
    for arm in findings.study.arm:
        row = [safe_text.markdown(arm.name)]
        for kind, level in at:
            steps, timed = (
                _ratio(levels.speedups(findings, arm.name, kind, level, timed=timed))
                for timed in (False, True)
            )
            row.append(f"{steps}; time {timed}")
        rows.append(row)
    title = "## Speed-ups at fixed accuracies of the val probe"
    if not at:
        return [title, "", f"No multiple of {levels.STEP} points is reached by every run of the baseline."]
    return [
        title,
        "",
        f"The steps of `{findings.study.baseline}` to an accuracy over those of the arm, and the same in",
        "time, by the rules of the table above. Every curve counts from its lowest probe on, since clean",
        "accuracy falls before it rises. The levels are the highest multiples of 5 that every run of the",
        "baseline reaches.",
        "",
        *_table(["arm", *(f"{kind} {level} %" for kind, level in at)], rows),
    ]


def _ratio(ratios: Sequence[float | None]) -> str:
    """`1.20x [1.05, 1.37]`; where a seed never reached the target, the median, marked as such."""
    mean = geometric(ratios)
    if mean is not None:
        return _mean(mean).replace(" [", "x [") if "[" in _mean(mean) else f"{_mean(mean)}x"
    return _middle(ratios, " (median)")


def _middle(ratios: Sequence[float | None], words: str = "") -> str:
    """The median, with 0 for a target that was never reached."""
    middle = median(ratios, 0.0)
    return f"{middle:.2f}x{words}" if middle else "never"


def _claims(findings: Findings) -> list[str]:
    """The paper's numbers beside ours."""
    study = findings.study
    arms = [arm.name for arm in study.arm if arm.name != study.baseline]
    rows = []
    for claim in study.claim:
        part, kind = MEASURES.get(claim.measure, (VAL, ""))
        if part not in findings.parts:
            continue
        ours = []
        for name in arms:
            if claim.measure == "speed":
                steps, timed = (_ratio(findings.speedups(name, timed=timed)) for timed in (False, True))
                ours.append(f"{steps} ({timed})")
            else:
                ours.append(_mean(findings.difference(name, part, kind), "+"))
        rows.append([*map(safe_text.markdown, (claim.words, claim.source)), OURS[claim.measure], *ours])
    return [
        "## What the paper claims, and what was found here",
        "",
        "These runs have other models, other data and another budget than the paper: they neither",
        "confirm nor refute its numbers, which are copied here for reference.",
        "",
        *_table(["paper", "where", "ours", *arms], rows),
    ]


def _notes(findings: Findings) -> list[str]:
    study = findings.study
    best = max(study.arm, key=lambda arm: findings.mean(arm.name, VAL, "robust").value)
    compared = len(study.arm) - 1
    clocks = sorted({run.clock for arm in study.arm for run in findings.of(arm.name)})
    lines = [
        "## Notes",
        "",
        f"- Highest mean robust accuracy on val, the only split that may choose an arm: `{best.name}`.",
        f"- {_count(compared, 'arm')} are compared with one baseline; no interval is corrected for that.",
    ]
    seconds = code(f"{store.file_name(study.name)}-seconds.csv")
    if study.curves:
        lines += [
            f"- Time is {' and '.join(clocks)} time of training steps without probes, as a ratio to the",
            "  baseline of the same seed; seconds on the machine that was used are in",
            f"  {seconds}. That file, the ratios of time here and the right half of the",
            "  plot are measurements, which no second run repeats to the byte. Everything else is a function",
            "  of recipes and verdicts.",
        ]
    return [*lines, *(f"- {safe_text.markdown(note)}" for note in study.notes)]


def _mean(mean: Mean, sign: str = "") -> str:
    """`42.1 [41.0, 43.2]`, with a sign where asked; without brackets from one seed."""
    if math.isnan(mean.low):
        return f"{mean.value:{sign}.2f}"
    return f"{mean.value:{sign}.2f} [{mean.low:{sign}.2f}, {mean.high:{sign}.2f}]"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
