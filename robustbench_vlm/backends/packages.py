"""Attack packages of others behind our interface: their adversarial images, our verdicts.

A package attacks the survivors of each stage in consecutive batches, as it would by itself, through the model
in our fixed shape. Our canonical pass decides about every image that it returns, and an image outside ball or
box is an error, so a finding means the same as one of the native engine. Packages do not tell targets,
iterations and passes of an image, so its finding has none. The noise of a package depends on the batch, so a
batch is the smallest piece of work: a batch that was interrupted is run again from its start.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from robustbench_vlm.backends.guarded_model import GuardedModel
from robustbench_vlm.engine import geometry, losses, verification
from robustbench_vlm.engine.interface import Attack
from robustbench_vlm.engine.job import Cost, ImageBlock, Job, Model, OnFinding, PreparedBlock, prepare
from robustbench_vlm.engine.verification import Verification
from robustbench_vlm.errors import InputError
from robustbench_vlm.types import Finding

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
"""Names of the norms in the packages."""

Perturb = Callable[[Tensor, Tensor], Tensor]
"""(images, labels) -> adversarial images; the image itself where nothing was found."""


@dataclass(frozen=True)
class PackageCall:
    """An attack of a package.

    Attributes:
        kind: name of its class in the package.
        settings: arguments of its constructor.
    """

    kind: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class PackageStage:
    """One stage of a job, as an adapter translates it into a `PackageCall`.

    Attributes:
        name: of the stage.
        attack: its configuration.
        job: threat, seed, classes and stopping rule; a package seeds its noise with the seed for every batch.
        shape: (H, W) of the images, where known.
    """

    name: str
    attack: Attack
    job: Job
    shape: tuple[int, int] | None = None

    @property
    def common(self) -> dict[str, Any]:
        """Arguments that most attacks of every package have, under the names that they share."""
        threat = self.job.threat
        return {"norm": NORMS[threat.norm], "eps": geometry.radius(threat), "seed": self.job.seed}

    @property
    def targets(self) -> int:
        """Number of target classes: as configured, or all wrong classes where they are fewer."""
        return self.attack.target_count(self.job.n_classes)

    def refusal(self, package: str, what: str = "") -> InputError:
        """The error for something that the package cannot do, or for an attack that it does not have."""
        kind = type(self.attack).__name__.lower() + (f" with {what}" if what else "")
        where = f"--engine {package}, stage {self.name}"
        return InputError(where, f"the package has no {kind}", do="use --engine native")

    def require(self, package: str, norms: Sequence[str], *fields: str) -> None:
        """Refuse what a package cannot do: a norm beside `norms`, a field beside `fields`.

        Raises:
            InputError: another norm, a stopping rule or a loss that the package does not have; a field that
                it does not have and that is not at its default.
        """
        norm, n_classes = self.job.threat.norm, self.job.n_classes
        if norm not in norms:
            raise self.refusal(package, f"norm {norm!r}")
        if self.job.stop == "best":
            raise self.refusal(package, "stop = 'best'")
        attack: Any = self.attack  # a dataclass, which its type does not say
        for field in dataclasses.fields(attack):
            value = getattr(self.attack, field.name)
            if field.name not in fields and value != field.default:
                raise self.refusal(package, f"{field.name} = {value!r}")
        loss: losses.Name | None = getattr(self.attack, "loss", None)
        if loss is not None and losses.effective(loss, n_classes) != loss:
            raise self.refusal(package, f"loss = {loss!r} and {n_classes} classes")


class Package(Protocol):
    """The adapter of an attack package."""

    @property
    def name(self) -> str:
        """Name of the module that is imported."""
        ...

    def translate(self, stage: PackageStage) -> PackageCall:
        """The attack of the package that performs one stage.

        Raises:
            InputError: the package has none.
        """
        ...

    def build(self, call: PackageCall, model: nn.Module, device: torch.device) -> Perturb:
        """That attack, constructed for a model."""
        ...


def load(module: str) -> ModuleType:
    """Import a module of an installed package.

    Raises:
        InputError: a module that it imports is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise InputError(
            f"package {package}", f"it needs {error.name}", do=f"pip install {error.name}"
        ) from None


