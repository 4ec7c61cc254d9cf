"""The trials of a frontier study: a method with some hyperparameters and one seed, trained and judged."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustbench_vlm import devices, store
from robustbench_vlm.backends.backend import NATIVE
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.cards.study import Measurement, Method, Study
from robustbench_vlm.errors import CardError, nearest
from robustbench_vlm.evaluation import planning, provenance
from robustbench_vlm.evaluation.planning import EvalRequest
from robustbench_vlm.models.checkpoint_card import read_card
from robustbench_vlm.results import result_file
from robustbench_vlm.studies import clock, trainings
from robustbench_vlm.studies.frontier import outcomes
from robustbench_vlm.studies.task import Resources
from robustbench_vlm.training.finish import interpolate_folder

OF_CARDS = {"canvas", "native_px", "resize", "names", "names_from", "templates"}
"""What a dataset card says of how a model sees images and classes."""

CHECKPOINT_EVERY = 50  # steps of a trial, whatever its recipe says


@dataclass(frozen=True)
class TeacherRun:
    """A teacher of the study, as a task.

    Attributes:
        name: as the study's recipes name it, without `@`.
        recipe: resolved.
        folder: gets `model/`.
    """

    name: str
    recipe: Recipe
    folder: Path

    @property
    def model(self) -> Path:
        """Its checkpoint folder."""
        return self.folder / "model"

    @property
    def trained(self) -> bool:
        """Whether that is done."""
        return (self.model / "card.json").exists()

    def perform(self, resources: Resources) -> list[dict[str, Any]]:
        """Train it, if that is not done; it has no outcome."""
        trainings.train(self.recipe, self.folder, resources)
        return []


@dataclass(frozen=True)
class Trial:
    """One setting of a method's hyperparameters with one seed.

    Attributes:
        method: name of the method.
        number: of the setting, from 1, in the order of the grid.
        settings: the hyperparameters, as `--set` takes them.
        seed: of the recipe.
        recipe: resolved, with interpolation 1 and without a title; teachers of the study are its checkpoint
            folders.
        sha256: fingerprint of what changes the weights: a recipe with another title trains the same model.
        needs: the teachers of the study that it names.
        folder: gets `model/`, one `model-<share>/` for each other interpolation, and `results/`.
    """

    method: str
    number: int
    settings: tuple[str, ...]
    seed: int
    recipe: Recipe
    sha256: str
    needs: tuple[TeacherRun, ...]
    folder: Path

    @property
    def name(self) -> str:
        """What progress lines and errors call it."""
        hyperparameters = ", ".join(self.settings) or "as its recipe is"
        return f"{self.method} {self.number} ({hyperparameters}), seed {self.seed}"

    @property
    def start(self) -> str:
        """What the student is before training; a teacher of the study by its name."""
        return {str(one.model.resolve()): one.name for one in self.needs}.get(
            self.recipe.student, self.recipe.student
        )

    def command(self, share: float, study: Study) -> str:
        """The command that trains this model again: the study's own where it needs a teacher of the study."""
        method = next(method for method in study.method if method.name == self.method)
        if self.needs:
            return shlex.join(["vlmrob", "study", study.name, "--method", method.name])
        changes = [*study.set, *method.set, *self.settings, f"seed={self.seed}"]
        changes += [f"interpolation={share:g}"] if share < 1 else []
        words = ["vlmrob", "train", str(self.recipe.defense["name"]), "--recipe", method.recipe]
        return shlex.join(words + [word for change in changes for word in ("--set", change)])


def trained(recipe: Recipe) -> str:
    """Fingerprint of what changes the weights that a recipe leaves."""
    return recipe.model_copy(update={"name": "", "title": "", "checkpoint_every": 0}).fingerprint


def teacher_runs(study: Study, out: Path) -> dict[str, TeacherRun]:
    """The teachers that a study trains, by name.

    Raises:
        CardError: no such recipe, or a setting that it does not take.
    """
    found = {}
    for teacher in study.teacher:
        where = f"study {study.name}, teacher {teacher.name}"
        recipe = trainings.resolved(where, teacher.recipe, teacher.set, study.seeds[0], study.probe)
        folder = out / f"teacher-{store.file_name(teacher.name)}-{trained(recipe)[:12]}"
        found[teacher.name] = TeacherRun(teacher.name, recipe, folder)
    return found


def trials(study: Study, method: Method, out: Path, seed: int) -> list[Trial]:
    """Every trial of a method with one seed.

    Raises:
        CardError: no such recipe or teacher, a setting that it does not take, or two trials that are one.
    """
    found: dict[str, Trial] = {}
    where, teachers = f"study {study.name}, method {method.name}", teacher_runs(study, out)
    for number, settings in enumerate(method.trials, 1):
        changes = [*study.set, *method.set, *settings]
        named = trainings.resolved(where, method.recipe, changes, seed, study.probe)
        if named.interpolation != 1:
            raise CardError(where, "interpolation in a trial", "the study's own list, interpolation = [...]")
        needs = _needs(named, teachers, where)
        sha256 = trained(_with_models(named, {one.name: f"recipe {trained(one.recipe)}" for one in needs}))
        if sha256 in found:
            other = found[sha256].number
            do = "hyperparameters that change it"
            raise CardError(where, f"trials {other} and {number} are one recipe", do)
        # as a path from the root, so that a run goes on however `--out` is spelled
        recipe = _with_models(named, {one.name: str(one.model.resolve()) for one in needs})
        # what does not change the weights is the same for all, so that a run goes on when a card is reworded
        recipe = recipe.model_copy(update={"title": "", "checkpoint_every": CHECKPOINT_EVERY})
        folder = out / f"{store.file_name(recipe.name)}-s{seed}-{sha256[:12]}"
        found[sha256] = Trial(method.name, number, settings, seed, recipe, sha256, needs, folder)
    return list(found.values())


