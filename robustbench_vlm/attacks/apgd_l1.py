"""l1-APGD: ascent along few pixels at a time, how few being settled by the best point so far.

Croce & Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers" (ICML 2021),
algorithm 1, and its schedule of radii: runs at larger radii first, each begun at the best point of the one
before, projected. Only the last run, at the radius itself, can succeed. Where paper and released code differ
this follows the code: the share of pixels comes from the count of changed ones as that code rounds them (see
`l1.onto_counted`), and a run that is given its start takes the share of that start.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_vlm.engine import geometry, l1, losses
from robustbench_vlm.engine.interface import (
    Alone,
    Attack,
    Evaluation,
    Oracle,
    Rows,
    State,
    common,
    misclassified,
    pick,
    progress,
    spread,
)
from robustbench_vlm.engine.stopping import best_iterate
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat

SHARE = 0.2  # of the entries that first moves step along, where no start is given
SPARSER = 1.5  # a move steps along the number of entries that the best point has changed, over this
SETTLED = 0.95  # that number still falls while it is below this part of what it was
SHRINK, LEAST = 1.5, 10  # of the step where the number is settled, and down to which part of the radius
WINDOW = 0.04  # moves between two looks at the number, as a share of the run's


@dataclass(frozen=True)
class SparseState(State):
    """l1-APGD's rows; before the last run `x` lies in a larger ball.

    Attributes:
        gradient: at `x`.
        changed: (S,) entries of `x` that count as changed.
        loss: (S,) int64, index of each row's loss in `losses.NAMES`.
        best, best_gradient, best_changed: of the evaluation of largest loss in this run.
        best_loss: (S,) that loss, -inf before the first.
        size: (S,) step length.
        share: (S,) part of the entries that a move steps along.
        checked: (S,) changed entries of the best point at the last checkpoint.
        pending: (S,) bool, the next move is from the best point.
        last, peak: see `stopping.BestIterate`.
    """

    gradient: Tensor
    changed: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_changed: Tensor
    best_loss: Tensor
    size: Tensor
    share: Tensor
    checked: Tensor
    pending: Tensor
    last: Tensor
    peak: Tensor

    @property
    def adv(self) -> Tensor:
        """The current iterate; the one that is kept where rows walk to their end."""
        return self.x if self.stop == "first" else self.last


@dataclass(frozen=True)
class ApgdL1(Alone):
    """l1-APGD, untargeted or over the most likely wrong classes.

    Attributes:
        loss: a name of `losses.LOSSES`.
        steps: moves of each run; a run evaluates its start, too.
        radii: radius of each run, as a multiple of the ball's; the last one is 1.
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
        if losses.targeted(self.loss) != (self.targets > 0):
            found = f"{self.targets} with loss {self.loss!r}"
            raise InputError("apgd-l1.targets", found, "at least 1 for a targeted loss, else 0")

    @property
    def evaluations(self) -> int:
        """Of one trajectory."""
        return sum(self.steps) + len(self.steps)

    def ranks(self, n_classes: int) -> int:
        """At most every wrong class."""
        return min(self.targets, n_classes - 1)

    def substitutions(self, n_classes: int) -> list[str]:
        """DLR becomes a margin and targets are capped where classes are few."""
        return losses.few_classes(self.loss, self.targets, n_classes)

    def cost(self, n_classes: int) -> tuple[int, int]:
        """One gradient a step and one at the start of each run, for every target and restart."""
        spent = max(1, self.ranks(n_classes)) * self.restarts * self.evaluations
        return spent, spent

    @property
    def beside(self) -> tuple[losses.Name, ...]:
        """Losses of other stages whose rows stand in the same table."""
        return ()

    def join(self, other: Attack) -> Attack | None:
        """With another loss of equal runs: each row keeps its own loss, and one gradient serves all."""
        if not isinstance(other, ApgdL1) or (self.steps, self.radii) != (other.steps, other.radii):
            return None
        names = {*self.beside, *other.beside, other.loss} - {self.loss}
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(ApgdL1)}
        return _Joint(**own, others=tuple(sorted(names)))

    def start(self, rows: Rows, threat: Threat) -> SparseState:
        """Standard normal noise, projected onto ball and box of the first run."""
        images = rows.images
        draw = rows.noise.normal(tuple(images.shape[1:])).to(images.device)
        if len(self.radii) > 1:  # a start that is given is rounded to an image first; see `onto_counted`
            draw = (images + draw) - images
        x, changed = l1.onto_counted(draw, images, geometry.radius(threat) * self.radii[0])
        number = torch.zeros(len(images), dtype=images.dtype, device=images.device)
        return SparseState(
            **common(rows, threat, x),
            gradient=torch.zeros_like(x),
            changed=changed,
            loss=torch.zeros_like(rows.labels) + losses.NAMES.index(self.loss),
            best=x,
            best_gradient=torch.zeros_like(x),
            best_changed=changed,
            best_loss=number - torch.inf,
            size=number,
            share=number,
            checked=number,
            pending=torch.zeros_like(rows.labels, dtype=torch.bool),
            last=x,
            peak=number - torch.inf,
        )

    def step(self, state: SparseState, oracle: Oracle) -> SparseState:
        """Move, or begin a run where one is due; evaluate, and keep the books."""
        plan = _plan(self.steps, self.radii, state.iteration.device)
        at = state.iteration.clamp(max=self.evaluations - 1)  # a row that has ended may be stepped on
        begins, radius = plan.begins[at], plan.radii[at] * geometry.radius(state.threat)
        x, changed = _next(state, begins, radius)
        seen = oracle.gradient(x, lambda logits: self._objective(state, logits))
        wrong = misclassified(seen.logits, state.labels) & plan.decides[at]
        moved = dataclasses.replace(
            self._begun(state, begins, radius, changed),
            x=x,
            gradient=seen.gradient,
            changed=changed,
            **best_iterate(state, x, seen.values, wrong),
            **progress(state, seen.values),
            iteration=state.iteration + 1,
            done=state.iteration + 1 >= self.evaluations,
            nonfinite=~seen.finite,
            zero_gradients=state.zero_gradients + seen.zero,
        )
        return _books(moved, seen, plan.checks[at], radius)

    def _objective(self, state: SparseState, logits: Tensor) -> Tensor:
        """(S,) each row's own loss."""
        return losses.of_rows([self.loss, *self.beside], state.loss, logits, state.labels, state.targets)

    def _begun(self, state: SparseState, begins: Tensor, radius: Tensor, changed: Tensor) -> SparseState:
        """The books of rows that begin a run at a point with `changed` (S,) changed entries, opened."""
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
class _Joint(ApgdL1):
    """Several stages in one table."""

    others: tuple[losses.Name, ...]

    @property
    def beside(self) -> tuple[losses.Name, ...]:
        """Losses of other stages whose rows stand in the same table."""
        return self.others


