"""Who attacks and how: the native engine in one of its two modes, or a package; one call for all of them.

A finding of the native engine in mode `fast` is a property of (model, image, threat, attack, seed). Everybody
else draws noise in batches, so what they find depends on which images are attacked together; those batches
are `rows` consecutive images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from robustbench_vlm.backends import autoattack, packages, reference, torchattacks
from robustbench_vlm.backends.packages import Order, Package
from robustbench_vlm.engine import scheduler, trajectories
from robustbench_vlm.engine.attacked_view import PLAIN, Sight
from robustbench_vlm.engine.interface import Attack, Stop
from robustbench_vlm.engine.job import Block, Cost
from robustbench_vlm.errors import InputError, nearest
from robustbench_vlm.threat import Threat
from robustbench_vlm.types import Classify, Finding

Engine = Literal["native", "autoattack", "torchattacks"]
Mode = Literal["fast", "reference"]

NATIVE = {"fast": "native/2", "reference": "native-reference/1"}
"""What results say about the native engine, by mode; to be raised whenever one may find otherwise."""
ADAPTER = 1  # likewise, of the adapters of packages

Stages = Sequence[tuple[str, Attack]]


@dataclass(frozen=True)
class Means:
    """Who attacks and how.

    Attributes:
        engine: `native`, or the package that attacks instead.
        mode: of the native engine: `fast`, or `reference`, in lock-step with the reference's noise.
        sight: how attacks see the model; verdicts are in fp32 whatever it is.
    """

    engine: str = "native"
    mode: str = "fast"
    sight: Sight = PLAIN

    def __post_init__(self) -> None:
        for what, name, known in (("engine", self.engine, Engine), ("mode", self.mode, Mode)):
            if name not in get_args(known):
                raise InputError(f"--{what} {name}", f"no such {what}", do=nearest(name, get_args(known)))
        if self.engine != "native" and self.mode != "fast":
            found = f"a mode of the native engine, with --engine {self.engine}"
            raise InputError(f"--mode {self.mode}", found, do="leave out one of the two")
        if self.mode == "reference" and self.sight != PLAIN:
            found = f"{self.sight.label}, and the reference's numbers are those of the plain model in fp32"
            raise InputError("--mode reference", found, do="leave it out, or use --mode fast")
        if self.engine != "native" and (self.sight.compiled or self.sight.graphs):
            found = "the package asks for batches of its own, and sees the model as it is"
            raise InputError(f"--engine {self.engine}", found, do="leave --compile and --cuda-graphs out")

    @property
    def keyed(self) -> bool:
        """Whether a finding is a property of its image, whatever is attacked beside it."""
        return self.engine == "native" and self.mode == "fast"

    @property
    def label(self) -> str:
        """What a result says about its engine: name, mode, version, and those of a package.

        Raises:
            InputError: the package is not installed.
        """
        if self.engine == "native":
            return NATIVE[self.mode]
        return f"{self.engine}/{packages.version(package(self.engine).name)}/{ADAPTER}"

    @property
    def title(self) -> str:
        """For people: `native fast`, `autoattack`."""
        return f"{self.engine} {self.mode}" if self.engine == "native" else self.engine


def package(engine: str) -> Package:
    """The package behind an engine that is not native.

    Raises:
        InputError: it is not installed; the message says how to get it.
    """
    return autoattack.package() if engine == "autoattack" else torchattacks.package()


def there() -> dict[str, tuple[str, str]]:
    """Package engines: what is installed, as name and version, else an empty text; and how to get it."""
    rows = {}
    for engine_name, adapter in (("autoattack", autoattack), ("torchattacks", torchattacks)):
        name = packages.installed(adapter.NAMES)
        rows[engine_name] = (packages.version(name) if name else "", adapter.INSTALL)
    return rows


def refuse(
    means: Means,
    stages: Stages,
    threat: Threat,
    *,
    n_classes: int,
    stop: Stop,
    live: int | None = None,
    shape: tuple[int, int] | None = None,
) -> None:
    """Refuse a chain that cannot be carried out so; costs nothing, so it comes before everything that does.

    Args:
        means: who attacks and how.
        stages: name and attack of each stage.
        threat: ball and radius.
        n_classes: classes that the model tells apart.
        stop: when a trajectory ends.
        live: rows in use, if asked for.
        shape: (H, W) of the images, where known.

    Raises:
        InputError: what cannot be done, and what to do about it.
    """
    if not means.keyed and live is not None:
        found = f"{means.title} draws its noise in batches, of as many rows as the chain says"
        raise InputError(f"--batch-size {live}", found, do="leave it out")
    if means.mode == "reference":
        reference.refuse(stages, threat, stop)
    if means.engine != "native":
        found_package = package(means.engine)
        for name, attack in stages:
            found_package.translate(Order(name, attack, threat, 0, n_classes, stop, shape))


def tables(means: Means, stages: Stages) -> list[list[tuple[str, Attack]]]:
    """The stages of a chain in the groups that `run` is given: one by one unless they share rows."""
    return trajectories.tables(stages) if means.keyed else [[stage] for stage in stages]


def batches(means: Means, members: Sequence[int], left: Collection[int], rows: int) -> list[int]:
    """The members to run where only some are left: these, or whole batches with one of them in it."""
    if means.keyed:
        return [i for i in members if i in left]
    chunks = [members[begin : begin + rows] for begin in range(0, len(members), rows)]
    return [i for chunk in chunks if any(i in left for i in chunk) for i in chunk]


def chain(  # noqa: PLR0913 - as `run`
    means: Means,
    classify: Classify,
    images: Tensor,
    labels: Tensor,
    keys: Sequence[str],
    stages: Stages,
    threat: Threat,
    *,
    seed: int,
    n_classes: int,
    rows: int,
    clean: Tensor,
    live: int | None = None,
    stop: Stop = "first",
    find: Classify | None = None,
    on_finding: Callable[[Finding], None],
) -> Cost:
    """`run` over all stages of a chain, each group on the survivors of the one before; what all took."""
    ended: set[str] = set()
    costs = []

    def take(finding: Finding) -> None:
        if finding.broken or finding.error:
            ended.add(finding.key)
        on_finding(finding)

    for group in tables(means, stages):
        standing = [i for i, key in enumerate(keys) if key not in ended]
        chosen = torch.tensor(standing, dtype=torch.int64, device=images.device)
        costs.append(
            run(
                means, classify, images[chosen], labels[chosen], [keys[i] for i in standing], group, threat,
                seed=seed, n_classes=n_classes, rows=rows, clean=clean[chosen], live=live, stop=stop,
                find=find, on_finding=take,
            )
        )  # fmt: skip
    return total(costs)


def total(costs: Sequence[Cost]) -> Cost:
    """What several runs took together."""
    names = [field.name for field in dataclasses.fields(Cost)]
    return Cost(**{name: sum(getattr(cost, name) for cost in costs) for name in names})


def stream(  # noqa: PLR0913 - as `run`
    means: Means,
    classify: Classify,
    blocks: Iterable[Block],
    stages: Stages,
    threat: Threat,
    *,
    seed: int,
    n_classes: int,
    rows: int,
    live: int | None = None,
    stop: Stop = "first",
    find: Classify | None = None,
    on_finding: Callable[[Finding], None],
) -> Cost:
    """`run` over blocks of images; each but the last holds whole batches of `rows`.

    The native engine takes the next block when it is about to run out of images, so its rows stay full; the
    others do one after another.
    """
    left = iter(blocks)

    def attack(block: Block, more: Iterable[Block]) -> Cost:
        return run(
            means, classify, block.images, block.labels, block.keys, stages, threat, seed=seed,
            n_classes=n_classes, rows=rows, live=live, stop=stop, clean=block.clean, begin=block.begin,
            more=more, find=find, on_finding=on_finding,
        )  # fmt: skip

    return total([attack(block, left if means.keyed else ()) for block in left])


def run(  # noqa: PLR0913 - as `engine.run`
    means: Means,
    classify: Classify,
    images: Tensor,
    labels: Tensor,
    keys: Sequence[str],
    stages: Stages,
    threat: Threat,
    *,
    seed: int,
    n_classes: int,
    rows: int,
    live: int | None = None,
    stop: Stop = "first",
    clean: Tensor | None = None,
    begin: Sequence[int] | None = None,
    more: Iterable[Block] = (),
    find: Classify | None = None,
    on_finding: Callable[[Finding], None],
) -> Cost:
    """`engine.run` by whoever is meant; args as there, `stages` one of `tables`, `more` in mode fast alone.

    Raises:
        InputError: what cannot be carried out so, or arguments that disagree.
        AttackError: the attack left the ball or the box, or the model gives no gradient.
    """
    shape = (int(images.shape[2]), int(images.shape[3]))
    refuse(means, stages, threat, n_classes=n_classes, stop=stop, live=live, shape=shape)
    if means.engine != "native":
        return packages.run(
            package(means.engine), classify, images, labels, keys, stages, threat, seed=seed,
            n_classes=n_classes, rows=rows, stop=stop, clean=clean, find=find, on_finding=on_finding,
        )  # fmt: skip
    if means.mode == "reference":
        return reference.run(
            classify, images, labels, keys, stages, threat, seed=seed, n_classes=n_classes, rows=rows,
            clean=clean, on_finding=on_finding,
        )  # fmt: skip
    return scheduler.run(
        classify, images, labels, keys, stages, threat, seed=seed, n_classes=n_classes, rows=rows, live=live,
        stop=stop, clean=clean, begin=begin, more=more, find=find, on_finding=on_finding,
    )  # fmt: skip
