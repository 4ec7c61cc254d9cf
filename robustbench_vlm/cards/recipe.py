"""The records of a training run: what is trained, from whom, on what, against which adversary, how long."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from robustbench_vlm.cards.card import Card, Grown
from robustbench_vlm.cards.protocol import CardResize
from robustbench_vlm.store import fingerprint
from robustbench_vlm.threat import Norm, Threat, eps_text, parse_eps


class DataChoice(Grown):
    """The training images of a recipe, and the sentence that turns class names into text.

    Attributes:
        dataset: name of the dataset card.
        split: split to train on.
        template: sentence with `{c}` for the class name.
        n: images to train on, the ones of smallest keyed hash; 0 means all.
        names: list of class names in label order that replaces the dataset card's, `imagenet-tecoa-names` for
            `prompts/imagenet-tecoa-names.txt`; empty for the card's own.
        resize: how images come to a model canvas, as in a dataset card; `model`: as the student states.
    """

    later: ClassVar[frozenset[str]] = frozenset({"names", "resize"})

    dataset: str
    split: str = "train"
    template: str = "This is a photo of a {c}"
    n: int = Field(default=0, ge=0)
    names: str = ""
    resize: CardResize = "model"

    @model_validator(mode="after")
    def _placeholder(self) -> DataChoice:
        if "{c}" not in self.template:
            raise ValueError(f"template must be a sentence that contains {{c}} (found {self.template!r:.60})")
        return self


class Inner(Grown):
    """The inner maximisation: projected gradient ascent.

    Attributes:
        norm: norm of the ball.
        eps: radius: `4/255` for linf, a plain length for l2 and l1.
        steps: gradient steps.
        step_size: length of a step, spelled as the radius is.
        start: `uniform`, in the ball and clipped into the box (the TeCoA family, AGFT); `unclipped`, in the
            ball only, for the first forward (RobustVLM, MMT-ARD, ARD, IAD); `gaussian`, x + 0.001 N(0, 1),
            neither projected nor clipped (RSLAD, MTARD, AdaAD).
        mode: of the student while it is attacked. `eval`: running statistics, no dropout; `train`: batch
            norms use and update the statistics of the batch, dropout is on (the TeCoA family, ARD, IAD).
        eps_start: radius of the first step of the training, from which it grows linearly to `eps`; empty for
            `eps` throughout. The length of an attack step stays as it is, and the probe has `eps`.
        eps_growth: share of the steps of the training after which the radius is `eps`.
    """

    later: ClassVar[frozenset[str]] = frozenset({"start", "mode", "eps_start", "eps_growth"})

    norm: Norm = "linf"
    eps: Annotated[str, BeforeValidator(str)]
    steps: int = Field(ge=1)
    step_size: Annotated[str, BeforeValidator(str)]
    start: Literal["uniform", "unclipped", "gaussian"] = "uniform"
    mode: Literal["eval", "train"] = "eval"
    eps_start: Annotated[str, BeforeValidator(str)] = ""
    eps_growth: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _a_radius_that_grows(self) -> Inner:
        if not self.eps_start and self.eps_growth != 1:
            raise ValueError(f"eps_growth = {self.eps_growth:g} goes with eps_start, the first radius")
        return self

    @property
    def threat(self) -> Threat:
        """The ball of the inner maximisation, at its last radius."""
        return Threat(self.norm, parse_eps(self.eps, self.norm))

    def threat_at(self, progress: Fraction) -> Threat:
        """The ball after the share `progress` of the training's steps."""
        if not self.eps_start:
            return self.threat
        first, last = parse_eps(self.eps_start, self.norm), self.threat.eps
        grown = min(progress / Fraction(self.eps_growth), Fraction(1))
        return Threat(self.norm, first + (last - first) * grown)

    @property
    def described(self) -> str:
        """The ball in words: `linf 4/255`, and how its radius grows, if it does.

        Raises:
            InputError: a radius that is none.
        """
        grows = f", grown from {eps_text(self.norm, self.threat_at(Fraction(0)).eps)}"
        return f"{self.threat}{grows if self.eps_start else ''}"

    @property
    def step(self) -> Fraction:
        """Step size in [0, 1] pixel units."""
        return parse_eps(self.step_size, self.norm)