@dataclass(frozen=True)
class _Plan:
    """What each evaluation of a trajectory is, by its number; E of them.

    Attributes:
        begins: (E,) bool, the start of a run.
        radii: (E,) multiple of the radius.
        checks: (E,) bool, a checkpoint follows.
        decides: (E,) bool, part of the last run.
    """

    begins: Tensor
    radii: Tensor
    checks: Tensor
    decides: Tensor


@cache
def _plan(steps: tuple[int, ...], radii: tuple[float, ...], device: torch.device) -> _Plan:
    runs = [(run, move) for run, most in enumerate(steps) for move in range(most + 1)]
    windows = [max(int(WINDOW * most), 1) for most in steps]
    return _Plan(
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
    least = slope.sort(dim=1).values.gather(1, rank[:, None])
    signs = gradient.sign() * (slope >= least).view_as(gradient)
    count = signs.abs().flatten(1).sum(1)
    move = signs.mul_(spread(state.size / count.clamp(min=1), at))
    target = pick(begins, state.best, move.add_(at))
    x, changed = l1.onto_counted(target - state.images, state.images, radius)
    fresh = state.iteration == 0
    return pick(fresh, state.x, x), torch.where(fresh, state.changed, changed)


def _books(state: SparseState, seen: Evaluation, checks: Tensor, radius: Tensor) -> SparseState:
    """Best point, and sparsity and step after a checkpoint."""
    better = seen.values > state.best_loss
    best_changed = torch.where(better, state.changed, state.best_changed)
    falls = best_changed / state.checked < SETTLED
    smaller = torch.maximum(state.size / SHRINK, radius / LEAST)
    share = best_changed / state.images[0].numel() / SPARSER
    return dataclasses.replace(
        state,
        best=pick(better, state.x, state.best),
        best_gradient=pick(better, seen.gradient, state.best_gradient),
        best_changed=best_changed,
        best_loss=torch.where(better, seen.values, state.best_loss),
        size=torch.where(checks, torch.where(falls, radius, smaller), state.size),
        share=torch.where(checks, share, state.share),
        checked=torch.where(checks, best_changed, state.checked),
        pending=checks & falls,
    )


plugin = ApgdL1