@contextmanager
def isolated_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators inside, and restore them outside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def run(package: Package, model: Model, job: Job, block: ImageBlock, on_finding: OnFinding) -> Cost:
    """Run all stages of a job by a package, in batches of `job.rows` images.

    The adversarial image of a finding that is not broken is the clean image.

    Raises:
        InputError: a stage that the package does not have, found before any attack; images that disagree
            with the job.
        AttackError: the package returned an image outside ball or box, or the model gives no gradient.
    """
    job.check()
    images = prepare(block, model, job)
    shape = (int(images.images.shape[2]), int(images.images.shape[3]))
    calls = [package.translate(PackageStage(name, attack, job, shape)) for name, attack in job.stages]
    if not len(images.keys):
        return Cost()
    guarded = GuardedModel(model.attacked, job.rows, images.images.device)
    first = [job.stages[0][0]] * len(images.keys)
    standing = verification.report_misclassified(images, first, on_finding)
    batches = 0
    for (name, _), call in zip(job.stages, calls, strict=True):
        perturb, survivors = package.build(call, guarded, images.images.device), []
        batch = _Batch(name, f"{name}: {package.name} left", perturb, guarded, model, job, images)
        for begin in range(0, len(standing), job.rows):
            members = standing[begin : begin + job.rows]
            batches += 1
            for i, finding in batch.attack(members):
                if not finding.broken and not finding.error:
                    survivors.append(i)
                on_finding(finding)
        standing = survivors
    largest = job.rows if batches else 0
    return Cost(guarded.forwards, guarded.gradients, images.calls + batches, largest=largest)


@dataclass(frozen=True)
class _Batch:
    """One stage of a run; `attack` is called for one batch of images after the other."""

    stage: str
    subject: str  # beginning of the message about an image outside ball or box
    perturb: Perturb
    guarded: GuardedModel
    model: Model
    job: Job
    block: PreparedBlock

    def attack(self, members: Sequence[int]) -> Iterator[tuple[int, Finding]]:
        """Position and finding of each image of a batch."""
        images = self.block.images
        index = torch.tensor(members, device=images.device)
        x, y = images.index_select(0, index), self.block.labels.index_select(0, index)
        with isolated_generators(self.job.seed, images.device), self.guarded.attacked(x):
            adv = self.perturb(x.clone(), y.clone()).detach()
        verified = verification.verify(self.model, self.job, adv, x, y)
        for number, (i, result, image) in enumerate(zip(members, verified, adv.cpu(), strict=True)):
            nonfinite = number in self.guarded.nonfinite or not result.finite
            nonfinite = nonfinite or not bool(image.isfinite().all())
            if not nonfinite:
                result.require_inside(self.job, f"{self.subject} {self.block.keys[i]}")
            yield i, self._finding(i, result, image, nonfinite=nonfinite)

    def _finding(self, i: int, result: Verification, adv: Tensor, *, nonfinite: bool) -> Finding:
        """The finding about the image at position i; with the clean image where nothing was found."""
        block, label = self.block, int(self.block.labels[i])
        margin = float(losses.correct_margin(block.clean[[i]], block.labels[[i]]))
        image = block.images[i].detach().cpu().clone()
        clean = Finding(block.keys[i], False, image, -1, 0, -1, 0, 0, label, margin, stage=self.stage)
        if nonfinite:
            error = f"{self.stage}: a logit, a gradient or a pixel is not finite"
            return dataclasses.replace(clean, error=error)
        if result.prediction == label:
            return clean
        return dataclasses.replace(
            clean, broken=True, adv=adv.clone(), prediction=result.prediction, margin=result.margin
        )
