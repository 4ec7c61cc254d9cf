"""Findings for people: one Markdown page with what was asked, what came out, and what a paper claims."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from robustbench_vlm.results.stats import Mean
from robustbench_vlm.studies.findings import SEEN, UNSEEN, VAL, WHATS, Findings, geometric, median

PLACES = {VAL: "val probe", SEEN: "seen test", UNSEEN: "unseen test"}
MEASURES = {"robust": (SEEN, "robust"), "zeroshot": (UNSEEN, "clean")}
OURS = {
    "robust": "robust accuracy on the seen test set, points above the baseline",
    "zeroshot": "clean accuracy on the unseen test sets, points above the baseline",
    "speed": "baseline's steps to its own last robust accuracy over the arm's; in time in brackets",
}


def markdown(findings: Findings) -> bytes:
    """The page; numbers are those of the CSV files beside it."""
    parts = [_head(findings), _accuracies(findings), _differences(findings)]
    if findings.study.curves:
        parts += [_way(findings), [f"![curves]({findings.study.name}.svg)"]]
    if findings.study.claim:
        parts.append(_claims(findings))
    parts.append(_notes(findings))
    return ("\n\n".join("\n".join(lines) for lines in parts) + "\n").encode()


def _head(findings: Findings) -> list[str]:
    study, first = findings.study, findings.of(findings.study.baseline)[0]
    optim, probe = first.run.recipe.optim, study.probe
    inner = first.run.recipe.inner
    ball = f" at {inner.threat}" if inner else ""
    fewer = f" --seeds {len(findings.seeds)}" if len(findings.seeds) < len(study.seeds) else ""
    files = [f"`{study.name}.csv`", *([f"`{study.name}-summary.csv`"] if study.curves else [])]
    return [
        f"# {study.title}",
        "",
        f"Made by `vlmrob study {study.name}{fewer}`; the numbers are in {' and '.join(files)}.",
        f"{len(study.arm)} arms, {_count(len(findings.seeds), 'seed')} each: {optim.steps} steps of batch "
        f"{optim.batch_size}, all from `{first.run.recipe.student}`; runs of one seed see the same images in",
        f"the same order. Probe: PGD-{probe.steps}{ball} on {probe.n} images of {probe.split}, every "
        f"{probe.every} steps. Final attack: `{study.final.attack}` on suite `{study.final.suite}`,",
        f"{study.final.n} images a set; unseen is the mean over {_count(len(first.datasets(UNSEEN)), 'set')} "
        "that no model met in training, a teacher or the start included. Brackets are 95 % t",
        "intervals over seeds.",
    ]


def _accuracies(findings: Findings) -> list[str]:
    """Means over seeds."""
    columns = ["arm", "", *(f"{PLACES[p]}, {what}" for p in findings.places for what in WHATS)]
    rows = [
        [arm.name, arm.title, *(_mean(findings.mean(arm.name, p, w)) for p in findings.places for w in WHATS)]
        for arm in findings.study.arm
    ]
    return ["## Accuracy at the end, %", "", *_table(columns, rows)]


def _differences(findings: Findings) -> list[str]:
    """Paired differences from the baseline."""
    study, places = findings.study, findings.places
    columns = ["arm", *(f"{PLACES[p]}, {what}" for p in places for what in WHATS)]
    tested = [(place, what) for place in places if place != VAL for what in WHATS]
    columns += [f"p, {PLACES[p]}, {what}" for p, what in tested]
    rows = []
    for arm in study.arm:
        if arm.name == study.baseline:
            continue
        row = [arm.name, *(_mean(findings.difference(arm.name, p, w), "+") for p in places for w in WHATS)]
        row += [", ".join(f"{p:.2g}" for p in findings.p_values(arm.name, *test)) for test in tested]
        rows.append(row)
    return [
        f"## Points above `{study.baseline}`, seed by seed",
        "",
        "p: exact McNemar test of the verdicts, one for each seed, on the images of all sets together.",
        "",
        *_table(columns, rows),
    ]


def _way(findings: Findings) -> list[str]:
    """Steps and time to the baseline's last accuracy."""
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
                arm.name,
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
        f"Target: the robust val accuracy at the end of the `{baseline}` run of the same seed. Steps:",
        "where the curve, linear between probes, first is there. The same rule holds for the baseline",
        "itself, and a speed-up is its steps over the arm's: geometric mean with its interval, or, where a",
        "seed never got there, the median with that seed as 0. The last column puts the baseline's whole",
        "run in the place of its own first crossing, which flatters every arm: the baseline's own line",
        "says by how much.",
        "",
        *_table(columns, rows),
    ]


def _ratio(ratios: Sequence[float | None]) -> str:
    """`1.20x [1.05, 1.37]`; with a seed that never got there the median, which says so."""
    mean = geometric(ratios)
    if mean is not None:
        return _mean(mean).replace(" [", "x [") if "[" in _mean(mean) else f"{_mean(mean)}x"
    return _middle(ratios, " (median)")


def _middle(ratios: Sequence[float | None], words: str = "") -> str:
    """The median with what was never reached as 0."""
    middle = median(ratios, 0.0)
    return f"{middle:.2f}x{words}" if middle else "never"


def _claims(findings: Findings) -> list[str]:
    """What the paper says beside what was measured, whatever it is."""
    study = findings.study
    arms = [arm.name for arm in study.arm if arm.name != study.baseline]
    rows = []
    for claim in study.claim:
        place, what = MEASURES.get(claim.measure, (VAL, ""))
        if place not in findings.places:
            continue
        ours = []
        for name in arms:
            if claim.measure == "speed":
                steps, timed = (_ratio(findings.speedups(name, timed=timed)) for timed in (False, True))
                ours.append(f"{steps} ({timed})")
            else:
                ours.append(_mean(findings.difference(name, place, what), "+"))
        rows.append([claim.words, claim.source, OURS[claim.measure], *ours])
    return [
        "## What the paper claims, and what was found here",
        "",
        "Other models, other data, another budget: these runs neither confirm nor refute the paper's",
        "numbers, which stand here so that nobody has to look them up.",
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
        f"- Highest mean robust accuracy on val, which alone may choose: `{best.name}`.",
        f"- {_count(compared, 'arm')} held against one baseline: no interval is corrected for that.",
    ]
    if study.curves:
        lines += [
            f"- Time is {' and '.join(clocks)} time of training steps without probes, as a ratio to the",
            "  baseline of the same seed; seconds on the machine at hand are in",
            f"  `{study.name}-seconds.csv`. That file, the ratios of time here and the right half of the",
            "  plot are measurements, which no second run repeats to the byte. All else is a function of",
            "  recipes and verdicts.",
        ]
    return [*lines, *(f"- {note}" for note in study.notes)]


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
