"""Load and check what a training run needs, before the first step and before any file is written."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.data import loader
from robustbench_vlm.data.canvas_images import resized_as
from robustbench_vlm.data.dataset import open_split
from robustbench_vlm.defenses.interface import Defense, Roles
from robustbench_vlm.errors import CardError
from robustbench_vlm.models import lora, prompts, zoo
from robustbench_vlm.models.clip import Clip, PromptSizes
from robustbench_vlm.models.lora import Adapters
from robustbench_vlm.models.text_bank import render, text_bank
from robustbench_vlm.training import fsdp, inputs, share, teacher_cache
from robustbench_vlm.training.resolve import built, defense_class
from robustbench_vlm.training.setup import Setup, TeacherPhase
from robustbench_vlm.training.teacher_cache import TeacherCache
from robustbench_vlm.training.world import ALONE, World
from robustbench_vlm.types import Batch


def prepare(
    recipe: Recipe, data_root: Path, device: torch.device, cache: Path | None = None, world: World = ALONE
) -> Setup:
    """Load and check the models, text banks and data that `recipe` names.

    Args:
        recipe: what to train.
        data_root: folder of the datasets.
        device: where to train.
        cache: folder for outputs of frozen teachers; without one, teachers run in every step.
        world: the processes that train together.

    Raises:
        CardError: teachers or an `[inner]` that do not fit the defense; what processes cannot share.
        WeightsError, DataError: a model or dataset that cannot be used.
    """
    defense = build_defense(recipe)
    models = _load_models(recipe, defense, device)
    card = reader.read("datasets", recipe.data.dataset, DatasetCard)
    inputs.require_data(recipe, card)
    split = open_split(card, data_root, recipe.data.split).subset(recipe.data.n, recipe.seed)
    stated = models.student.model.preprocess.canvas_resize
    split = resized_as(split, stated if recipe.data.resize == "model" else recipe.data.resize)
    dataset = split.card  # with the class names of the folder, where the card takes them from there
    if recipe.data.names:
        dataset = dataset.model_copy(update={"names": reader.class_names(recipe.data.names)})
    models, adapters = _make_trainable(recipe, defense, models)
    sentences = render(dataset.names, [recipe.data.template])
    text: dict[str, Tensor] = {}
    if defense.needs_text or recipe.probe:
        text = {role: text_bank(model, sentences) for role, model in models.encoders.items()}
    prompt_tokens = {}
    if recipe.prompts is not None and text:
        flat = [group[0] for group in sentences]
        for role in ("student", *defense.learners):
            prompt_tokens[role] = models.encoders[role].tokenize(flat).to(device)
    teachers = {role: loaded.model for role, loaded in models.teachers.items()}
    roles = Roles(models.student.model, teachers, text)
    defense.require(roles)
    phases = _load_phases(recipe, defense, sentences, device)
    _require_phases(defense, roles, phases)
    setup = Setup(
        recipe,
        defense,
        roles,
        models.student,
        models.teachers,
        adapters,
        dataset,
        split,
        _probe_batch(recipe, world, split.card, data_root, models.student.model, device),
        device,
        prompt_tokens,
        phases=phases,
        share=share.of(recipe, models.student.model, world),
    )
    if cache is not None:
        setup = _with_caches(setup, cache)
    _apply_compute(setup)
    return setup


def build_defense(recipe: Recipe) -> Defense:
    """The defense of a recipe, if its teachers, attack and prompts are those that the defense needs.

    Raises:
        CardError: an unknown defense or field, or a recipe with a part too few or too many.
    """
    where = f"recipe {recipe.name}"
    defense, name = built(recipe.defense, where), recipe.defense["name"]
    if set(recipe.teachers) != set(defense.teachers):
        found = f"teachers for {sorted(recipe.teachers) or 'no role'}"
        raise CardError(where, found, f"exactly {sorted(defense.teachers) or 'none'}, the roles of {name}")
    if defense.adversarial != (recipe.inner is not None):
        found = "no [inner] table" if defense.adversarial else "an [inner] table that would go unread"
        raise CardError(where, found, f"{'one' if defense.adversarial else 'none'}, for {name}")
    if staged := set(recipe.phases) & set(defense.learners):
        raise CardError(where, f"phases for {sorted(staged)}", f"none: {name} trains that teacher's prompts")
    if defense.learners and recipe.prompts is None:
        raise CardError(where, "no [prompts] table", f"one, for {name}: it trains nothing else")
    if recipe.prompts and recipe.prompts.text and not defense.needs_text:
        raise CardError(where, f"prompts.text = {recipe.prompts.text}", f"0: {name} uses no text")
    return defense


@dataclass(frozen=True)
class _Models:
    """The loaded models of a run."""

    student: zoo.Loaded
    teachers: Mapping[str, zoo.Loaded]

    @property
    def encoders(self) -> dict[str, Clip]:
        """The models alone, by role, the student first."""
        return {role: loaded.model for role, loaded in {"student": self.student, **self.teachers}.items()}


def _load_models(recipe: Recipe, defense: Defense, device: torch.device) -> _Models:
    """Student and teachers, the teachers without parameter gradients.

    Raises:
        CardError: a student that has prompts already, or a teacher of other class sentences.
    """
    student = zoo.load(recipe.student, device)
    if student.card.prompts is not None:
        found = f"student {recipe.student} has learned prompts"
        raise CardError(f"recipe {recipe.name}", found, "a model without, to start from")
    teachers = {role: zoo.load(model, device) for role, model in recipe.teachers.items()}
    for role, teacher in teachers.items():
        teacher.model.requires_grad_(False)
        if defense.needs_text:
            _require_same_sentences(role, teacher, recipe)
    return _Models(student, teachers)


def _load_phases(
    recipe: Recipe, defense: Defense, sentences: list[list[str]], device: torch.device
) -> dict[str, tuple[TeacherPhase, ...]]:
    """The models that teach first, by role, frozen, each with its text bank."""
    found: dict[str, list[TeacherPhase]] = {role: [] for role in recipe.phases}
    for role, phases in recipe.phases.items():
        for phase in phases:
            loaded = zoo.load(phase.model, device)
            loaded.model.requires_grad_(False)
            if defense.needs_text:
                _require_same_sentences(role, loaded, recipe)
            text = text_bank(loaded.model, sentences) if defense.needs_text or recipe.probe else None
            found[role].append(TeacherPhase(phase.until, loaded, text))
    return {role: tuple(phases) for role, phases in found.items()}


def _require_phases(defense: Defense, roles: Roles, phases: Mapping[str, tuple[TeacherPhase, ...]]) -> None:
    """Refuse models that teach first and do not fit the defense."""
    for role, found in phases.items():
        for phase in found:
            text = roles.text if phase.text is None else {**roles.text, role: phase.text}
            defense.require(replace(roles, teachers={**roles.teachers, role: phase.loaded.model}, text=text))


def _require_same_sentences(role: str, teacher: zoo.Loaded, recipe: Recipe) -> None:
    """Refuse a teacher that was trained on this dataset with another template or other class names."""
    made = teacher.card.recipe
    data = made.get("data")
    if not isinstance(data, dict) or data.get("dataset") != recipe.data.dataset:
        return
    for key, words in (("template", "the sentences"), ("names", "the class names")):
        theirs, ours = data.get(key, ""), getattr(recipe.data, key)
        if theirs != ours and _used_text(made.get("defense")):
            raise CardError(
                f"recipe {recipe.name}",
                f"teacher {role} was trained with {words} {theirs or 'of the dataset card'!r}",
                f"{ours or 'of the dataset card'!r}, as in data.{key}",
                f"set data.{key} to the teacher's, or take another teacher",
            )


def _used_text(defense: object) -> bool:
    """Whether a defense, the table of a checkpoint's card, uses text; only a registered one is known not to.

    A card may name code that nobody has allowed, so other names are not looked up.
    """
    name = defense.get("name") if isinstance(defense, dict) else None
    return name not in plugins.names("defenses") or defense_class(str(name)).needs_text


def _make_trainable(recipe: Recipe, defense: Defense, models: _Models) -> tuple[_Models, Adapters | None]:
    """The models with adapters or prompts attached, or with gradients for the student's whole image tower."""
    student, teachers = models.student, dict(models.teachers)
    if recipe.lora is not None:
        return models, attach_adapters(student.model, recipe)
    if recipe.prompts is None:
        student.model.visual.requires_grad_(True)
        return models, None
    sizes = PromptSizes(recipe.prompts.image, recipe.prompts.text, recipe.prompts.depth)
    student = replace(student, model=prompts.attach(student.model, sizes, recipe.prompts.init))
    for role in defense.learners:
        model = prompts.attach(teachers[role].model, sizes, recipe.prompts.init)
        teachers[role] = replace(teachers[role], model=model)
    return _Models(student, teachers), None


