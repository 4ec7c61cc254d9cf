"""What the pages of a frontier study say of its comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from robustbench_vlm.results import stats
from robustbench_vlm.results.stats import Mean
from robustbench_vlm.studies.frontier import curves, resampling
from robustbench_vlm.studies.frontier.compared import LEAST, VALIDATION, Compared
from robustbench_vlm.studies.frontier.outcomes import KINDS, SEEN, UNSEEN
from robustbench_vlm.studies.frontier.parts import Cell, Section, interval, p_value, ratio
from robustbench_vlm.studies.frontier.report import Report

MEASURES = {"robust": (SEEN, "robust"), "zeroshot": (UNSEEN, "clean")}
"""What a claim of a paper is compared with: part of the test, kind of accuracy."""


def in_short(pairs: Sequence[Compared]) -> Section:
    """A sentence and a row for each comparison: the fronts at equal accuracy, as far as they share any."""
    shown = [
        (part, equal)
        for part in (SEEN, UNSEEN, VALIDATION)
        for equal in KINDS
        if any((one.part, one.equal) == (part, equal) for pair in pairs for one in pair.statements)
    ]
    rows = []
    for pair in pairs:
        found = {(one.part, one.equal): one for one in pair.statements}
        cells = [interval(found[key].estimate) if key in found else "" for key in shown]
        rows.append(tuple(map(Cell, (pair.comparison.title, *cells))))
    columns = tuple(f"{part}: {_other(equal)} at equal {equal}" for part, equal in shown)
    lines = (
        *map(_sentence, pairs),
        *(["Points of accuracy, the first method minus the second."] if shown else []),
    )
    return Section("In short", lines, ("comparison", *columns), tuple(rows))


def _other(kind: str) -> str:
    return KINDS[1 - KINDS.index(kind)]


def _sentence(pair: Compared) -> str:
    """Where the front of A lies above or below that of B, by p-values adjusted for the comparison."""
    adjusted = stats.holm([one.estimate.p for one in pair.statements])
    signs: dict[str, set[int]] = {}
    for one, p in zip(pair.statements, adjusted, strict=True):
        if one.equal:
            sign = int(math.copysign(1, one.estimate.value)) if p < stats.LEVEL else 0
            signs.setdefault(one.part, set()).add(sign)
    words = {
        f"lies above that of {pair.b} on": [part for part, own in signs.items() if own in ({1}, {0, 1})],
        f"lies below that of {pair.b} on": [part for part, own in signs.items() if own in ({-1}, {-1, 0})],
        f"crosses that of {pair.b} on": [part for part, own in signs.items() if {-1, 1} <= own],
        f"cannot be told from that of {pair.b} on": [part for part, own in signs.items() if own == {0}],
    }
    said = [f"{verb} {_listed(parts)} images" for verb, parts in words.items() if parts]
    if not said:
        return (
            f"{pair.comparison.title}: the fronts of {pair.a} and {pair.b} share too little for a statement."
        )
    return f"{pair.comparison.title}: the front of {pair.a} {', and '.join(said)}."


def _listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def how(report: Report) -> Section:
    """What the tables of the comparisons have in common."""
    over = "the interpolations of the chosen trial"
    if report.front and report.front.of == "front":
        over = "what lies on the method's validation front"
    tested = f"On test images it is that of {over}; on" if report.test else "On"
    lines = (
        f"Intervals (95 %) and p-values come from {resampling.DRAWS} draws of seeds and images together; "
        "with two seeds they are little more than those of the images. p is adjusted within a table (Holm).",
        "A front is linear between neighbours, and it is never read beyond its ends. "
        f"{tested} validation images it is that of all trials of the method, with one seed. A difference at "
        "equal accuracy is the mean over the accuracies that both fronts reach; where they share less than "
        f"{LEAST:g} point, there is no statement.",
    )
    return Section("How methods are compared", lines)


def comparisons(pairs: Sequence[Compared]) -> Iterator[Section]:
    """What is said of A against B, a section for each comparison."""
    for pair in pairs:
        lines = (f"A is {pair.a}, B is {pair.b}.",)
        adjusted = stats.holm([statement.estimate.p for statement in pair.statements])
        rows = tuple(
            (
                Cell(statement.what),
                Cell(statement.part),
                Cell(str(statement.seeds)),
                Cell(str(statement.images)),
                Cell(interval(statement.estimate)),
                Cell(p_value(statement.estimate.p)),
                Cell(p_value(p)),
            )
            for statement, p in zip(pair.statements, adjusted, strict=True)
        )
        columns = ("A minus B, points", "sets", "seeds", "images", "difference", "p", "p, Holm")
        yield Section(pair.comparison.title, lines, columns, rows)


def claims(report: Report, pair: Compared) -> Section:
    """The paper's numbers beside the differences at the operating points."""
    rows, p_values = [], []
    for claim in report.study.claim:
        if claim.measure == "speed":
            found = _speed(report, pair)
            rows.append([claim.words, claim.source, f"steps to B's last robust accuracy: {found}"])
            p_values.append(math.nan)
            continue
        part, kind = MEASURES[claim.measure]
        estimates = [
            one.estimate for one in pair.statements if (one.part, one.kind, one.equal) == (part, kind, "")
        ]
        text = interval(estimates[0]) if estimates else "not measured"
        rows.append([claim.words, claim.source, f"{kind} accuracy on {part} sets: {text}"])
        p_values.append(estimates[0].p if estimates else math.nan)
    cells = tuple(
        (*map(Cell, row), Cell(p_value(p))) for row, p in zip(rows, stats.holm(p_values), strict=True)
    )
    lines = (
        f"{pair.a} against {pair.b}, each at its operating point. The paper has other models, other data and "
        "another budget: these runs neither confirm nor refute its numbers.",
    )
    columns = ("the paper says", "where", "found here", "p, Holm")
    return Section("What the paper claims", lines, columns, cells)


