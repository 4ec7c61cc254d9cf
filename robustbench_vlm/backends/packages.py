"""Attack packages of others behind our interface: their images, our verdicts.

A package attacks the survivors of each stage in consecutive batches, as it would by itself, through the model
in our fixed shape. Whatever it returns is judged by our canonical pass and held to ball and box, so a finding
says the same as one of our own; of targets, iterations and passes it keeps no record. Its noise depends on
the batch, and nothing is resumed in the middle of a batch.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from robustbench_vlm.backends.guarded_model import Seen
from robustbench_vlm.engine import canonical, geometry, losses, verification
from robustbench_vlm.engine.interface import Attack, Stop
from robustbench_vlm.engine.job import Cost, check
from robustbench_vlm.errors import AttackError, InputError
from robustbench_vlm.threat import Threat
from robustbench_vlm.types import Classify, Finding

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
"""What packages call the norms."""

Perturb = Callable[[Tensor, Tensor], Tensor]
"""(images, labels) -> adversarial images, or the images themselves where nothing was found."""


@dataclass(frozen=True)
class Order:
    """One stage, as a package is asked to run it.

    Attributes:
        stage: its name.
        attack: its configuration.
        threat: ball and radius.
        seed: with which the package seeds its noise for every batch.
        n_classes: classes of the model.
        stop: of the chain; see `interface.Rows`.
        shape: (H, W) of the images, where known.
    """

    stage: str
    attack: Attack
    threat: Threat
    seed: int
    n_classes: int
    stop: Stop
    shape: tuple[int, int] | None = None

    @property
    def common(self) -> dict[str, Any]:
        """What most attacks of every package are told, by the names that they share."""
        return {"norm": NORMS[self.threat.norm], "eps": geometry.radius(self.threat), "seed": self.seed}

    @property
    def targets(self) -> int:
        """Classes that are aimed at: as configured, or all wrong ones where they are fewer."""
        return self.attack.ranks(self.n_classes)

    def refusal(self, package: str, what: str = "") -> InputError:
        """The error that says that the package cannot do something, or has no such attack at all."""
        kind = type(self.attack).__name__.lower() + (f" with {what}" if what else "")
        where = f"--engine {package}, stage {self.stage}"
        return InputError(where, f"the package has no {kind}", do="use --engine native")

    def require(self, package: str, norms: Sequence[str], *fields: str) -> None:
        """Refuse what a package cannot do: other norms than these, and more than these fields.

        Raises:
            InputError: a norm, a stopping rule, a loss that few classes change; a field set otherwise than by
                default.
        """
        if self.threat.norm not in norms:
            raise self.refusal(package, f"norm {self.threat.norm!r}")
        if self.stop == "best":
            raise self.refusal(package, "stop = 'best'")
        attack: Any = self.attack  # a dataclass, which its protocol does not say
        for field in dataclasses.fields(attack):
            value = getattr(self.attack, field.name)
            if field.name not in fields and value != field.default:
                raise self.refusal(package, f"{field.name} = {value!r}")
        loss: losses.Name | None = getattr(self.attack, "loss", None)
        if loss is not None and losses.effective(loss, self.n_classes) != loss:
            raise self.refusal(package, f"loss = {loss!r} and {self.n_classes} classes")


@dataclass(frozen=True)
class Call:
    """What a package is asked for: an attack by its name there, and all that it is told."""

    kind: str
    settings: Mapping[str, Any]


class Package(Protocol):
    """A package that can attack."""

    @property
    def name(self) -> str:
        """Under which it is imported."""
        ...

    def translate(self, order: Order) -> Call:
        """The attack of the package that does one stage.

        Raises:
            InputError: it has none.
        """
        ...

    def build(self, call: Call, model: nn.Module, device: torch.device) -> Perturb:
        """That attack, ready for a model."""
        ...


def installed(names: Sequence[str]) -> str | None:
    """The first of these modules that is there; nothing is imported."""
    return next((name for name in names if importlib.util.find_spec(name) is not None), None)


def version(name: str) -> str:
    """Name and version of an installed package, as results state them."""
    try:
        return f"{name}-{importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name}-unversioned"  # a folder on the path


def load(module: str) -> ModuleType:
    """A module of an installed package.

    Raises:
        InputError: something that it needs is missing.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise InputError(
            f"package {package}", f"it needs {error.name}", do=f"pip install {error.name}"
        ) from None