def attach_adapters(model: Clip, recipe: Recipe) -> Adapters | None:
    """The adapters of `[lora]`, attached to the image tower of `model`; `None` for a recipe without."""
    wanted = recipe.lora
    return lora.attach(model, wanted.r, wanted.alpha, wanted.targets, wanted.dropout) if wanted else None


def _shards(recipe: Recipe, world: World) -> bool:
    return recipe.compute.fsdp and world.size > 1


def _probe_batch(
    recipe: Recipe, world: World, card: DatasetCard, root: Path, model: Clip, device: torch.device
) -> Batch | None:
    """The images of the probe: a fixed subset by hash, stratified by class; `None` if this process has none.

    The first process probes alone, but sharded weights are run by all processes together.
    """
    if recipe.probe is None or not (world.first or _shards(recipe, world)):
        return None
    split = open_split(card, root, recipe.probe.split)
    subset = split.subset(recipe.probe.n, recipe.seed, stratified=True)
    images = subset.images(model.image_size)
    return Batch(loader.as_float(images.pixels), torch.from_numpy(images.labels), images.keys).to(device)


def _with_caches(setup: Setup, folder: Path) -> Setup:
    """The setup with a cache for every teacher without learned prompts, and for every phase of one."""
    fixed = {role: loaded for role, loaded in setup.teachers.items() if role not in setup.defense.learners}
    opened = {role: _open_cache(setup, loaded, folder) for role, loaded in fixed.items()}
    phases = {
        role: tuple(replace(phase, cache=_open_cache(setup, phase.loaded, folder)) for phase in found)
        for role, found in setup.phases.items()
    }
    return replace(setup, caches={role: cache for role, cache in opened.items() if cache}, phases=phases)