def speeds(report: Report, pairs: Sequence[Compared]) -> Section:
    """How soon A is where B ends, for every comparison."""
    rows = []
    for pair in pairs:
        for speed in _pair_speeds(report, pair):
            cells = (pair.comparison.title, speed.kind, f"{speed.level:.1f}", str(speed.reached))
            found = (_speed_up(speed, speed.steps), _speed_up(speed, speed.time))
            rows.append(tuple(map(Cell, (*cells, *found))))
    lines = [
        "Steps of the second method to an accuracy on the probe images over those of the first, from runs of "
        "one seed, with the chosen hyperparameters and all of the trained weights. Levels are shares of the "
        "second method's last accuracy. A level is reached at the step from which the curve stays above it. "
        "`never lost`: one of the two is above the level at every probe. Time is processor time of training "
        "steps.",
    ]
    if not all(_one_radius(report, pair) for pair in pairs):
        lines += [
            "Robust accuracies are left out where the two were trained at two radii: a probe attacks at the "
            "radius of its training."
        ]
    columns = ("comparison", "accuracy", "level, %", "seeds that reach it", "speed-up in steps", "in time")
    return Section("How soon", tuple(lines), columns, tuple(rows))


def _speed_up(speed: curves.Speed, mean: Mean | None) -> str:
    return "never lost" if speed.held else ratio(mean)


def _speed(report: Report, pair: Compared) -> str:
    if not _one_radius(report, pair):
        return "not comparable: their probes attack at two radii"
    robust = [speed for speed in _pair_speeds(report, pair) if speed.kind == "robust"]
    return _speed_up(robust[-1], robust[-1].steps)  # the last level is B's last accuracy


def _one_radius(report: Report, pair: Compared) -> bool:
    """Whether both contenders were trained at one radius, which is the one that their probes attack at."""
    a, b = (report.made[name].trial.recipe.inner for name in (pair.a, pair.b))
    return a is not None and b is not None and a.threat == b.threat


def _pair_speeds(report: Report, pair: Compared) -> list[curves.Speed]:
    validation = report.study.validation
    ends = [replace(report.made[name], share=1.0) for name in (pair.a, pair.b)]
    both = [report.seeds([end], validation) for end in ends]
    seeds = [seed for seed in both[0] if seed in both[1]]
    own, other = ([report.outcome(end, seed, validation) for seed in seeds] for end in ends)
    return curves.speeds(own, other, ("robust", "clean") if _one_radius(report, pair) else ("clean",))
