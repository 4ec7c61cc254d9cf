"""l1-APGD: ascent along few pixels at a time; how few depends on the best point so far.

Croce & Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers" (ICML 2021),
algorithm 1, and its schedule of radii: runs at larger radii come first, and each run begins at the best point
of the run before, projected. Only the last run, at the radius itself, can succeed. Where paper and released
code differ, this follows the code: the share of pixels comes from the number of changed pixels as that code
rounds them (see `l1.onto_counted`), and a run that is given a start takes the share from that start.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from robustbench_vlm.engine import geometry, l1, losses
from robustbench_vlm.engine.interface import Attack, Rows, initial, progress
from robustbench_vlm.engine.oracle import Evaluation, Oracle
from robustbench_vlm.engine.row_ops import misclassified, pick, spread
from robustbench_vlm.engine.stopping import BestIterateState, best_iterate, nothing_chosen
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat

SHARE = 0.2  # share of the entries along which the first moves step, if the run is given no start
SPARSER = 1.5  # a move steps along (entries changed at the best point) / SPARSER entries
SETTLED = 0.95  # at a checkpoint the number of changed entries still falls if it is below this times the last
SHRINK, LEAST = 1.5, 10  # where it no longer falls, the step is divided by SHRINK, down to radius / LEAST
WINDOW = 0.04  # moves between two checkpoints, as a share of the run's moves


@dataclass(frozen=True)
class SparseState(BestIterateState):
    """The rows of l1-APGD; before the last run `x` lies in a larger ball.

    Attributes:
        gradient: at `x`.
        changed: (S,) entries of `x` that count as changed.
        loss_names: losses that rows of this state may have.
        loss: (S,) int64, index of each row's own loss in `losses.NAMES`.
        best, best_gradient, best_changed: of the evaluation of largest loss in this run.
        best_loss: (S,) that loss, -inf before the first.
        size: (S,) step length.
        share: (S,) share of the entries along which a move steps.
        checked: (S,) changed entries of the best point at the last checkpoint.
        pending: (S,) bool, the next move starts from the best point.
    """

    gradient: Tensor
    changed: Tensor
    loss_names: tuple[losses.Name, ...]
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_changed: Tensor
    best_loss: Tensor
    size: Tensor
    share: Tensor
    checked: Tensor
    pending: Tensor


@dataclass(frozen=True)
class ApgdL1(Attack):
    """l1-APGD, untargeted or over the most likely wrong classes.

    Attributes:
        loss: a name of `losses.LOSSES`.
        steps: moves of each run; a run evaluates its start too.
        radii: radius of each run, as a multiple of the ball's; the last is 1.
        restarts: trajectories with fresh noise, for each target.
        targets: target classes for a targeted loss, most likely first; 0 otherwise.
    """

    loss: losses.Name
    steps: tuple[int, ...]
    radii: tuple[float, ...]
    restarts: int
    targets: int

    norms: ClassVar[tuple[str, ...]] = ("l1",)

    def __post_init__(self) -> None:
        if min((*self.steps, self.restarts)) < 1 or len(self.steps) != len(self.radii):
            found = f"steps {self.steps} at radii {self.radii}, restarts {self.restarts}"
            raise InputError("apgd-l1", found, "at least 1 restart, and 1 step at each of the radii")
        if not self.radii or self.radii[-1] != 1 or not all(1 <= radius < math.inf for radius in self.radii):
            raise InputError("apgd-l1.radii", str(self.radii), "multiples of at least 1, the last one 1")
        losses.require_targets("apgd-l1", self.loss, self.targets)

    @property
    def evaluations(self) -> int:
        """Evaluations of one trajectory: every step, and the start of each run."""
        return sum(self.steps) + len(self.steps)

    @property
    def passes(self) -> tuple[int, int]:
        """One gradient for each evaluation."""
        return self.evaluations, self.evaluations

    def shares_rows(self, other: Attack) -> bool:
        """With another loss if the runs are equal; each row is stepped with its own loss."""
        if not isinstance(other, ApgdL1) or type(other) is not type(self):
            return False
        return (self.steps, self.radii) == (other.steps, other.radii)

    def start(self, rows: Rows, threat: Threat) -> SparseState:
        """Standard normal noise, projected onto ball and box of the first run."""
        images = rows.images
        draw = rows.noise.normal(tuple(images.shape[1:])).to(images.device)
        if len(self.radii) > 1:  # the reference rounds a given start to an image; see `onto_counted`
            draw = (images + draw) - images
        x, changed = l1.onto_counted(draw, images, geometry.radius(threat) * self.radii[0])
        number = torch.zeros(len(images), dtype=images.dtype, device=images.device)
        return SparseState(
            **initial(rows, threat, x),
            **nothing_chosen(x),
            gradient=torch.zeros_like(x),
            changed=changed,
            loss_names=rows.loss_names or (self.loss,),
            loss=torch.zeros_like(rows.labels) + losses.NAMES.index(self.loss),
            best=x,
            best_gradient=torch.zeros_like(x),
            best_changed=changed,
            best_loss=number - torch.inf,
            size=number,
            share=number,
            checked=number,
            pending=torch.zeros_like(rows.labels, dtype=torch.bool),
        )

    def step(self, state: SparseState, oracle: Oracle) -> SparseState:
        """Move, or begin a run where one is due; evaluate; update best point, sparsity and step length."""
        schedule = _schedule(self.steps, self.radii, state.iteration.device)
        at = state.iteration.clamp(max=self.evaluations - 1)  # a row that has ended may be stepped on
        begins, radius = schedule.begins[at], schedule.radii[at] * geometry.radius(state.threat)
        x, changed = _next(state, begins, radius)
        names, labels, targets = state.loss_names, state.labels, state.targets
        evaluation = oracle.gradient(
            x, lambda logits: losses.of_rows(names, state.loss, logits, labels, targets)
        )
        wrong = misclassified(evaluation.logits, labels) & schedule.decides[at]
        moved = dataclasses.replace(
            self._begun(state, begins, radius, changed),
            x=x,
            gradient=evaluation.gradient,
            changed=changed,
            **best_iterate(state, x, evaluation.values, wrong),
            **progress(state, evaluation.values),
            iteration=state.iteration + 1,
            done=state.iteration + 1 >= self.evaluations,
            nonfinite=~evaluation.finite,
            zero_gradients=state.zero_gradients + evaluation.zero,
        )
        return _updated(moved, evaluation, schedule.checks[at], radius)

    def _begun(self, state: SparseState, begins: Tensor, radius: Tensor, changed: Tensor) -> SparseState:
        """The state with step length and sparsity of rows that begin a run reset.

        Args:
            state: before the evaluation.
            begins: (S,) bool, the row begins a run.
            radius: (S,) radius of the row's run.
            changed: (S,) changed entries of the run's start.
        """
        entries = state.images[0].numel()
        share, checked = changed / entries / SPARSER, changed
        if len(self.radii) == 1:  # no start is given
            share, checked = torch.full_like(share, SHARE), torch.full_like(checked, entries)
        return dataclasses.replace(
            state,
            best_loss=torch.where(begins, -torch.inf, state.best_loss),
            size=torch.where(begins, radius, state.size),
            share=torch.where(begins, share, state.share),
            checked=torch.where(begins, checked, state.checked),
        )


@dataclass(frozen=True)
class _Schedule:
    """Facts about each of the E evaluations of a trajectory, by its number.

    Attributes:
        begins: (E,) bool, it is the start of a run.
        radii: (E,) multiple of the radius.
        checks: (E,) bool, a checkpoint follows.
        decides: (E,) bool, it is part of the last run, so that it can be a success.
    """

    begins: Tensor
    radii: Tensor
    checks: Tensor
    decides: Tensor


@cache
def _schedule(steps: tuple[int, ...], radii: tuple[float, ...], device: torch.device) -> _Schedule:
    runs = [(run, move) for run, most in enumerate(steps) for move in range(most + 1)]
    windows = [max(int(WINDOW * most), 1) for most in steps]
    return _Schedule(
        torch.tensor([move == 0 for _, move in runs], device=device),
        torch.tensor([radii[run] for run, _ in runs], device=device),
        torch.tensor([move > 0 and move % windows[run] == 0 for run, move in runs], device=device),
        torch.tensor([run == len(steps) - 1 for run, _ in runs], device=device),
    )


def _next(state: SparseState, begins: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """The point to evaluate, and how many of its entries count as changed.

    A row moves from `x` or from its best point along the entries of largest gradient; one that begins a run
    projects its best point; a fresh one stays where it is.
    """
    at = pick(state.pending, state.best, state.x)
    gradient = pick(state.pending, state.best_gradient, state.gradient)
    slope = gradient.abs().flatten(1)
    entries = slope.shape[1]
    rank = ((1 - state.share) * entries).clamp(0, entries - 1).long()
    least = _at_rank(slope, rank)
    signs = gradient.sign().mul_(torch.ge(slope, least[:, None], out=slope).view_as(gradient))
    count = signs.abs().flatten(1).sum(1)
    move = signs.mul_(spread(state.size / count.clamp(min=1), at))
    target = pick(begins, state.best, move.add_(at))
    x, changed = l1.onto_counted(target - state.images, state.images, radius)
    fresh = state.iteration == 0
    return pick(fresh, state.x, x), torch.where(fresh, state.changed, changed)


def _at_rank(values: Tensor, rank: Tensor) -> Tensor:
    """(S,) the entry of each row of (S, d) that has the position `rank` (S,) in ascending order, NaN last."""
    if values.device.type != "cpu":
        return values.sort(dim=1).values.gather(1, rank[:, None]).squeeze(1)
    # A CPU selects one entry of a row nine times as fast as it sorts the row.
    selected = [np.partition(row, at)[at] for row, at in zip(values.numpy(), rank.tolist(), strict=True)]
    return torch.from_numpy(np.array(selected))


def _updated(state: SparseState, evaluation: Evaluation, checks: Tensor, radius: Tensor) -> SparseState:
    """The state with its best point, and after a checkpoint with new sparsity and step length."""
    better = evaluation.values > state.best_loss
    best_changed = torch.where(better, state.changed, state.best_changed)
    falls = best_changed / state.checked < SETTLED
    smaller = torch.maximum(state.size / SHRINK, radius / LEAST)
    share = best_changed / state.images[0].numel() / SPARSER
    return dataclasses.replace(
        state,
        best=pick(better, state.x, state.best),
        best_gradient=pick(better, evaluation.gradient, state.best_gradient),
        best_changed=best_changed,
        best_loss=torch.where(better, evaluation.values, state.best_loss),
        size=torch.where(checks, torch.where(falls, radius, smaller), state.size),
        share=torch.where(checks, share, state.share),
        checked=torch.where(checks, best_changed, state.checked),
        pending=checks & falls,
    )


plugin = ApgdL1
