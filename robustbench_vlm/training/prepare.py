"""What a training run needs, loaded and checked before the first step and before any file is written."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.data import loader
from robustbench_vlm.data.dataset import Split, open_split
from robustbench_vlm.defenses.interface import Defense, Roles
from robustbench_vlm.errors import CardError, some
from robustbench_vlm.models import lora, prompts, zoo
from robustbench_vlm.models.clip import Clip, InBf16, PromptSizes
from robustbench_vlm.models.lora import Adapters
from robustbench_vlm.models.text_bank import render, text_bank, untrained
from robustbench_vlm.training import teacher_cache
from robustbench_vlm.training.resolve import defense_class
from robustbench_vlm.training.teacher_cache import Kept, Recalled
from robustbench_vlm.types import Batch, Encoder


@dataclass(frozen=True)
class Setup:
    """Everything a run needs, loaded and checked before the first step.

    Attributes:
        student: what is trained, with where it came from.
        teachers: frozen models by role.
        adapters: LoRA inside the student, or `None`.
        prompted: token ids (C, L) of the class sentences, for every role whose prompts are trained.
        kept: what frozen teachers said of the training images before, by role.
    """

    recipe: Recipe
    defense: Defense
    roles: Roles
    student: zoo.Loaded
    teachers: Mapping[str, zoo.Loaded]
    adapters: Adapters | None
    card: DatasetCard
    split: Split
    probe: Batch | None
    device: torch.device
    prompted: Mapping[str, Tensor] = field(default_factory=dict)
    kept: Mapping[str, Kept] = field(default_factory=dict)

    @property
    def model(self) -> Clip:
        """The student's encoder."""
        return self.student.model

    @property
    def notes(self) -> list[str]:
        """What a careful reader of the run should know of its images and class names; not errors."""
        names = untrained(self.model, self.card.names, self.recipe.data.template) if self.roles.text else []
        words = f"class names with words that {self.student.card.name} never met: {some(names)}"
        return [*self.split.notes, *([words] if names else [])]

    def parameters(self) -> dict[str, Tensor]:
        """What the optimiser changes, by a name that checkpoints keep."""
        named: dict[str, Tensor] = {f"student.{n}": p for n, p in self.model.visual.named_parameters()}
        for role in self.prompted:
            model = self.model if role == "student" else self.teachers[role].model
            towers = {"text": model.language} | ({} if role == "student" else {"image": model.visual})
            for part, module in towers.items():
                named |= {f"prompts.{role}.{part}.{n}": p for n, p in prompts.state(module).items()}
        return {name: parameter for name, parameter in named.items() if parameter.requires_grad}

    def roles_now(self) -> Roles:
        """The roles with the text banks as the prompts make them now, with gradient where it is enabled."""
        banks, wanted = {}, self.recipe.prompts
        for role, tokens in self.prompted.items() if wanted and wanted.text else ():
            model = self.model if role == "student" else self.teachers[role].model
            banks[role] = prompts.bank(model, tokens)
        return replace(self.roles, text={**self.roles.text, **banks}) if banks else self.roles

    def roles_in_training(self, batch: Batch) -> Roles:
        """The roles in the recipe's precision; frozen teachers know what they said of `batch` before."""
        now = self.roles_now()
        bf16 = self.recipe.compute.precision == "bf16"
        student: Encoder = InBf16(self.model) if bf16 else now.student
        teachers: dict[str, Encoder] = {}
        for role, loaded in self.teachers.items():
            teachers[role] = InBf16(loaded.model) if bf16 else now.teachers[role]
            if role in self.kept:
                teachers[role] = Recalled(teachers[role], self.kept[role], batch)
        return replace(now, student=student, teachers=teachers)


