"""What a defense is: the class to subclass, and the records that the training loop exchanges with it.

One training step calls a defense three times. `targets` runs models on the clean batch without gradient;
`inner` gives the function that the attack maximises; `outer` gives the loss that the student minimises. The
loop (`robustbench_vlm.training`) owns data, attack, optimiser, log, checkpoints and resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from robustbench_vlm.errors import InputError, TrainingError

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Encoder, Objective


@dataclass(frozen=True)
class Roles:
    """The models of a training step, by role.

    Attributes:
        student: the encoder being trained.
        teachers: the other encoders, by role (`robust`, `clean`, `anchor`, ...).
        text: text bank (C, D_role) of each role, the student's under `student`; unit rows.
    """

    student: Encoder
    teachers: Mapping[str, Encoder]
    text: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        counts = {role: len(bank) for role, bank in self.text.items()}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{role} {count}" for role, count in sorted(counts.items()))
            raise InputError("text banks", f"different numbers of classes: {found}", "one class list for all")

    def encoder(self, role: str) -> Encoder:
        """The student, or the teacher of that role."""
        return self.student if role == "student" else self.teachers[role]

    def cosines(self, role: str, embeddings: Tensor) -> Tensor:
        """Cosines (B, C) of (B, D) embeddings with the text bank of `role`."""
        unit = embeddings / embeddings.norm(dim=-1, keepdim=True)
        cosines: Tensor = unit @ self.text[role].T
        return cosines

    def logits(self, role: str, images: Tensor) -> Tensor:
        """Zero-shot logits (B, C) of `role` on images (B, 3, H, W): its logit scale times its cosines."""
        encoder = self.encoder(role)
        return encoder.logit_scale * self.cosines(role, encoder(images))


@dataclass(frozen=True)
class Step:
    """What `Defense.outer` is given.

    Where several processes train together, each has the images of its own rows, and everything else is of the
    whole batch: labels, targets, and what an encoder returns for these images. So a mean over rows of outputs
    is the mean over the batch, and `outer` needs no case of its own. It hands the images to encoders and to
    nothing else.

    Attributes:
        batch: the clean images.
        adv: (B, 3, H, W) in [0, 1], the adversarial images that the attack ended with, detached; the clean
            images themselves for a defense without an attack.
        targets: what `Defense.targets` returned for this batch.
        carry: what the defense put into `Terms.carry` in the step before; empty at the first step.
        progress: share of the run's steps that are done, in [0, 1). A source that says "from epoch 60 of 200"
            becomes `progress >= 0.3`.
    """

    batch: Batch
    adv: Tensor
    targets: Mapping[str, Tensor]
    carry: Mapping[str, Tensor]
    progress: float = 0.0


@dataclass(frozen=True)
class Terms:
    """What `Defense.outer` returns.

    Attributes:
        total: scalar with gradient, the loss that the student minimises.
        parts: detached scalars for the log.
        carry: detached tensors that the next step receives (running means, weights); saved in checkpoints.
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    carry: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Passes:
    """Image-tower passes of one training step, each over one batch of images.

    Every attack step runs the student once and differentiates it with respect to the images. Those passes
    depend on the recipe and are not listed here.

    Attributes:
        student: student forwards with gradient in `outer`, each followed by one full backward.
        teachers: forwards of each teacher outside the attack.
        attacked: teachers that every attack step runs and differentiates too.
        learners: teachers whose forward in `outer` is followed by a full backward.
        student_no_grad: student forwards without gradient, such as the clean prediction that TRADES attacks.
        student_batch_norm: student forwards without gradient that only a student with batch norms takes, for
            its running statistics.
    """

    student: int
    teachers: Mapping[str, int] = field(default_factory=dict)
    attacked: tuple[str, ...] = ()
    learners: tuple[str, ...] = ()
    student_no_grad: int = 0
    student_batch_norm: int = 0


@dataclass(frozen=True)
class Defense:
    """A way to train. Subclass it as a frozen dataclass whose fields are the hyper-parameters.

    `outer` must be defined, and `inner` unless `adversarial` is false. Every other member has a default.
    """

    teachers: ClassVar[tuple[str, ...]] = ()
    """Roles that a recipe must fill. Each of them changes the loss or the attack."""

    learners: ClassVar[tuple[str, ...]] = ()
    """Teachers whose prompts are trained along with the student's; a recipe then needs `[prompts]`."""

    needs_text: ClassVar[bool] = True
    """Whether the losses use labels and class sentences."""

    adversarial: ClassVar[bool] = True
    """Whether there is an attack. A recipe has an `[inner]` table exactly then."""

    def require(self, roles: Roles) -> None:
        """Refuse models that the losses cannot be computed with; called once, before any file is written.

        Raises:
            InputError: an unsuitable model. By default none is refused.
        """

    def passes(self) -> Passes | None:
        """Passes of one step with these hyper-parameters; None, the default, if they are not stated.

        The cost estimate of a recipe needs them. A contract test counts the passes of a defense that states
        them.
        """
        return None

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Model outputs on the clean batch that the attack and `outer` share; by default none.

        Called once a step, without gradient, before the attack. Teachers may be run here, and the student:
        it is in eval mode, with its weights of before the update. Every value has one row per image.
        """
        del roles, batch
        return {}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """The function of adversarial images that the attack maximises, one value per image (B,).

        The value of an image may depend on that image alone.

        Raises:
            TrainingError: always, in this default.
        """
        del roles, batch, targets
        raise TrainingError(f"defense {type(self).__name__}: it has no inner objective")

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The loss that the student minimises.

        Raises:
            TrainingError: always, in this default.
        """
        del roles, step
        raise TrainingError(f"defense {type(self).__name__}: it has no outer loss")

    def loss_at_agreement(self, roles: Roles, batch: Batch) -> Tensor | float:
        """The value of `outer` where there is nothing to distil and no attack; by default 0.

        That is the first step when every teacher is the student itself and the adversarial images are the
        clean ones. Divergences and distances are zero there; a loss with other terms, such as cross-entropy
        with the labels, returns what is left of it. A contract test compares the two.
        """
        del roles, batch
        return 0.0
