"""Work off a frontier study: all trials, then what the rule chose; the same command goes on if stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from robustbench_vlm import devices
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.study import Study
from robustbench_vlm.errors import InputError
from robustbench_vlm.evaluation import planning
from robustbench_vlm.studies import work_off
from robustbench_vlm.studies.frontier import choice, outcomes
from robustbench_vlm.studies.frontier.trials import Judging, TeacherRun, TrialTask, request
from robustbench_vlm.studies.task import Resources
from robustbench_vlm.training import prepare

Remark = Callable[[str], None]


@dataclass(frozen=True)
class Places:
    """Where a study keeps things.

    Attributes:
        out: folder of the trainings; may be deleted once all is done.
        tables: folder of outcomes and pages.
    """

    out: Path
    tables: Path


def perform(
    study: Study, places: Places, resources: Resources, remark: Remark, methods: Sequence[str] = ()
) -> None:
    """Train and judge what has no outcome yet.

    Args:
        study: the card.
        places: where.
        resources: what it is run with.
        remark: called with a line of log.
        methods: only these; empty: all.

    Raises:
        InputError: a recipe, model or dataset that cannot be used; found before the first training.
        VlmrobError: a trial failed; those beside it are stopped, and the same command goes on.
        Incomplete: a worker was killed.
    """
    for wanted in (_trials, _of_chosen):
        judgings = [one for one in wanted(study, places) if not methods or one.trial.method in methods]
        known = outcomes.read(outcomes.ledger(places.tables, study.name))
        tasks = _tasks(study, [one for one in judgings if one.id not in known])
        needed = {teacher.name: teacher for task in tasks for teacher in task.trial.needs}
        teachers = [one for one in needed.values() if not one.trained]
        check(tasks, teachers, resources)
        if teachers:
            _work_off(study, teachers, places, resources, remark)
            check(tasks, [], resources)  # the methods that waited for them
        _work_off(study, tasks, places, resources, remark)


def _trials(study: Study, places: Places) -> list[Judging]:
    """Every trial at every interpolation, on validation images."""
    return [
        Judging(trial, share, study.validation)
        for one in choice.tried(study, places.out, {})
        for trial in one.trials
        for share in study.interpolation
    ]


def _of_chosen(study: Study, places: Places) -> list[Judging]:
    known = outcomes.read(outcomes.ledger(places.tables, study.name))
    return choice.judgings_of_chosen(study, places.out, choice.tried(study, places.out, known))


def _tasks(study: Study, judgings: Sequence[Judging]) -> list[TrialTask]:
    """One task for each trial and measurement: first one measurement of all trials, then the next.

    So outcomes are recorded as soon as they are there, and the dearest attacks come last.
    """
    found: dict[tuple[int, Path], list[Judging]] = {}
    measurements = [study.validation, *study.test]
    for judging in judgings:
        place = (measurements.index(judging.measurement), judging.trial.folder)
        found.setdefault(place, []).append(judging)
    order = sorted(found, key=lambda place: place[0])  # stable: trials stay in their order
    return [TrialTask(found[place][0].trial, tuple(found[place])) for place in order]


def check(tasks: Sequence[TrialTask], teachers: Sequence[TeacherRun], resources: Resources) -> None:
    """Load once what every method needs, so that what cannot be used is found before the first training.

    Args:
        tasks: to do.
        teachers: to be trained before them; what needs one of them is not looked at yet.
        resources: what they are done with.

    Raises:
        InputError: see `perform`.
    """
    device = devices.choose_device(resources.device)
    firsts = {task.trial.method: task.trial for task in reversed(tasks)}.values()
    recipes = [one.recipe for one in teachers]
    recipes += [trial.recipe for trial in firsts if all(one.trained for one in trial.needs)]
    for recipe in recipes:
        prepare.prepare(recipe, resources.data_root, device)
    for measurement in {judging.measurement for task in tasks for judging in task.judgings}:
        plan = planning.plan(request(measurement, recipes[0].student, Path(), resources), device)
        if len(plan.settings.ladder) > 1:
            radii = " ".join(str(eps) for eps in plan.settings.ladder)
            do = "name a suite with one radius"
            raise InputError(f"study, suite {measurement.suite}", f"radii {radii}", "one radius", do)
        planning.require_data(plan)


def _work_off(
    study: Study,
    tasks: Sequence[TrialTask | TeacherRun],
    places: Places,
    resources: Resources,
    remark: Remark,
) -> None:
    path = outcomes.ledger(places.tables, study.name)
    remark(f"study {study.name}: {len(tasks)} trainings or measurements to do")
    begun = time.perf_counter()
    for done, (task, found, seconds) in enumerate(work_off.perform(tasks, resources), 1):
        outcomes.append(path, found)
        left = (time.perf_counter() - begun) / done * (len(tasks) - done)
        last = f"about {left / 60:.0f} min left" if done < len(tasks) else "that was the last"
        remark(f"{task.name}: done in {seconds:.0f} s; {done} of {len(tasks)}, {last}")


def state(study: Study, places: Places, methods: Sequence[str] = ()) -> list[list[str]]:
    """A row for each training that is needed: method, seed, trial, hyperparameters, and what is left."""
    known = outcomes.read(outcomes.ledger(places.tables, study.name))
    judgings: dict[Path, list[Judging]] = {}
    for judging in [*_trials(study, places), *_of_chosen(study, places)]:
        if not methods or judging.trial.method in methods:
            judgings.setdefault(judging.trial.folder, []).append(judging)
    rows = []
    for own in judgings.values():
        trial, ids = own[0].trial, {judging.id for judging in own}
        left = len(ids - known.keys())
        words = "done" if not left else f"{left} of {len(ids)} measurements to do"
        rows.append(
            [trial.method, str(trial.seed), str(trial.number), " ".join(trial.settings) or "none", words]
        )
    return rows


def datasets(study: Study, places: Places) -> list[str]:
    """Names of all datasets that a study trains or measures on."""
    trials = [judging.trial for judging in _trials(study, places)]
    recipes = [trial.recipe for trial in trials] + [one.recipe for trial in trials for one in trial.needs]
    trained = {recipe.data.dataset for recipe in recipes}
    measured = {name for one in (study.validation, *study.test) for name in reader.suite(one.suite).datasets}
    return sorted(trained | measured)