@contextmanager
def fenced(seed: int, device: torch.device) -> Iterator[None]:
    """Seeded global generators inside; outside they stay what they were, whatever a package does to them."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def run(  # noqa: PLR0913 - as `engine.run`
    package: Package,
    classify: Classify,
    images: Tensor,
    labels: Tensor,
    keys: Sequence[str],
    stages: Sequence[tuple[str, Attack]],
    threat: Threat,
    *,
    seed: int,
    n_classes: int,
    rows: int,
    stop: Stop = "first",
    clean: Tensor | None = None,
    find: Classify | None = None,
    on_finding: Callable[[Finding], None],
) -> Cost:
    """As `engine.run`, by the package, in batches of `rows` images.

    Args as those of `engine.run`. The image of a finding that is not broken is the clean one.

    Raises:
        InputError: what the package cannot express, found before any attack; arguments that disagree.
        AttackError: an image is outside ball or box.
    """
    check(images, labels, keys, stages, threat, rows, rows, n_classes)
    shape = (int(images.shape[2]), int(images.shape[3]))
    orders = [Order(name, attack, threat, seed, n_classes, stop, shape) for name, attack in stages]
    calls = [package.translate(order) for order in orders]
    if not len(images):
        return Cost(0, 0, 0, 0)
    judged = 0
    if clean is None:
        clean, judged = canonical.logits(classify, images, rows), -(-len(images) // rows)
    model = Seen(find or classify, rows, images.device)
    margins = losses.judge(clean, labels).tolist()
    standing = verification.attackable(clean, images, labels, keys, [stages[0][0]] * len(images), on_finding)
    for (stage, _), call in zip(stages, calls, strict=True):
        perturb, survivors = package.build(call, model, images.device), []
        for chunk in [standing[begin : begin + rows] for begin in range(0, len(standing), rows)]:
            index = torch.tensor(chunk, device=images.device)
            x, y = images.index_select(0, index), labels.index_select(0, index)
            with fenced(seed, images.device), model.attacked(x):
                adv = perturb(x.clone(), y.clone()).detach()
            said = verification.opinions(classify, adv, x, y, threat, rows)
            judged += 1
            for place, (i, opinion, image) in enumerate(zip(chunk, said, adv.cpu(), strict=True)):
                sick = place in model.sick or not opinion.finite or not bool(image.isfinite().all())
                if not sick and opinion.excess > geometry.slack(threat):
                    where = f"{opinion.excess:.3g} outside {threat} or [0, 1]"
                    raise AttackError(f"{stage}: {package.name} left {keys[i]} {where}")
                unbroken = _unbroken(keys[i], stage, int(y[place]), margins[i], images[i])
                finding = _finding(unbroken, opinion, image, sick)
                if not finding.broken and not finding.error:
                    survivors.append(i)
                on_finding(finding)
        standing = survivors
    return Cost(model.forwards, model.gradients, judged, 0)


def _unbroken(key: str, stage: str, label: int, margin: float, image: Tensor) -> Finding:
    """That nothing was found: the clean image, with its label and margin."""
    return Finding(key, False, image.detach().cpu().clone(), -1, 0, -1, 0, 0, label, margin, stage=stage)


def _finding(unbroken: Finding, said: verification.Opinion, adv: Tensor, sick: bool) -> Finding:
    """What a package found on one image; `sick` says that a number on the way was not finite."""
    if sick:
        what = "a logit, a gradient or a pixel is not finite"
        return dataclasses.replace(unbroken, error=f"{unbroken.stage}: {what}")
    if said.prediction == unbroken.prediction:
        return unbroken
    return dataclasses.replace(
        unbroken, broken=True, adv=adv.clone(), prediction=said.prediction, margin=said.margin
    )
