"""The reference mode of the native engine: our attacks in the reference's schedule, with its random numbers.

It exists for comparison with published numbers. Images go through a stage in consecutive batches, and all
rows of a batch step together until the last has ended. Noise comes from one generator for each batch and
stage, seeded with the seed, in the shapes in which the reference draws it; so a draw depends on which images
of the batch are still robust. A batch that was interrupted is run again from its start, and findings depend
on order and batch, which is why this is not the default. Global generators are never touched. Like the
reference it returns the last misclassified iterate, and the clean image where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.attacks.fab import Fab
from robustbench_vlm.attacks.square import Square
from robustbench_vlm.backends import reference_square
from robustbench_vlm.engine import losses, trajectories, verification
from robustbench_vlm.engine.interface import Attack, Rows, State
from robustbench_vlm.engine.job import Cost, ImageBlock, Job, Model, OnFinding, PreparedBlock, prepare
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.engine.row_ops import freeze, take
from robustbench_vlm.engine.trajectories import End, Trajectory
from robustbench_vlm.engine.verification import Verification
from robustbench_vlm.errors import AttackError, InputError
from robustbench_vlm.types import Finding

ATTACKS: tuple[type, ...] = (Apgd, Fab, Square)
NORMS = ("linf", "l2")
LOSSES = ("ce", "dlr", "targeted-dlr")

Feed = Callable[[State], None]
"""Called before every step with the state that is about to be stepped."""


@dataclass(frozen=True)
class BatchNoise:
    """Noise of the n images of a batch that are still robust, each draw from the generator of the batch.

    Attributes:
        generator: on the CPU.
        n: number of images.
    """

    generator: torch.Generator
    n: int

    def uniform(self, shape: tuple[int, ...], part: str = "") -> Tensor:  # noqa: ARG002 - draws are not named
        """(n, *shape) float32 on [0, 1)."""
        return torch.rand((self.n, *shape), generator=self.generator)

    def normal(self, shape: tuple[int, ...], part: str = "") -> Tensor:  # noqa: ARG002 - draws are not named
        """(n, *shape) float32, standard normal."""
        return torch.randn((self.n, *shape), generator=self.generator)

    def streams(self) -> list[np.random.Generator]:
        """Not available: the batch has one generator.

        Raises:
            AttackError: always.
        """
        raise AttackError("an attack with a stream for every row has no reference mode")


def require(job: Job) -> None:
    """Refuse a job that has no reference mode.

    Raises:
        InputError: an attack, a loss, a norm or a stopping rule that the reference does not have.
    """
    do = "type --mode fast"
    for name, attack in job.stages:
        # Subclasses are refused too: APGD with EOT draws from a random model, which cannot be repeated.
        if type(attack) not in ATTACKS or job.threat.norm not in NORMS:
            found = f"stage {name}, {type(attack).__name__.lower()} in {job.threat.norm}"
            raise InputError("--mode reference", found, "apgd, fab or square in linf or l2", do)
        if isinstance(attack, Apgd) and attack.loss not in LOSSES:
            raise InputError(
                "--mode reference", f"stage {name}, loss {attack.loss!r}", " or ".join(LOSSES), do
            )
    if job.stop == "best":
        raise InputError("--mode reference", "stop = 'best'", "'first' or 'last'", do)


def run(model: Model, job: Job, block: ImageBlock, on_finding: OnFinding) -> Cost:
    """Attack images in order, in batches of `job.rows`.

    The image of a finding that is not broken is the clean one.

    Raises:
        InputError: a norm or an attack that the reference does not have, or images that disagree with the
            job.
        AttackError: an attack left the ball or the box, or the model gives no gradient.
    """
    job.check()
    require(job)
    images = prepare(block, model, job)
    if not len(images.keys):
        return Cost()
    batches = _Batches(model, job, images, Oracle(model.canonical))
    first = [job.stages[0][0]] * len(images.keys)
    standing = verification.report_misclassified(images, first, on_finding)
    for number in range(len(job.stages)):
        survivors = []
        for begin in range(0, len(standing), job.rows):
            members = standing[begin : begin + job.rows]
            for i, finding in zip(members, batches.attack(number, members), strict=True):
                on_finding(finding)
                if not finding.broken and not finding.error:
                    survivors.append(i)
        standing = survivors
    calls = batches.oracle.calls
    made = images.calls + batches.verified
    return Cost(calls.forwards, calls.gradients, made, batches.unconfirmed, calls.largest)


class _Batches:
    """The images of a run, attacked batch by batch, and how many canonical calls that took."""

    def __init__(self, model: Model, job: Job, block: PreparedBlock, oracle: Oracle) -> None:
        self.model, self.job, self.block, self.oracle = model, job, block, oracle
        self.wrong = verification.wrong_classes(block.clean, block.labels)
        self.margins = losses.correct_margin(block.clean, block.labels).tolist()
        self.verified = self.unconfirmed = 0

    def attack(self, stage: int, members: Sequence[int]) -> list[Finding]:
        """The findings of one stage about one batch of images, in order."""
        attack = self.job.stages[stage][1]
        images = [trajectories.of_image(i, stage, attack, self.wrong[i]) for i in members]
        generator = torch.Generator().manual_seed(self.job.seed)
        for _ in images[0].pairs:
            robust = [image for image in images if image.finding is None]
            if not robust:
                break
            self._run(attack, [image.next() for image in robust], generator)
        return [image.finding for image in images if image.finding is not None]

    def _run(self, attack: Attack, started: list[Trajectory], generator: torch.Generator) -> None:
        """Run one trajectory of each robust image to its end, and note how they ended."""
        block, device, n = self.block, self.block.images.device, len(started)
        index = torch.tensor([trajectory.image.index for trajectory in started], device=device)
        rows = Rows(
            images=block.images.index_select(0, index),
            labels=block.labels.index_select(0, index),
            targets=torch.tensor([trajectory.pair[0] for trajectory in started], device=device),
            noise=BatchNoise(generator, n),
            restarts=tuple(trajectory.pair[1] for trajectory in started),
            stop="last",
        )
        state: State
        feed: Feed | None = None
        if isinstance(attack, Square):
            state, feed = reference_square.begin(attack, rows, self.job.threat, generator)
        else:
            state = attack.start(rows, self.job.threat)
        # rows without an image are copies of the last
        state = take(state, [min(row, n - 1) for row in range(self.job.rows)])
        state = take(_to_the_end(attack, state, n, self.oracle, feed), list(range(n)))
        verified = verification.verify(self.model, self.job, state.adv, rows.images, rows.labels)
        self.verified += 1
        for trajectory, end, result, adv in zip(
            started, trajectories.ends(state), verified, state.adv.cpu(), strict=True
        ):
            self._note(trajectory, end, result, adv)

    def _note(self, trajectory: Trajectory, end: End, result: Verification, adv: Tensor) -> None:
        """Enter the end of a trajectory, and its finding if that may be decisive."""
        finding = self._finding(trajectory, end, result, adv)
        if finding.broken or finding.error or trajectory.last:
            trajectory.image.decide(trajectory.number, end, finding)
        else:
            trajectory.image.ends[trajectory.number] = end

    def _finding(self, trajectory: Trajectory, end: End, result: Verification, adv: Tensor) -> Finding:
        """What a trajectory found; `adv` (3, H, W) on the CPU is the image with which it ended."""
        i, stage = trajectory.image.index, self.job.stages[trajectory.image.stage][0]
        key, label, error = self.block.keys[i], int(self.block.labels[i]), ""
        if end.nonfinite or (end.broken and not result.finite):
            error = trajectory.nonfinite_error(stage, end)
        elif end.broken:
            result.require_inside(self.job, f"{stage}: {key} is")
        broken = end.broken and not error and result.prediction != label
        self.unconfirmed += end.broken and not error and not broken
        target, restart = trajectory.pair
        return Finding(
            key=key,
            broken=broken,
            adv=adv.clone() if broken else self.block.images[i].detach().cpu().clone(),
            target=target,
            restart=restart,
            iteration=end.first if broken else -1,
            forwards=0,
            backwards=0,
            prediction=result.prediction if broken else label,
            margin=result.margin if broken else self.margins[i],
            error=error,
            stage=stage,
        )


def _to_the_end(attack: Attack, state: State, n: int, oracle: Oracle, feed: Feed | None) -> State:
    """Step all rows until the first n have ended."""
    ended = torch.zeros_like(state.broken)
    while not bool(ended[:n].all()):
        if feed is not None:
            feed(state)
        state = freeze(~ended, state, attack.step(state, oracle))
        ended = state.done | state.nonfinite
    return state
