"""The images of a run: opened block by block, handed out as trajectories, reported when they are finished."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from robustbench_vlm.engine import trajectories, verification
from robustbench_vlm.engine.interface import Rows, State
from robustbench_vlm.engine.job import ImageBlock, Job, Model, OnFinding, PreparedBlock, prepare
from robustbench_vlm.engine.noise import Keyed
from robustbench_vlm.engine.trajectories import End, Trajectories, Trajectory


class ImageQueue:
    """Every image is in a block not opened yet, waiting, under attack, or finished.

    Attributes:
        job: what is done with every image.
        waiting: images, each with its trajectories in its next stage, of which none has started.
        running: images of which a trajectory has started.
        paused: trajectories that go on in the next free row.
        full: rows of a full call of the attack.
        clean_calls: calls of the canonical pass that were made to find clean logits.
        first: the first block that holds an image; None before it is opened.
    """

    def __init__(self, model: Model, job: Job, blocks: Iterable[ImageBlock], on_finding: OnFinding) -> None:
        self.job = job
        self.waiting: deque[Trajectories] = deque()
        self.running: list[Trajectories] = []
        self.paused: deque[Trajectory] = deque()
        self.full = max(job.rows, job.batch_size or 0)
        self.clean_calls = 0
        self.first: PreparedBlock | None = None
        self._model, self._blocks, self._on_finding = model, iter(blocks), on_finding
        losses = (getattr(attack, "loss", None) for _, attack in job.stages)
        self._loss_names = tuple(dict.fromkeys(loss for loss in losses if loss is not None))
        self._keys: list[str] = []
        self._labels: list[int] = []
        # of images that wait or run: pixels, and wrong classes, most likely first
        self._images: dict[int, Tensor] = {}
        self._wrong: dict[int, list[int]] = {}

    @property
    def device(self) -> torch.device:
        """Device of the images."""
        return torch.device("cpu") if self.first is None else self.first.images.device

    def key(self, trajectory: Trajectory) -> str:
        """Name of the trajectory's image."""
        return self._keys[trajectory.image.index]

    def stage(self, trajectory: Trajectory) -> str:
        """Name of the trajectory's stage."""
        return self.job.stages[trajectory.image.stage][0]

    def open(self) -> bool:
        """Whether images are left; opens the next block before all rows could use up the last one."""
        while len(self.waiting) < 2 * self.full and (block := next(self._blocks, None)) is not None:
            self._add(prepare(block, self._model, self.job))
        return bool(self.waiting or self.running)

    def _add(self, block: PreparedBlock) -> None:
        """Put the images of a block into the queue; those that are misclassified when clean are reported."""
        self.clean_calls += block.calls
        if not len(block.keys):
            return
        # Images are copied, so that they do not keep a whole block in memory; but the first block stays.
        own = self.first is not None
        self.first = self.first or block
        before = len(self._keys)
        self._keys += block.keys
        self._labels += block.labels.tolist()
        wrong = verification.wrong_classes(block.clean, block.labels)
        names = [self.job.stages[stage][0] for stage in block.begin]
        for i in verification.report_misclassified(block, names, self._on_finding):
            index, image = before + i, block.images[i]
            self._images[index], self._wrong[index] = image.clone() if own else image, wrong[i]
            self._enter(index, block.begin[i])

    def _enter(self, index: int, stage: int) -> None:
        """Let an image wait for a stage."""
        attack = self.job.stages[stage][1]
        self.waiting.append(trajectories.of_image(index, stage, attack, self._wrong[index]))

    @property
    def startable(self) -> int:
        """How many trajectories could begin now.

        With `stop=first` later trajectories of an image may run ahead of earlier ones. With other rules that
        would waste whole trajectories, so each image is in one row.
        """
        if self.job.stop != "first":
            return len(self.waiting)
        return sum(image.left for image in (*self.running, *self.waiting))

    @property
    def likely(self) -> int:
        """How many trajectories could begin now and are seldom in vain.

        They are the first of every image that waits, and all of an image that has withstood one.
        """
        if self.job.stop != "first":
            return len(self.waiting)
        return len(self.waiting) + sum(image.left for image in self.running if image.ends)

    def next(self) -> Trajectory | None:
        """The trajectory for a free row: one that is paused, else of a waiting image, else one ahead.

        Of those ahead, one of an image that has withstood a trajectory comes first.
        """
        while self.paused:
            trajectory = self.paused.popleft()
            if not trajectory.obsolete:
                return trajectory
        if self.waiting:
            image = self.waiting.popleft()
            self.running.append(image)
            return image.next()
        ahead = [image for image in self.running if image.left and self.job.stop == "first"]
        return min(ahead, key=lambda image: (not image.ends, image.started)).next() if ahead else None

    def start(self, started: list[Trajectory]) -> State:
        """The state of trajectories of one stage, before their first model call."""
        index = [trajectory.image.index for trajectory in started]
        stage, attack = self.job.stages[started[0].image.stage]
        pairs = [trajectory.pair for trajectory in started]
        names = [
            f"{self.job.seed}/{self._keys[i]}/{stage}/{target}/{restart}"
            for i, (target, restart) in zip(index, pairs, strict=True)
        ]
        rows = Rows(
            images=torch.stack([self._images[i] for i in index]),
            labels=torch.tensor([self._labels[i] for i in index], device=self.device),
            targets=torch.tensor([target for target, _ in pairs], device=self.device),
            noise=Keyed(tuple(names)),
            restarts=tuple(restart for _, restart in pairs),
            stop=self.job.stop,
            loss_names=self._loss_names,
        )
        return attack.start(rows, self.job.threat)

    def pause(self, trajectory: Trajectory, row: State) -> None:
        """Let a trajectory go on from its state (one row) in the next free row."""
        trajectory.paused = row
        self.paused.append(trajectory)

    def end(self, trajectory: Trajectory, end: End) -> None:
        """Note that a trajectory ended without being decisive; the image goes on with the next one."""
        image = trajectory.image
        image.ends[trajectory.number] = end
        self.report(image)
        if trajectory.number + 1 == image.started < image.first_decisive:
            self.paused.append(image.next())

    def report(self, image: Trajectories) -> None:
        """Report an image if its finding is known; a survivor waits for the next stage."""
        finding = image.finding
        if finding is None:
            return
        self.running.remove(image)
        if not finding.broken and not finding.error and image.stage + 1 < len(self.job.stages):
            self._enter(image.index, image.stage + 1)
        else:
            del self._images[image.index], self._wrong[image.index]
        self._on_finding(finding)
