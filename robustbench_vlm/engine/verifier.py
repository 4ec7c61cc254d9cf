"""Trajectories that ended and may be decisive, until the canonical pass has verified their images."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

import torch

from robustbench_vlm.engine import verification
from robustbench_vlm.engine.image_queue import ImageQueue
from robustbench_vlm.engine.interface import State
from robustbench_vlm.engine.job import Model
from robustbench_vlm.engine.trajectories import End, Trajectory
from robustbench_vlm.engine.verification import Verification
from robustbench_vlm.types import Finding


class Verifier:
    """Collects adversarial images and verifies them in calls of the fixed shape.

    Attributes:
        calls: calls of the canonical pass.
        unconfirmed: successes that the canonical pass did not confirm.
    """

    def __init__(self, model: Model, queue: ImageQueue) -> None:
        self.calls = self.unconfirmed = 0
        self._model, self._queue, self._job = model, queue, queue.job
        self._pending: list[tuple[Trajectory, State, End]] = []

    def due(self, busy: Collection[Trajectory], *, smaller_shapes: bool) -> bool:
        """Whether to make a call now.

        Full calls are cheapest. But once no image waits, a verdict frees rows: at once those of later
        trajectories of its image, so nothing is gained by waiting if there are any; and where calls can
        shrink, its own, which is worth a call only together with others.

        Args:
            busy: trajectories in rows.
            smaller_shapes: whether calls of the attacked view can shrink.
        """
        rows, pending = self._job.rows, len(self._pending)
        if self._queue.waiting or not pending:
            return pending >= rows
        if not smaller_shapes or self._frees(busy):
            return True
        return pending >= min(max(len(busy), 1), rows)

    def _frees(self, busy: Collection[Trajectory]) -> bool:
        """Whether a pending success would make a trajectory in a row obsolete."""
        first = {id(pending.image): pending.number for pending, _, end in self._pending if end.broken}
        return any(other.number > first.get(id(other.image), other.number) for other in busy)

    def add(self, ended: Iterable[tuple[Trajectory, State, End]]) -> None:
        """Keep the trajectories that may be decisive; the images of the others go on at once."""
        for trajectory, row, end in ended:
            failed = self._job.stop == "first" and not end.broken and not end.nonfinite
            if failed and not trajectory.last:
                self._queue.end(trajectory, end)
            else:
                self._pending.append((trajectory, row, end))

    def verify(self) -> None:
        """Make one call of the canonical pass; its images get a finding, or their trajectories go on.

        Raises:
            AttackError: an image is outside ball or box.
        """
        called, self._pending = self._pending[: self._job.rows], self._pending[self._job.rows :]
        adv = torch.cat([row.adv for _, row, _ in called])
        labels = torch.cat([row.labels for _, row, _ in called])
        images = torch.cat([row.images for _, row, _ in called])
        verified = verification.verify(self._model, self._job, adv, images, labels)
        self.calls += 1
        copies = adv.cpu()
        for i, (label, (trajectory, row, end)) in enumerate(zip(labels.tolist(), called, strict=True)):
            if trajectory.obsolete:
                continue  # an earlier trajectory of the image was decisive in this very call
            error = self._error(trajectory, end, verified[i])
            wrong = not error and verified[i].prediction != label
            unconfirmed = end.broken and not error and not wrong
            self.unconfirmed += unconfirmed
            denied = unconfirmed and self._job.stop == "first"
            if not error and not wrong and (denied or not end.done or not trajectory.last):
                self._go_on(trajectory, row, end)
                continue
            target, restart = trajectory.pair
            first = end.first if end.first >= 0 else end.iteration
            lost = bool(error) and not bool(copies[i].isfinite().all())  # no image that could be reported
            finding = Finding(
                key=self._queue.key(trajectory),
                broken=wrong,
                adv=images[i].cpu().clone() if lost else copies[i].clone(),
                target=target,
                restart=restart,
                iteration=first if wrong else -1,
                forwards=0,
                backwards=0,
                prediction=verified[i].prediction,
                margin=verified[i].margin,
                error=error,
                stage=self._queue.stage(trajectory),
            )
            trajectory.image.decide(trajectory.number, end, finding)
            self._queue.report(trajectory.image)
        self._pending = [waiting for waiting in self._pending if not waiting[0].obsolete]

    def _error(self, trajectory: Trajectory, end: End, result: Verification) -> str:
        """Why there is no verdict; empty if there is one."""
        stage = self._queue.stage(trajectory)
        if end.nonfinite or not result.finite:
            return trajectory.nonfinite_error(stage, end)
        result.require_inside(self._job, f"{stage}: {self._queue.key(trajectory)} is")
        return ""

    def _go_on(self, trajectory: Trajectory, row: State, end: End) -> None:
        """Continue a trajectory whose success was not confirmed, or an image whose trajectory failed."""
        row = dataclasses.replace(row, broken=torch.zeros_like(row.broken))
        if end.done and trajectory.last:  # verified once more, by the image with which it ended
            self._pending.append((trajectory, row, dataclasses.replace(end, broken=False)))
        elif end.done:
            self._queue.end(trajectory, end)
        else:
            self._queue.pause(trajectory, row)