def _open_cache(setup: Setup, teacher: zoo.Loaded, folder: Path) -> TeacherCache | None:
    """The cache of a teacher; `None` where the folder cannot be written."""
    recipe, size = setup.recipe, setup.model.image_size
    source = teacher_cache.source_of(
        teacher.card.sha256,
        setup.split,
        setup.split.side(size),
        recipe.optim.batch_size // (setup.share.world.size * setup.share.parts),
        recipe.compute.model_dump(mode="json", exclude={"fsdp"}),  # which is about the student
        setup.device,
    )
    with torch.no_grad():
        grey = torch.full((1, 3, size, size), 0.5, device=setup.device)
        width = teacher.model(grey).shape[-1]
    with suppress(OSError):  # without a cache the run takes longer and ends with the same bits
        return teacher_cache.open_cache(folder, source, setup.split, width)
    return None


def _apply_compute(setup: Setup) -> None:
    """Apply memory format, compilation and sharding of `[compute]`.

    Sharding replaces the parameters of the student's image tower, all others stay the same objects.
    """
    wanted = setup.recipe.compute
    if wanted.channels_last:
        setup.model.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if wanted.compile:
        staged = [phase.loaded for phases in setup.phases.values() for phase in phases]
        for model in (setup.model, *(loaded.model for loaded in (*setup.teachers.values(), *staged))):
            model.visual.compile(dynamic=False)
    if _shards(setup.recipe, setup.share.world):
        fsdp.shard(setup.model.visual, setup.device)
