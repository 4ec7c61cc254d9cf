"""FAB-T: the smallest change that crosses the boundary to one class, by repeated exact linearisation.

Croce & Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack" (ICML 2020), in
the targeted form of AutoAttack: one gradient an iteration, of z_t - z_y. The final search of the paper is
absent there and here. With one restart no random number is drawn. It minimises the norm; a point that is
stored with norm <= eps decides, and later ones could only be nearer, so the row ends at the first such point.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_vlm.attacks import geometry, losses
from robustbench_vlm.attacks.interface import (
    Alone,
    Oracle,
    Rows,
    State,
    common,
    misclassified,
    pick,
    progress,
)
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat

FLAT = 1e-8  # below this an entry of an L2 normal vector is no direction; also the least length of a move
NEWTON = 64  # more corrections than a float32 multiplier was ever seen to need (about 12)


@dataclass(frozen=True)
class FabState(State):
    """FAB's rows; `x` is the point last checked and may lie outside the ball.

    Attributes:
        at: (S, 3, H, W) the point to linearise at next.
        nearest: (S,) norm of the nearest misclassified point so far, 1e10 if none.
    """

    at: Tensor
    nearest: Tensor

    @property
    def adv(self) -> Tensor:
        """The point last checked; projected into the ball where it is not a success."""
        return pick(self.broken, self.x, geometry.project(self.x, self.images, self.threat))

    @property
    def forwards(self) -> Tensor:
        """Two an iteration: linearise, check."""
        return 2 * self.iteration


@dataclass(frozen=True)
class Fab(Alone):
    """Targeted FAB.

    Attributes:
        steps: iterations for each target and restart.
        targets: target classes, most likely wrong class first.
        restarts: trajectories for each target; the first starts at the image, later ones at random points.
        alpha_max: largest weight of the projection of the image itself.
        eta: overshoot beyond the linearised boundary.
        beta: share of the distance that is kept when going back after a success.
    """

    steps: int
    targets: int
    restarts: int
    alpha_max: float
    eta: float
    beta: float

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    def __post_init__(self) -> None:
        if min(self.steps, self.targets, self.restarts) < 1:
            found = f"steps {self.steps}, targets {self.targets}, restarts {self.restarts}"
            raise InputError("fab", found, "at least 1 of each")

    def ranks(self, n_classes: int) -> int:
        """At most every wrong class."""
        return min(self.targets, n_classes - 1)

    def substitutions(self, n_classes: int) -> list[str]:
        """Targets are capped where classes are few."""
        return losses.few_classes("targeted-margin", self.targets, n_classes)

    def cost(self, n_classes: int) -> tuple[int, int]:
        """Two forwards and one gradient a step, for every target and restart."""
        steps = max(1, self.ranks(n_classes)) * self.restarts * self.steps
        return 2 * steps, steps

    def start(self, rows: Rows, threat: Threat) -> FabState:
        """The image; for a later restart a point half a radius away in a random direction."""
        images = rows.images
        # a row that is still open has stored nothing within eps, so min(nearest, eps) / 2 is eps / 2
        away = images + (geometry.surface_start(images, threat, rows.noise) - images) / 2
        again = torch.tensor([restart > 0 for restart in rows.restarts], device=images.device)
        at = pick(again, away.clamp_(0, 1), images.clone())
        nearest = torch.full((len(images),), 1e10, dtype=images.dtype, device=images.device)
        return FabState(**common(rows, threat, at), at=at, nearest=nearest)

    def step(self, state: FabState, oracle: Oracle) -> FabState:
        """Linearise, step to the weighted mean of the projections, check it, go back if it is wrong."""

        def objective(logits: Tensor) -> Tensor:
            return losses.targeted_margin(logits, state.labels, state.targets)

        seen = oracle.gradient(state.at, objective)
        x = self._advance(state, seen.values, seen.gradient)
        logits = oracle.logits(x)

        wrong = misclassified(logits, state.labels)
        norm = _norm(x - state.images, state.threat.norm)
        nearer = wrong & (norm < state.nearest)
        success = nearer & (norm <= geometry.radius(state.threat))
        back = (x - state.images).mul_(self.beta).add_(state.images)
        broken = success if state.stop == "first" else state.broken | success
        return dataclasses.replace(
            state,
            x=x if state.stop == "first" else pick(state.broken & ~success, state.x, x),
            at=pick(wrong, back, x),
            nearest=torch.where(nearer, norm, state.nearest),
            broken=broken,
            first=torch.where(success & ((state.first < 0) | ~state.broken), state.iteration, state.first),
            iteration=state.iteration + 1,
            done=state.iteration + 1 >= self.steps,
            **progress(state, seen.values),
            nonfinite=~(seen.finite & torch.isfinite(logits.sum(1))),
            zero_gradients=state.zero_gradients + seen.zero,
        )

    def _advance(self, state: FabState, value: Tensor, gradient: Tensor) -> Tensor:
        """(S, 3, H, W) the overshot, weighted mean of the two projections onto {linearised margin = 0}."""
        images, at, norm = state.images.flatten(1), state.at.flatten(1), state.threat.norm
        normal = gradient.flatten(1)
        # by how much <w, .> must fall, written with differences: <w, t> - b cancels digits otherwise
        fall = torch.cat([value, value + _dot(normal, images - at)])
        move = to_hyperplane(torch.cat([at, images]), normal.repeat(2, 1), fall, norm)
        near, far = move.chunk(2)
        a, b = (_norm(part, norm).clamp(min=FLAT) for part in (near, far))
        weight = (a / (a + b)).clamp(0, self.alpha_max)[:, None]
        near = (at + self.eta * near).mul_(1 - weight)
        far = (images + self.eta * far).mul_(weight)
        return near.add_(far).clamp_(0, 1).reshape(state.images.shape)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(a, b)
    return product


def _norm(delta: Tensor, norm: str) -> Tensor:
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else geometry.length(flat)


def to_hyperplane(points: Tensor, normals: Tensor, falls: Tensor, norm: str) -> Tensor:
    """The shortest move within the box that lowers <w, .> by `falls`.

    Both norms are one problem: entry i moves by min(m, r_i) in units of |w_i|^(q-1), where r_i is its way to
    the box, and the multiplier m solves sum_i c_i min(m, r_i) = fall. Where the box does not reach the
    hyperplane all entries go to their bound.

    Args:
        points: (N, d) in [0, 1].
        normals: (N, d) w.
        falls: (N,) <w, point> - b; negative means that <w, .> must rise.
        norm: `linf` or `l2`.

    Returns:
        (N, d) the moves.
    """
    w = normals * torch.where(falls < 0, -1.0, 1.0)[:, None]
    size = w.abs()
    way = torch.lt(w, 0, out=torch.empty_like(w)).sub_(points).abs_()  # to 1 where w < 0, else to 0
    if norm == "linf":
        reach = torch.minimum(way, multiplier(size, way, falls.abs())[:, None])
        return -(reach.mul_(w.sign()))
    small = size < FLAT
    size = size.masked_fill(small, 0)
    breaks = (way / size).masked_fill_(small, 0)
    m = multiplier(size.square(), breaks, falls.abs())
    reach = torch.minimum(breaks, m[:, None]).mul_(size)
    return -(reach.mul_(w.sign()))


def multiplier(weights: Tensor, breaks: Tensor, total: Tensor) -> Tensor:
    """(N,) the m >= 0 with sum_i c_i min(m, r_i) = total; infinite where no m is large enough.

    Newton's method from 0: the sum is concave and piecewise linear, so each correction stops short of the
    root or lands on it, and the last one is exact. A row at its root stays there, however long others take.

    Args:
        weights: (N, d) c >= 0.
        breaks: (N, d) r >= 0.
        total: (N,) >= 0.
    """
    m = torch.zeros_like(total)
    filled = weights * breaks
    # comparisons written as 0 and 1 into memory at hand: selecting by a random mask costs several times more
    side, part = torch.empty_like(weights), torch.empty_like(weights)
    for _ in range(NEWTON):
        torch.gt(breaks, m[:, None], out=side)
        slope = torch.mul(side, weights, out=part).sum(1)
        torch.le(breaks, m[:, None], out=side)
        rest = total - torch.mul(side, filled, out=part).sum(1)
        better = torch.where(slope > 0, rest / slope, torch.where(rest > 0, torch.inf, m))
        grown = torch.maximum(m, better)
        if m.device.type == "cpu" and torch.equal(grown, m):
            break
        m = grown
    return m


plugin = Fab
