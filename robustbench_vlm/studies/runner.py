"""Run a study: train every arm with every seed and attack each model; the same command goes on if stopped.

A run is named by the fingerprint of its recipe, so two studies with the same training share it. Each run is
done by a process of one thread: the number of processes changes the time that a study takes, never a number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from robustbench_vlm import devices, store
from robustbench_vlm.cards import overrides, plugins, reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.cards.recipe import Probe, Recipe
from robustbench_vlm.cards.study import Arm, Final, Study
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.errors import CardError, InputError
from robustbench_vlm.evaluation import planning
from robustbench_vlm.studies import work_off
from robustbench_vlm.studies.clock import Clock
from robustbench_vlm.studies.task import Resources
from robustbench_vlm.training import loop, prepare

Remark = Callable[[str], None]


@dataclass(frozen=True)
class StudyRun:
    """One arm with one seed.

    Attributes:
        arm: name of the arm.
        seed: of the recipe.
        recipe: the arm's, with seed and probe of the study.
        folder: gets `model/` (the checkpoint), `results/` (of the final attack), `clock.jsonl` (time of each
            step) and, once nothing is left to do, a list of its result files.
    """

    arm: str
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def name(self) -> str:
        """What progress lines and errors call this run."""
        return f"{self.arm}, seed {self.seed}"

    def cells(self, final: Final) -> Path:
        """The file that lists the result files of the final attack; written last of all."""
        chain = reader.read("attacks", final.attack, AttackCard)
        attack = chain.model_dump(mode="json", exclude={"plain_pgd"})  # younger than runs on disk
        suite = reader.read("suites", final.suite, Suite).model_dump(mode="json")
        known = {"attack": attack, "suite": suite, "n": final.n}
        return self.folder / f"cells-{store.file_name(final.attack)}-{store.fingerprint(known)[:12]}.json"


@dataclass(frozen=True)
class ArmTask:
    """Train one arm with one seed, and attack the model.

    Attributes:
        run: arm, seed, recipe and folder.
        final: the attack.
    """

    run: StudyRun
    final: Final

    @property
    def name(self) -> str:
        """What progress lines and errors call it."""
        return self.run.name

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.run.folder

    def perform(self, resources: Resources) -> None:
        """Do what is left of it."""
        run, done = self.run, self.run.cells(self.final)
        if done.exists():
            return
        device = devices.choose_device(resources.device)
        model = train(run.recipe, run.folder, resources)
        request = _request(str(model), self.final, resources.data_root, run.folder / "results")
        paths = planning.perform(planning.require_data(planning.plan(request, device)), lambda *_: None)
        store.write_json(done, [str(path.relative_to(run.folder)) for path in paths])


def train(recipe: Recipe, folder: Path, resources: Resources) -> Path:
    """Train a recipe into `folder`/model, with the time of each step in `folder`/clock.jsonl; the former."""
    device = devices.choose_device(resources.device)
    report: loop.Report = Clock(folder) if device.type == "cpu" else lambda _: None
    # a cache of its own: a run that reused teacher outputs of another would look cheaper than it is
    return loop.run(recipe, folder / "model", resources.data_root, device, report, folder / "teachers")


def resolved(where: str, recipe: str, settings: Sequence[str], seed: int, probe: Probe) -> Recipe:
    """A recipe card with settings, seed and probe.

    The card's notes are left out, so that a remark added there does not make another run of it.

    Args:
        where: what names the recipe, for messages.
        recipe: name of the recipe card, or a TOML file.
        settings: changes, each as `--set` takes them.
        seed: of the run.
        probe: replaces the recipe's own.

    Raises:
        CardError: no such recipe, or a setting that it does not take.
    """
    file = reader.path("recipes", recipe)
    table = reader.table("recipes", file)
    defense = table.get("defense")
    plugins.require_allowed(str(defense.get("name")) if isinstance(defense, dict) else "", where)
    table = overrides.override(table, list(settings))
    table |= {"seed": seed, "notes": (), "probe": probe.model_dump(mode="json")}
    return reader.shown_card("recipes", reader.parse(table, Recipe, where), file)


def recipe_of(study: Study, arm: Arm, seed: int) -> Recipe:
    """The recipe of one arm with one seed.

    Raises:
        CardError: see `resolved`.
    """
    where = f"study {study.name}, arm {arm.name}"
    return resolved(where, arm.recipe, [*study.set, *arm.set], seed, study.probe)


def runs(study: Study, out: Path, seeds: int | None = None) -> list[StudyRun]:
    """All runs of a study, seed by seed: a study that is stopped has complete pairs of its first seeds.

    Args:
        study: the card.
        out: folder of the runs.
        seeds: number of seeds, the study's first ones; default: all.

    Raises:
        CardError: see `recipe_of`; or two arms that are one recipe.
        InputError: more seeds than the study has.
    """
    if seeds is not None and seeds > len(study.seeds):
        raise InputError(f"--seeds {seeds}", f"study {study.name} has {len(study.seeds)} seeds")
    found: dict[str, StudyRun] = {}
    for seed in study.seeds[:seeds]:
        for arm in study.arm:
            recipe = recipe_of(study, arm, seed)
            first = found.get(recipe.fingerprint)
            if first is not None:
                raise CardError(f"study {study.name}", f"arms {first.arm} and {arm.name} are one recipe")
            folder = out / f"{store.file_name(recipe.name)}-s{seed}-{recipe.fingerprint[:12]}"
            found[recipe.fingerprint] = StudyRun(arm.name, seed, recipe, folder)
    return list(found.values())


def perform(study: Study, todo: Sequence[StudyRun], resources: Resources, remark: Remark) -> None:
    """Train and attack what is not finished yet.

    Raises:
        InputError: a recipe, model or dataset that cannot be used; found before the first run starts.
        VlmrobError: a run failed; runs beside it are stopped, and the same command goes on.
        Incomplete: a worker was killed.
    """
    waiting = [run for run in todo if not run.cells(study.final).exists()]
    remark(f"study {study.name}: {len(todo)} runs, {len(todo) - len(waiting)} finished")
    check(study, waiting, resources)
    begun = time.perf_counter()
    tasks = [ArmTask(run, study.final) for run in waiting]
    for done, (run, _, seconds) in enumerate(work_off.perform(tasks, resources), 1):
        left = (time.perf_counter() - begun) / done * (len(waiting) - done)
        last = f"about {left / 60:.0f} min left" if done < len(waiting) else "that was the last"
        remark(f"{run.name}: done in {seconds:.0f} s; {done} of {len(waiting)}, {last}")


def check(study: Study, todo: Sequence[StudyRun], resources: Resources) -> None:
    """Load once what every arm needs, so that what cannot be used is found before the first training.

    Raises:
        InputError: see `perform`.
    """
    device = devices.choose_device(resources.device)
    arms = {run.arm: run for run in reversed(todo)}
    for run in arms.values():
        prepare.prepare(run.recipe, resources.data_root, device)
    if arms:
        student = next(iter(arms.values())).recipe.student
        planning.require_data(
            planning.plan(_request(student, study.final, resources.data_root, Path()), device)
        )


def _request(model: str, final: Final, data_root: Path, results: Path) -> planning.EvalRequest:
    return planning.EvalRequest((model,), (final.attack,), final.suite, results, data_root, n=final.n)