class Optim(Grown):
    """AdamW or SGD; the learning rate rises linearly, then falls to zero along a half cosine.

    Attributes:
        algorithm: `adamw` or `sgd`.
        momentum: momentum of `sgd`; AdamW has torch's betas.
        lr: learning rate after the warm-up.
        weight_decay: weight decay.
        steps: optimiser steps of the whole training.
        warmup: first steps, over which the learning rate rises from 0.
        batch_size: images a step.
        grad_clip: largest norm of the gradient, to which longer ones are scaled; 0 for no limit.
        accumulate: parts in which each process computes its images of a step, one after the other, so that
            they need less memory. The gradient is that of all images at once, to rounding; every part's
            forward is computed twice.
    """

    later: ClassVar[frozenset[str]] = frozenset({"algorithm", "momentum", "accumulate"})

    algorithm: Literal["adamw", "sgd"] = "adamw"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    lr: float = Field(gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    steps: int = Field(ge=1)
    warmup: int = Field(default=0, ge=0)
    batch_size: int = Field(ge=1)
    grad_clip: float = Field(default=0.0, ge=0)
    accumulate: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _momentum_of_sgd(self) -> Optim:
        if self.algorithm != "sgd" and self.momentum != type(self).model_fields["momentum"].default:
            raise ValueError(
                f"momentum = {self.momentum:g} goes with algorithm = 'sgd', not {self.algorithm!r}"
            )
        return self


class Lora(Card):
    """Low-rank adapters on the student's image tower, through peft; merged when saved.

    Attributes:
        r: rank of the adapters.
        alpha: scale of the adapters: they are multiplied by alpha / r.
        dropout: dropout rate in front of the adapters.
        targets: last parts of the names of modules that get adapters: an attention (`attn`) or a linear
            layer.
    """

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    targets: tuple[str, ...] = ("attn",)


class Prompts(Card):
    """Learned tokens in both towers of a frozen student, and of every learning teacher.

    Attributes:
        image: tokens after the patches; 0 leaves the image tower as it is.
        text: tokens between the start token and the sentence; 0 leaves the text tower as it is.
        depth: layers that get tokens of their own, the input included.
        init: words whose embeddings the text tokens at the input start from; all others start from noise.
    """

    image: int = Field(default=2, ge=0)
    text: int = Field(default=2, ge=0)
    depth: int = Field(default=9, ge=1)
    init: str = "a photo of a"


class Compute(Grown):
    """How the sums are done, where that is not fp32 as PyTorch does it; each may change last bits or more.

    Attributes:
        precision: of the image towers in training; `bf16` is autocast. Losses, text, probe and weights stay
            in fp32.
        compile: image towers through `torch.compile`.
        channels_last: memory format of the student's convolutions.
        fused_adamw: AdamW in one kernel.
        fsdp: the weights of the student's image tower, their gradients and their moments are sharded over the
            processes, by torch's FSDP2; with one process there is nothing to shard.
    """

    later: ClassVar[frozenset[str]] = frozenset({"fsdp"})

    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    channels_last: bool = False
    fused_adamw: bool = False
    fsdp: bool = False

    @model_validator(mode="after")
    def _what_goes_with_fsdp(self) -> Compute:
        for name in ("compile", "channels_last"):
            if self.fsdp and getattr(self, name):
                raise ValueError(f"fsdp and {name} do not go together: leave one of them out")
        return self


class Probe(Card):
    """The validation probe: PGD on a fixed subset of a held-out split that holds all classes.

    Attributes:
        every: training steps between two probes.
        n: images of the probe; 0 means all of the split.
        split: split of the training dataset.
        steps: PGD steps.
    """

    every: int = Field(ge=1)
    n: int = Field(default=256, ge=0)
    split: str = "test"
    steps: int = Field(default=10, ge=1)


class Phase(Card):
    """A model that teaches first, in place of the teacher of a role.

    Attributes:
        until: share of the steps of the training up to which it teaches.
        model: model id or checkpoint folder, or a saved step of a finished run:
            `runs/NAME/checkpoints/step_0000200.safetensors`.
    """

    until: float = Field(gt=0, lt=1)
    model: str


class Recipe(Grown):
    """One training run worth repeating.

    Attributes:
        student: model id or checkpoint folder that training starts from.
        teachers: model id or checkpoint folder of each role that the defense names. A role can also be a
            table of `model` and `phases`, which is read into the two keys.
        phases: models that teach before the teacher of a role, in the order of their `until`, such as its own
            earlier checkpoints.
        defense: name of the defense, or `module:Class`; its own fields are further keys of this table.
        data: the training images.
        inner: the attack in training; absent for a defense without one.
        optim: optimiser, learning rate and length of the training.
        lora: train low-rank adapters in place of the whole image tower.
        prompts: train learned tokens in place of the whole tower or of adapters.
        compute: precision and kernels; without this table, fp32.
        probe: accuracy on held-out images during training; absent for none.
        seed: seed of the order of images and of all noise.
        checkpoint_every: steps between checkpoints; 0 for none. The finished folder is always written.
        interpolation: share of the trained image tower in the finished one, weight by weight; the rest is the
            student as training found it (WiSE-FT, arXiv:2109.01903). Less than 1 gives back clean accuracy
            for robust accuracy, and costs no training.
    """

    later: ClassVar[frozenset[str]] = frozenset({"prompts", "compute", "phases", "interpolation"})

    name: str
    title: str
    student: str
    teachers: dict[str, str] = Field(default_factory=dict)
    phases: dict[str, tuple[Phase, ...]] = Field(default_factory=dict)
    defense: dict[str, Any]
    data: DataChoice
    inner: Inner | None = None
    optim: Optim
    lora: Lora | None = None
    prompts: Prompts | None = None
    compute: Compute = Compute()
    probe: Probe | None = None
    seed: int = 0
    checkpoint_every: int = Field(default=0, ge=0)
    interpolation: float = Field(default=1.0, gt=0, le=1)
    notes: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _phases_of_teachers(cls, table: Any) -> Any:  # noqa: ANN401 - whatever a file has
        """`teachers.ROLE = { model = ..., phases = [...] }` as the two keys."""
        teachers = table.get("teachers") if isinstance(table, dict) else None
        if not isinstance(teachers, dict):
            return table
        staged = {role: t for role, t in teachers.items() if isinstance(t, dict)}
        for role, teacher in staged.items():
            if set(teacher) != {"model", "phases"}:
                raise ValueError(
                    f"teachers.{role} has {sorted(teacher)}, expected a model id, or model and phases"
                )
            if role in table.get("phases", {}):
                raise ValueError(f"phases.{role} and teachers.{role}.phases are two lists: leave one out")
        if not staged:
            return table
        models = {role: staged[role]["model"] if role in staged else t for role, t in teachers.items()}
        phases = {role: teacher["phases"] for role, teacher in staged.items()}
        return {**table, "teachers": models, "phases": {**table.get("phases", {}), **phases}}

    @model_validator(mode="after")
    def _phases_in_order(self) -> Recipe:
        for role, phases in self.phases.items():
            if role not in self.teachers:
                raise ValueError(f"phases.{role} without teachers.{role}, which teaches after them")
            ends = [phase.until for phase in phases]
            if ends != sorted(set(ends)):
                raise ValueError(f"phases.{role}: until = {ends}, expected rising numbers")
        return self

    @model_validator(mode="after")
    def _one_way_to_train(self) -> Recipe:
        if self.lora is not None and self.prompts is not None:
            raise ValueError("[lora] and [prompts] are two ways to train: leave one out")
        if self.prompts is not None and self.prompts.image + self.prompts.text == 0:
            raise ValueError("[prompts] without a token trains nothing")
        if self.prompts is not None and self.interpolation != 1:
            raise ValueError("interpolation is of image towers, and [prompts] leaves the tower as it is")
        if self.prompts is not None and self.compute.fsdp:
            raise ValueError("compute.fsdp shards the weights that are trained, and [prompts] trains none")
        if self.compute.fused_adamw and self.optim.algorithm != "adamw":
            raise ValueError(f"compute.fused_adamw is of adamw, optim.algorithm is {self.optim.algorithm}")
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that the training loads, once: the student, the teachers, and those of phases."""
        staged = [phase.model for phases in self.phases.values() for phase in phases]
        return tuple(dict.fromkeys([self.student, *self.teachers.values(), *staged]))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the resolved recipe, and of the correction of its loss where there was one."""
        table = self.model_dump(mode="json")
        return fingerprint({**table, "corrected": 1} if _corrected(self.defense) else table)


def _corrected(defense: Mapping[str, Any]) -> bool:
    """Whether earlier runs of these very fields had another loss, so that they are other runs.

    In `mmt-ard`, the gate on standardised confidences had a deviation within batches in place of a pooled
    one, and the direction from text to image of `full` had the logit scale 100 for every model.
    """
    if defense.get("name") != "mmt-ard" or defense.get("weighting") not in ("paper", "full"):
        return False
    own_scale = defense["weighting"] == "full" and defense.get("text_scale") is None
    return own_scale or defense.get("gap") != "log"
