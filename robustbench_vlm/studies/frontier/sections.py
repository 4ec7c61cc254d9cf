"""What the pages of a frontier study say, section by section; `files` writes it as Markdown and as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from robustbench_vlm import store
from robustbench_vlm.cards.study import Measurement, Rule
from robustbench_vlm.results import stats
from robustbench_vlm.results.stats import Mean
from robustbench_vlm.studies.frontier import choice, compared_sections, fronts, resampling
from robustbench_vlm.studies.frontier.choice import Candidate
from robustbench_vlm.studies.frontier.compared import compared
from robustbench_vlm.studies.frontier.outcomes import KINDS, SEEN, UNSEEN
from robustbench_vlm.studies.frontier.parts import (
    COMMAND,
    Cell,
    Section,
    interval,
    mean_interval,
)
from robustbench_vlm.studies.frontier.report import Report

CLEAN_LEVELS = (70.0, 75.0, 80.0, 85.0, 90.0)
"""Clean accuracies, in points, at which the table of fronts reads robust accuracy."""


def sections(report: Report) -> Iterator[Section]:
    """All sections, in their order."""
    pairs = [compared(report, comparison) for comparison in report.study.comparison]
    known = [pair for pair in pairs if pair is not None]
    if known:
        yield compared_sections.in_short(known)
    yield _rule(report)
    if known:
        yield compared_sections.how(report)
    yield from compared_sections.comparisons(known)
    if known and report.study.claim:
        yield compared_sections.claims(report, known[0])
    yield _chosen(report)
    yield _fronts(report)
    if known:
        yield compared_sections.speeds(report, known)
    yield from _finals(report)
    yield _trials(report)


def words_of(rule: Rule) -> str:
    """The rule in a sentence."""
    if rule.highest == "mean":
        what = "the highest mean of clean and robust accuracy"
    else:
        other = "clean" if rule.highest == "robust" else "robust"
        what = f"the highest {rule.highest} accuracy among those with at least {rule.floor:g} % {other}"
    return f"{what} on the validation images, with the first seed; of equals the first in the order of trials"


def _rule(report: Report) -> Section:
    study = report.study
    done = sum(one.complete(len(study.interpolation)) for one in report.tried)
    judged = sum(len({c.trial.number for c in one.candidates}) for one in report.tried)
    numbers = ", ".join(f"{one.method.name} {len(one.trials)}" for one in report.tried)
    shares = ", ".join(f"{share:g}" for share in study.interpolation)
    every = [trial for one in report.tried for trial in one.trials]
    steps = _one_of(trial.recipe.optim.steps for trial in every)
    sizes = _one_of(trial.recipe.optim.batch_size for trial in every)
    starts = _one_of(trial.start for trial in every)
    tested = "No test image is attacked in this study."
    if study.test:
        tested = "Test images are attacked for what the rule chooses alone"
        fronts_too = any(test.of == "front" for test in study.test)
        tested += ", and for what lies on the validation fronts of compared methods." if fronts_too else "."
    lines = [
        f"Operating point of a method: {words_of(study.rule)}. The rule was written down on "
        f"{study.rule.fixed}, before a model of this study was tested. {tested}",
        f"Trials a method: {numbers}. {judged} of {sum(len(one.trials) for one in report.tried)} are done, "
        f"and {done} of {len(report.tried)} methods are complete. Every training has {steps} steps of "
        f"{sizes} images from {starts}, and gives a model for each interpolation of trained and initial "
        f"weights ({shares}; WiSE-FT, arXiv:2109.01903).",
        f"Validation: {study.validation.attack} on suite {study.validation.suite}. So far "
        f"{report.hours():.1f} hours of one core: processor time of training steps, and measurements by the "
        "clock.",
    ]
    if report.hidden:
        lines.append(f"{report.hidden} test outcomes of trials that the rule does not choose are not shown.")
    return Section("The rule", tuple(lines))


def _one_of(values: Iterable[object]) -> str:
    """Values that differ, in words: `100`, `100 or 200`."""
    return " or ".join(map(str, dict.fromkeys(values)))


def _chosen(report: Report) -> Section:
    """Operating points: hyperparameters, validation and test accuracies, and the gap between the two."""
    study, test = report.study, report.test
    columns = ["method", "hyperparameters", "interpolation", "seeds, val", "val clean", "val robust"]
    columns += [
        "seeds, test",
        "seen clean",
        "seen robust",
        "unseen clean",
        "unseen robust",
        "seen minus val, robust",
    ]
    rows = []
    for one in report.tried:
        name = one.method.name
        if name not in report.made:
            judged = [candidate.trial.number for candidate in one.candidates]
            left = sum(judged.count(trial.number) < len(study.interpolation) for trial in one.trials)
            words = f"{left} of {len(one.trials)} trials to do" if left else "no trial reaches the floor"
            rows.append((Cell(name), Cell(words), *[Cell("")] * (len(columns) - 2)))
            continue
        best = report.made[name]
        means = _means(report, name, study.validation, "")
        cells = [Cell(name), Cell(" ".join(best.trial.settings), f"#{anchor(best)}"), Cell(f"{best.share:g}")]
        cells.append(Cell(str(len(report.seeds([best], study.validation)))))
        cells += [Cell(mean_interval(mean)) for mean in means]
        cells.append(Cell(str(len(report.seeds([best], test))) if test else ""))
        gap = ""
        for part in (SEEN, UNSEEN):
            tested = _means(report, name, test, part) if test else None
            cells += [Cell("" if tested is None else mean_interval(mean)) for mean in tested or (None, None)]
            if part == SEEN and tested is not None and means[1] is not None and tested[1] is not None:
                gap = f"{tested[1].value - means[1].value:+.1f}"
        rows.append((*cells, Cell(gap)))
    words = f"Test: {test.attack} on suite {test.suite}, {_n(test.n)}. " if test else ""
    lines = (f"{words}Brackets are 95 % t intervals over seeds, where there are at least two.",)
    return Section("Operating points, %", lines, tuple(columns), tuple(rows))


def _n(n: int) -> str:
    return f"{n} images a set" if n else "all images"


def _means(report: Report, name: str, measurement: Measurement, part: str) -> list[Mean | None]:
    """Clean and robust accuracy of the chosen models, over seeds."""
    models = report.of_chosen(name, measurement, part)
    if models is None:
        return [None, None]
    values = models.of_seeds()[:, 0]
    return [stats.t_mean([float(value) for value in values[:, kind]]) for kind in range(2)]


def _fronts(report: Report) -> Section:
    """The validation fronts of all methods: hypervolume, height, hyperparameters."""
    study = report.study
    columns = (
        "method",
        "trials",
        "hypervolume",
        *(f"from {level:g} % clean" for level in CLEAN_LEVELS),
    )
    columns = (*columns, "hyperparameters on the front")
    rows = []
    for one in report.tried:
        if not one.candidates:
            continue
        models = report.models(one.candidates, study.seeds[:1], study.validation)
        assert models is not None  # it has candidates
        volume, *at = resampling.estimates([models], lambda points: _heights(points[0], study.reference))
        own = [one.candidates[i] for i in choice.on_front(one)]
        hyperparameters = "; ".join(f"{' '.join(c.trial.settings)} x{c.share:g}" for c in own)
        trials = len({c.trial.number for c in one.candidates})
        cells = [one.method.name, f"{trials} of {len(one.trials)}", interval(volume, "")]
        rows.append(tuple(map(Cell, (*cells, *(interval(e, "") for e in at), hyperparameters))))
    x, y = study.reference
    lines = (
        "The Pareto front of a method is over all of its trials and interpolations, on validation images, "
        "with one seed: the intervals are over images alone, and a front of many points is somewhat too "
        "high, since the best of noisy points are on it. Robust accuracy is read at equal clean accuracy, "
        f"linear between neighbours and never beyond the highest. The hypervolume is measured from {x:g} % "
        f"clean and {y:g} % robust accuracy, in squared points.",
    )
    picture = f"{store.file_name(study.name)}.svg"
    return Section("Fronts on validation images", lines, columns, tuple(rows), picture)


def _heights(points: np.ndarray, reference: tuple[float, float]) -> list[float]:
    """The hypervolume of points, and robust accuracy at each of `CLEAN_LEVELS`."""
    own = fronts.front(points)
    return [
        fronts.hypervolume(own, reference),
        *(fronts.at_equal(own, fronts.CLEAN, level) for level in CLEAN_LEVELS),
    ]


def _finals(report: Report) -> Iterator[Section]:
    """Further tests of the chosen models, one section each."""
    for test in report.study.test:
        if test == report.test or test.of == "front":
            continue
        rows = []
        for name in report.made:
            seeds = report.seeds([report.made[name]], test)
            if not seeds:
                continue
            cells = [name, str(len(seeds))]
            for part in (SEEN, UNSEEN):
                cells += [mean_interval(mean) for mean in _means(report, name, test, part)]
            rows.append(tuple(map(Cell, cells)))
        where = f" of {', '.join(test.datasets)}" if test.datasets else f" of suite {test.suite}"
        columns = ("method", "seeds", *(f"{part} {kind}" for part in (SEEN, UNSEEN) for kind in KINDS))
        if rows:
            yield Section(f"{test.attack}, {_n(test.n)}{where}, %", (), columns, tuple(rows))


def _trials(report: Report) -> Section:
    """Every trial at every interpolation, with the command that makes it."""
    rows = []
    for one in report.tried:
        if not one.candidates:
            continue
        own = choice.on_front(one)
        for index, candidate in enumerate(one.candidates):
            picked = report.made.get(one.method.name) == candidate
            marks = [*(["front"] if index in own else []), *(["chosen"] if picked else [])]
            cells = [
                Cell(f"{one.method.name} {candidate.trial.number}", anchor=anchor(candidate)),
                Cell(" ".join(candidate.trial.settings)),
                Cell(f"{candidate.share:g}"),
                Cell(f"{candidate.clean:.1f}"),
                Cell(f"{candidate.robust:.1f}"),
                Cell(f"{choice.value(report.study.rule, candidate):.2f}"),
                Cell(", ".join(marks)),
                Cell(candidate.trial.command(candidate.share, report.study), code=True),
            ]
            rows.append(tuple(cells))
    columns = ("trial", "hyperparameters", "interpolation", "val clean", "val robust", "rule", "", COMMAND)
    return Section("All trials", (), columns, tuple(rows))


def anchor(candidate: Candidate) -> str:
    """The name of a candidate's row in the page."""
    return f"{candidate.trial.method}-{candidate.trial.number}-{candidate.share:g}".replace(".", "_")
