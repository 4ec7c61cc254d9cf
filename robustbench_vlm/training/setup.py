"""What a training run works with: the models by role, the images, and the parameters that are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.data.dataset import Split
from robustbench_vlm.defenses.interface import Defense, Roles
from robustbench_vlm.errors import some
from robustbench_vlm.models import prompts, zoo
from robustbench_vlm.models.clip import Clip, InBf16
from robustbench_vlm.models.lora import Adapters
from robustbench_vlm.models.text_bank import untrained
from robustbench_vlm.training import fsdp
from robustbench_vlm.training.share import Gathered, Parted, Share
from robustbench_vlm.training.teacher_cache import CachedTeacher, TeacherCache
from robustbench_vlm.types import Batch, Encoder


@dataclass(frozen=True)
class TeacherPhase:
    """A model that teaches in place of the teacher of a role while less than `until` of the run is done.

    Attributes:
        until: share of the run's steps, in (0, 1).
        loaded: the model, frozen.
        text: its text bank (C, D); `None` where the defense uses no text.
        cache: stored outputs on clean images, or `None`.
    """

    until: float
    loaded: zoo.Loaded
    text: Tensor | None
    cache: TeacherCache | None = None


@dataclass(frozen=True)
class Setup:
    """Everything a run needs, loaded and checked by `prepare` before the first step.

    Attributes:
        recipe: what is trained and how.
        defense: the losses.
        roles: the models, with the text banks of before the run.
        student: what is trained, with the card of where it came from.
        teachers: the other models by role, frozen except for learned prompts.
        adapters: LoRA inside the student, or `None`.
        dataset: card of the training images, with the class names that count.
        split: the training images.
        probe_batch: the images of the validation probe, or `None`, also in a process that does not probe.
        device: where all of it is.
        prompt_tokens: token ids (C, L) of the class sentences, for every role whose prompts are trained.
        caches: stored outputs on clean images, by role of the teacher.
        phases: the models that teach first, by role, in the order of their ends.
        share: which rows of each batch this process computes.
    """

    recipe: Recipe
    defense: Defense
    roles: Roles
    student: zoo.Loaded
    teachers: Mapping[str, zoo.Loaded]
    adapters: Adapters | None
    dataset: DatasetCard
    split: Split
    probe_batch: Batch | None
    device: torch.device
    prompt_tokens: Mapping[str, Tensor] = field(default_factory=dict)
    caches: Mapping[str, TeacherCache] = field(default_factory=dict)
    phases: Mapping[str, tuple[TeacherPhase, ...]] = field(default_factory=dict)
    share: Share = field(default_factory=Share)

    @property
    def model(self) -> Clip:
        """The student's encoder."""
        return self.student.model

    @property
    def sharded(self) -> bool:
        """Whether each process has only a part of the student's weights, so that all must run it together."""
        return fsdp.is_sharded(self.model.visual)

    @property
    def notes(self) -> list[str]:
        """Properties of the images and class names that a reader of the results should know; no errors."""
        template = self.recipe.data.template
        names = untrained(self.model, self.dataset.names, template) if self.roles.text else []
        what = f"a template or class names with words that {self.student.card.name} was never trained on"
        words = f"{what}: {some(names)}"
        return [*self.split.notes, *([words] if names else [])]

    def parameters(self) -> dict[str, Tensor]:
        """The parameters that the optimiser changes, under the names that checkpoint files have for them."""
        named: dict[str, Tensor] = {f"student.{n}": p for n, p in self.model.visual.named_parameters()}
        for role in self.prompt_tokens:
            model = self.model if role == "student" else self.teachers[role].model
            towers = {"text": model.language} | ({} if role == "student" else {"image": model.visual})
            for part, module in towers.items():
                named |= {f"prompts.{role}.{part}.{n}": p for n, p in prompts.state(module).items()}
        return {name: parameter for name, parameter in named.items() if parameter.requires_grad}

    def current_roles(self) -> Roles:
        """The roles with the text banks of the present prompts, with gradient where it is enabled."""
        banks, wanted = {}, self.recipe.prompts
        for role, tokens in self.prompt_tokens.items() if wanted and wanted.text else ():
            model = self.model if role == "student" else self.teachers[role].model
            banks[role] = prompts.bank(model, tokens)
        return replace(self.roles, text={**self.roles.text, **banks}) if banks else self.roles

    def training_roles(self, batch: Batch, progress: float = 0.0) -> Roles:
        """The current roles in the recipe's precision; teachers with a cache use it for `batch`.

        Args:
            batch: clean images of the step.
            progress: share of the run's steps that are done; it decides which phase of a teacher teaches.
        """
        return self._roles(batch, progress, lambda encoder: encoder)

    def outer_roles(self, batch: Batch, progress: float = 0.0) -> Roles:
        """The same for `Defense.outer`: encoders return the rows of all processes, computed in parts.

        Args:
            batch: the clean images of this process.
            progress: as above.
        """
        share, rows = self.share, len(batch.images)
        if share.whole:
            return self.training_roles(batch, progress)
        roles = self._roles(batch, progress, lambda encoder: Parted(encoder, share, rows))
        teachers = {role: Gathered(teacher, share, rows) for role, teacher in roles.teachers.items()}
        return replace(roles, student=Gathered(roles.student, share, rows), teachers=teachers)

    def _roles(self, batch: Batch, progress: float, computed: Callable[[Encoder], Encoder]) -> Roles:
        """The current roles; `computed` changes how an encoder that is not read from a cache is run."""
        now = self.current_roles()
        text = dict(now.text)
        bf16 = self.recipe.compute.precision == "bf16"
        student: Encoder = InBf16(self.model) if bf16 else now.student
        teachers: dict[str, Encoder] = {}
        for role in self.teachers:
            teacher, cache = now.teachers[role], self.caches.get(role)
            phase = next((phase for phase in self.phases.get(role, ()) if progress < phase.until), None)
            if phase is not None:
                teacher, cache = phase.loaded.model, phase.cache
                text |= {role: phase.text} if phase.text is not None else {}
            teachers[role] = computed(InBf16(teacher) if bf16 else teacher)
            if cache is not None:
                teachers[role] = CachedTeacher(teachers[role], cache, batch)
        return replace(now, student=computed(student), teachers=teachers, text=text)