def _needs(recipe: Recipe, teachers: Mapping[str, TeacherRun], where: str) -> tuple[TeacherRun, ...]:
    """The teachers of the study that a recipe names.

    Raises:
        CardError: one that the study does not have.
    """
    names = [id_.removeprefix("@") for id_ in recipe.models if id_.startswith("@")]
    for name in names:
        if name not in teachers:
            raise CardError(where, f"no teacher {name!r:.80} of the study", do=nearest(name, teachers))
    return tuple(teachers[name] for name in names)


def _with_models(recipe: Recipe, models: Mapping[str, str]) -> Recipe:
    """The recipe with other words for `@name`."""
    spoken = {f"@{name}": text for name, text in models.items()}
    teachers = {role: spoken.get(id_, id_) for role, id_ in recipe.teachers.items()}
    phases = {
        role: tuple(one.model_copy(update={"model": spoken.get(one.model, one.model)}) for one in staged)
        for role, staged in recipe.phases.items()
    }
    student = spoken.get(recipe.student, recipe.student)
    return recipe.model_copy(update={"student": student, "teachers": teachers, "phases": phases})


@dataclass(frozen=True)
class Judging:
    """A trial's model at one interpolation under one measurement.

    Attributes:
        trial: what is trained.
        share: of the trained weights.
        measurement: attack and images.
    """

    trial: Trial
    share: float
    measurement: Measurement

    @property
    def id(self) -> tuple[str, float, str]:
        """What its outcome is found by."""
        return (self.trial.sha256, self.share, fingerprint(self.measurement))


def fingerprint(measurement: Measurement) -> str:
    """Of the engine, and of what cards say of attack, images, classes and sentences.

    Titles, notes and sources are left out.
    """
    chain = reader.read("attacks", measurement.attack, AttackCard)
    suite = reader.suite(measurement.suite)
    chosen = [name for name in suite.datasets if name in (measurement.datasets or suite.datasets)]
    cards = [(name, reader.read("datasets", name, DatasetCard)) for name in chosen]
    spoken = {"title", "notes", "version"}
    return store.fingerprint(
        {
            "engine": NATIVE["fast"],
            "attack": chain.model_dump(mode="json", exclude=spoken | {"plain_pgd"}),
            "suite": suite.model_dump(mode="json", exclude=spoken | {"means", "n", "datasets"}),
            "datasets": [[name, card.model_dump(mode="json", include=OF_CARDS)] for name, card in cards],
            "n": measurement.n,
        }
    )


@dataclass(frozen=True)
class TrialTask:
    """Train a trial, if that is not done, and judge it.

    Attributes:
        trial: what is trained.
        judgings: of this trial under one measurement, in the order in which they are done.
    """

    trial: Trial
    judgings: tuple[Judging, ...]

    @property
    def name(self) -> str:
        """What progress lines and errors call it."""
        return f"{self.trial.name}, {self.judgings[0].measurement.attack}"

    @property
    def folder(self) -> Path:
        """Of the trial."""
        return self.trial.folder

    def perform(self, resources: Resources) -> list[dict[str, Any]]:
        """Do it, and return an outcome for each judging."""
        recipe, folder = self.trial.recipe, self.trial.folder
        model = trainings.train(recipe, folder, resources)
        found = []
        for judging in self.judgings:
            place = model
            if judging.share != 1:
                place = folder / f"model-{judging.share:g}"
                if not (place / "card.json").exists():
                    interpolate_folder(model, recipe, judging.share, place)
            found.append(_outcome(judging, place, model, resources))
        return found


def _outcome(judging: Judging, place: Path, trained: Path, resources: Resources) -> dict[str, Any]:
    """Attack the model in `place`, and say what came out."""
    measurement, folder = judging.measurement, judging.trial.folder
    device = devices.choose_device(resources.device)
    asked = request(measurement, str(place), folder / "results", resources)
    plan = planning.require_data(planning.plan(asked, device))
    results = [result_file.read_one(path) for path in planning.perform(plan, lambda *_: None)]
    recipe, share, judged = judging.id
    card, timed = read_card(trained), clock.step_seconds(folder)
    seconds = sum(float(store.read_json(result.path)["run"]["seconds"]) for result in results)
    return {
        "study_run": {"recipe": recipe, "interpolation": share, "measurement": judged},
        "model_sha256": results[0].model[1],
        "parents": {parent.role: parent.sha256 for parent in card.parents},
        "data_sha256": card.training["data_sha256"],
        "datasets": {result.dataset: outcomes.packed(result) for result in results},
        "curve": _curve(trained),
        "step_seconds": None if timed is None else round(timed[0], 6),
        "run": provenance.of_run(device, seconds, None),
    }


def _curve(trained: Path) -> list[Sequence[float]]:
    """(step, clean, robust) of every probe of the training, accuracies as fractions."""
    lines = store.records(trained / "log.jsonl")
    probes: Mapping[int, Any] = {line["step"]: line["probe"] for line in lines if "probe" in line}
    return [(step, probe["clean"], probe.get("robust", 0.0)) for step, probe in probes.items()]


def request(measurement: Measurement, model: str, results: Path, resources: Resources) -> EvalRequest:
    """A measurement of a model as an evaluation."""
    return EvalRequest(
        (model,),
        (measurement.attack,),
        measurement.suite,
        results,
        resources.data_root,
        measurement.datasets,
        n=measurement.n,
    )
