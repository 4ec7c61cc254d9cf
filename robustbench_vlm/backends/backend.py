"""The backends that can attack: the native engine in one of its two modes, or an attack package.

A finding of the native engine in mode `fast` is a property of (model, image, threat, attack, seed). The other
backends draw noise in batches, so what they find depends on which images are attacked together; their batches
are `Job.rows` consecutive images.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from robustbench_vlm.backends import (
    autoattack,
    distinct_classes,
    installed,
    packages,
    reference,
    torchattacks,
)
from robustbench_vlm.backends.packages import Package, PackageStage
from robustbench_vlm.engine import scheduler, trajectories
from robustbench_vlm.engine.attacked_view import PLAIN, Precision
from robustbench_vlm.engine.job import Cost, ImageBlock, Job, Model, OnFinding, Stages, total
from robustbench_vlm.errors import InputError, nearest
from robustbench_vlm.types import Finding

Name = Literal["native", "autoattack", "torchattacks"]
Mode = Literal["fast", "reference"]

NATIVE = {"fast": "native/3", "reference": "native-reference/1"}
"""What results state about the native engine, by mode; to be raised whenever a mode may find otherwise."""
ADAPTER = 1  # the same for the adapters of packages


@dataclass(frozen=True)
class Backend:
    """Who attacks, and in which precision the model is attacked.

    Attributes:
        name: `native`, or the package that attacks instead.
        mode: of the native engine: `fast`, or `reference`: in the schedule and with the noise of the
            reference implementation.
        precision: of the attacked view of the model; verdicts are always in fp32.
    """

    name: str = "native"
    mode: str = "fast"
    precision: Precision = PLAIN

    def __post_init__(self) -> None:
        for flag, name, known in (("engine", self.name, Name), ("mode", self.mode, Mode)):
            if name not in get_args(known):
                raise InputError(f"--{flag} {name}", f"no such {flag}", do=nearest(name, get_args(known)))
        if self.name != "native" and self.mode != "fast":
            found = f"a mode of the native engine, with --engine {self.name}"
            raise InputError(f"--mode {self.mode}", found, do="leave out one of the two")
        if self.mode == "reference" and self.precision != PLAIN:
            found = (
                f"{self.precision.label}, and the reference's numbers are those of the plain model in fp32"
            )
            raise InputError("--mode reference", found, do="leave it out, or use --mode fast")
        if self.name != "native" and (self.precision.compiled or self.precision.graphs):
            found = "the package calls the model in batches of its own, uncompiled"
            raise InputError(f"--engine {self.name}", found, do="leave --compile and --cuda-graphs out")

    @property
    def keyed(self) -> bool:
        """Whether a finding is a property of its image, whatever is attacked beside it."""
        return self.name == "native" and self.mode == "fast"

    @property
    def label(self) -> str:
        """The column `engine` of a result: name, mode and version, and those of a package.

        Raises:
            InputError: the package is not installed.
        """
        if self.name == "native":
            return NATIVE[self.mode]
        return f"{self.name}/{installed.version(package(self.name).name)}/{ADAPTER}"

    @property
    def title(self) -> str:
        """Name for tables and messages: `native fast`, `autoattack`."""
        return f"{self.name} {self.mode}" if self.name == "native" else self.name

    def require(self, job: Job, shape: tuple[int, int] | None = None) -> None:
        """Refuse a job that this backend cannot perform, before any time is spent.

        Args:
            job: to be performed.
            shape: (H, W) of the images, where known.

        Raises:
            InputError: what cannot be done, and what to type instead.
        """
        if not self.keyed and job.batch_size is not None:
            found = f"{self.title} draws its noise in batches, of as many rows as the chain says"
            raise InputError(f"--batch-size {job.batch_size}", found, do="leave it out")
        if self.mode == "reference":
            reference.require(job)
        if self.name != "native":
            adapter = package(self.name)
            for name, attack in job.stages:
                adapter.translate(PackageStage(name, attack, job, shape))

    def groups(self, stages: Stages) -> list[Stages]:
        """The stages of a chain in the groups that `run` accepts: one by one, unless stages share rows."""
        return trajectories.groups(stages) if self.keyed else [[stage] for stage in stages]

    def batches(self, members: Sequence[int], left: Collection[int], rows: int) -> list[int]:
        """The members to attack where only some are left to do.

        These are the ones that are left, or every whole batch with one of them in it where noise is drawn in
        batches.
        """
        if self.keyed:
            return [i for i in members if i in left]
        chunks = [members[begin : begin + rows] for begin in range(0, len(members), rows)]
        return [i for chunk in chunks if any(i in left for i in chunk) for i in chunk]

    def run(self, model: Model, job: Job, blocks: Iterable[ImageBlock], on_finding: OnFinding) -> Cost:
        """Attack images, block by block, and report one finding for each stage that an image enters.

        The native engine opens the next block when it is about to run out of images, so its rows stay full.
        The other backends finish one block after the other.

        Args:
            model: canonical function and attacked view.
            job: classes that it calls tied are attacked as one class; its stages are one of `groups`.
            blocks: images; each block but the last holds whole batches of `job.rows`.
            on_finding: called once for each image and stage.

        Raises:
            InputError: what this backend cannot perform, or images that disagree with the job.
            AttackError: an attack left the ball or the box, or the model gives no gradient.
        """
        if job.tied is not None:
            return self.run(*distinct_classes.attacked(job.tied, model, job, blocks, on_finding))
        self.require(job)
        if self.keyed:
            return scheduler.run(model, job, blocks, on_finding)
        if self.name == "native":
            return total(reference.run(model, job, block, on_finding) for block in blocks)
        adapter = package(self.name)
        return total(packages.run(adapter, model, job, block, on_finding) for block in blocks)

    def run_chain(self, model: Model, job: Job, images: ImageBlock, on_finding: OnFinding) -> Cost:
        """As `run`, with all stages of a chain: each group is given the survivors of the one before."""
        ended: set[str] = set()

        def note(finding: Finding) -> None:
            if finding.broken or finding.error:
                ended.add(finding.key)
            on_finding(finding)

        def costs() -> Iterator[Cost]:
            for group in self.groups(job.stages):
                standing = [i for i, key in enumerate(images.keys) if key not in ended]
                yield self.run(model, job.of(group), [images.take(standing)], note)

        return total(costs())


def package(name: str) -> Package:
    """The adapter of a package.

    Raises:
        InputError: the package is not installed; the message says how to get it.
    """
    return autoattack.package() if name == "autoattack" else torchattacks.package()


def installed_packages() -> dict[str, tuple[str, str]]:
    """Each package by the name of its backend: what is installed (empty if nothing), and how to get it."""
    rows = {}
    for name, adapter in (("autoattack", autoattack), ("torchattacks", torchattacks)):
        module = installed.installed(adapter.NAMES)
        rows[name] = (installed.version(module) if module else "", adapter.INSTALL)
    return rows
