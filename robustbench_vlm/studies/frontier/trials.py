"""The trials of a frontier study: a method at one setting of its dials, trained with one seed, and judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustbench_vlm import devices, store
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.cards.frontier import Frontier, Measurement, Method
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.errors import CardError
from robustbench_vlm.evaluation import planning, provenance
from robustbench_vlm.evaluation.planning import EvalRequest
from robustbench_vlm.models.checkpoint_card import read_card
from robustbench_vlm.results import result_file
from robustbench_vlm.studies import clock, runner
from robustbench_vlm.studies.frontier import outcomes
from robustbench_vlm.studies.pool import Resources
from robustbench_vlm.training.finish import interpolate_folder


@dataclass(frozen=True)
class Trial:
    """One setting of a method's dials with one seed.

    Attributes:
        method: name of the method.
        number: of the setting, from 1, in the order of the grid.
        settings: the dials, as `--set` takes them.
        seed: of the recipe.
        recipe: resolved, with interpolation 1.
        folder: gets `model/`, one `model-<share>/` for each other interpolation, and `results/`.
    """

    method: str
    number: int
    settings: tuple[str, ...]
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def name(self) -> str:
        """What progress lines and errors call it."""
        dials = ", ".join(self.settings) or "as its recipe is"
        return f"{self.method} {self.number} ({dials}), seed {self.seed}"

    @property
    def sha256(self) -> str:
        """Fingerprint of what changes the weights: a recipe with another title trains the same model."""
        return self.recipe.model_copy(update={"name": "", "title": "", "checkpoint_every": 0}).fingerprint

    def command(self, share: float, study: Frontier) -> str:
        """The command that trains this model again."""
        method = next(method for method in study.method if method.name == self.method)
        changes = [*study.set, *method.set, *self.settings, f"seed={self.seed}"]
        changes += [f"interpolation={share:g}"] if share < 1 else []
        recipe = f"{self.recipe.defense['name']} --recipe {method.recipe}"
        return f"vlmrob train {recipe} " + " ".join(f"--set '{change}'" for change in changes)


def trials(study: Frontier, method: Method, out: Path, seed: int) -> list[Trial]:
    """Every trial of a method with one seed.

    Raises:
        CardError: no such recipe, a setting that it does not take, or two trials that are one recipe.
    """
    found: dict[str, Trial] = {}
    where = f"study {study.name}, method {method.name}"
    for number, settings in enumerate(method.trials, 1):
        changes = [*study.set, *method.set, *settings]
        recipe = runner.resolved(where, method.recipe, changes, seed, study.probe)
        if recipe.interpolation != 1:
            raise CardError(where, "interpolation in a trial", "the study's own list, interpolation = [...]")
        if recipe.fingerprint in found:
            other = found[recipe.fingerprint].number
            raise CardError(where, f"trials {other} and {number} are one recipe", "dials that change it")
        folder = out / f"{store.file_name(recipe.name)}-s{seed}-{recipe.fingerprint[:12]}"
        found[recipe.fingerprint] = Trial(method.name, number, settings, seed, recipe, folder)
    return list(found.values())


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
    """Of everything in a measurement that changes verdicts: titles and notes of the cards are left out."""
    chain = reader.read("attacks", measurement.attack, AttackCard)
    suite = reader.suite(measurement.suite)
    chosen = measurement.datasets or suite.datasets
    spoken = {"title", "notes", "version", "means", "n", "datasets"}
    return store.fingerprint(
        {
            "attack": chain.model_dump(mode="json", exclude=spoken),
            "suite": suite.model_dump(mode="json", exclude=spoken),
            "datasets": [name for name in suite.datasets if name in chosen],
            "n": measurement.n,
        }
    )


@dataclass(frozen=True)
class TrialTask:
    """Train a trial, if that is not done, and judge it.

    Attributes:
        trial: what is trained.
        judgings: of this trial, in the order in which they are done.
    """

    trial: Trial
    judgings: tuple[Judging, ...]

    @property
    def name(self) -> str:
        """What progress lines and errors call it."""
        return self.trial.name

    @property
    def folder(self) -> Path:
        """Of the trial."""
        return self.trial.folder

    def perform(self, resources: Resources) -> list[dict[str, Any]]:
        """Do it, and return an outcome for each judging."""
        recipe, folder = self.trial.recipe, self.trial.folder
        model = runner.train(recipe, folder, resources)
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