def prepare(recipe: Recipe, data_root: Path, device: torch.device, cache: Path | None = None) -> Setup:
    """Load and check the models, text banks and data that `recipe` names.

    Args:
        recipe: what to train.
        data_root: folder of the datasets.
        device: where to train.
        cache: folder of embeddings of frozen teachers; with none, every step asks the teachers again.

    Raises:
        CardError: teachers that do not fit the defense, or an `[inner]` that it does not use.
        WeightsError, DataError: a model or dataset that cannot be used.
    """
    defense = _defense(recipe)
    student = zoo.load(recipe.student, device)
    if student.card.prompts is not None:
        found = f"student {recipe.student} has learned prompts"
        raise CardError(f"recipe {recipe.name}", found, "a model without, to start from")
    teachers = {role: zoo.load(model, device) for role, model in recipe.teachers.items()}
    for teacher in teachers.values():
        teacher.model.requires_grad_(False)
    dataset = reader.read("datasets", recipe.data.dataset, DatasetCard)
    split = open_split(dataset, data_root, recipe.data.split).subset(recipe.data.n, recipe.seed)
    dataset = split.card  # with the folder's class names, where they are the ones that count
    for role, teacher in teachers.items():
        if defense.needs_text:
            _require_same_sentences(role, teacher, recipe)
    adapters, learning = None, {}
    if recipe.lora is not None:
        chosen = recipe.lora
        adapters = lora.attach(student.model, chosen.r, chosen.alpha, chosen.targets, chosen.dropout)
    elif recipe.prompts is not None:
        wanted, learners = recipe.prompts, defense.learners
        sizes = PromptSizes(wanted.image, wanted.text, wanted.depth)
        student = replace(student, model=prompts.attach(student.model, sizes, wanted.init))
        for role in learners:
            model = prompts.attach(teachers[role].model, sizes, wanted.init)
            teachers[role] = replace(teachers[role], model=model)
        learning = {"student": student.model} | {role: teachers[role].model for role in learners}
    else:
        student.model.visual.requires_grad_(True)
    text: dict[str, Tensor] = {}
    sentences = render(dataset.names, [recipe.data.template])
    if defense.needs_text or recipe.probe:
        text["student"] = text_bank(student.model, sentences)
        text |= {role: text_bank(teacher.model, sentences) for role, teacher in teachers.items()}
    flat = [group[0] for group in sentences]
    prompted = {role: model.tokenize(flat).to(device) for role, model in learning.items() if text}
    roles = Roles(student.model, {role: loaded.model for role, loaded in teachers.items()}, text)
    defense.require(roles)
    probe = _probe_batch(recipe, dataset, data_root, student.model).to(device) if recipe.probe else None
    setup = Setup(
        recipe, defense, roles, student, teachers, adapters, dataset, split, probe, device, prompted
    )
    if cache is not None:
        setup = replace(setup, kept=_kept(setup, cache))
    _settle(setup)
    return setup


def _settle(setup: Setup) -> None:
    """Bring the towers into the form that `[compute]` asks for; parameters stay the same objects."""
    wanted = setup.recipe.compute
    if wanted.channels_last:
        setup.model.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if wanted.compile:
        for model in (setup.model, *(made.model for made in setup.teachers.values())):
            model.visual.compile(dynamic=False)


def _kept(setup: Setup, cache: Path) -> dict[str, Kept]:
    """The files of the frozen teachers; none where the folder cannot be written: that costs time alone."""
    recipe, size = setup.recipe, setup.model.image_size
    frozen = {r: m for r, m in setup.teachers.items() if r not in setup.defense.learners}
    files = {}
    for role, loaded in frozen.items():
        known = teacher_cache.facts(
            loaded.card.sha256,
            setup.split,
            setup.split.side(size),
            recipe.optim.batch_size,
            recipe.compute.model_dump(mode="json"),
            setup.device,
        )
        with torch.no_grad():
            grey = torch.full((1, 3, size, size), 0.5, device=setup.device)
            width = loaded.model(grey).shape[-1]
        with suppress(OSError):
            files[role] = teacher_cache.keep(cache, known, setup.split, width)
    return files


def _defense(recipe: Recipe) -> Defense:
    """The defense of a recipe, if its teachers, attack and prompts are those that it needs."""
    where = f"recipe {recipe.name}"
    fields = {key: value for key, value in recipe.defense.items() if key != "name"}
    name = recipe.defense.get("name")
    if not isinstance(name, str):
        raise CardError(where, "defense has no name", "[defense] name = 'mmt-ard' or another registered one")
    defense_class(name)
    defense: Defense = plugins.build("defenses", name, fields, where)
    if set(recipe.teachers) != set(defense.teachers):
        found = f"teachers for {sorted(recipe.teachers) or 'no role'}"
        raise CardError(where, found, f"exactly {sorted(defense.teachers) or 'none'}, the roles of {name}")
    if defense.adversarial != (recipe.inner is not None):
        found = "no [inner] table" if defense.adversarial else "an [inner] table that would go unread"
        raise CardError(where, found, f"{'one' if defense.adversarial else 'none'}, for {name}")
    if defense.learners and recipe.prompts is None:
        raise CardError(where, "no [prompts] table", f"one, for {name}: it trains nothing else")
    if recipe.prompts and recipe.prompts.text and not defense.needs_text:
        raise CardError(where, f"prompts.text = {recipe.prompts.text}", f"0: {name} uses no text")
    return defense


def _require_same_sentences(role: str, teacher: zoo.Loaded, recipe: Recipe) -> None:
    """Refuse a teacher that was trained on this dataset against other sentences: other classes to it."""
    made = teacher.card.recipe
    data = made.get("data", {})
    if data.get("dataset") != recipe.data.dataset or data.get("template") == recipe.data.template:
        return
    if defense_class(str(made["defense"]["name"])).needs_text:
        raise CardError(
            f"recipe {recipe.name}",
            f"teacher {role} was trained with the sentences {data.get('template')!r}",
            f"{recipe.data.template!r}, as in data.template",
            "set data.template to the teacher's, or take another teacher",
        )


def _probe_batch(recipe: Recipe, card: DatasetCard, root: Path, model: Clip) -> Batch:
    """A fixed hashed subset that holds every class equally, as far as the split does."""
    assert recipe.probe is not None
    split = open_split(card, root, recipe.probe.split)
    subset = split.subset(recipe.probe.n, recipe.seed, stratified=True)
    images = subset.images(model.image_size)
    return Batch(loader.as_float(images.pixels), torch.from_numpy(images.labels), images.keys)
