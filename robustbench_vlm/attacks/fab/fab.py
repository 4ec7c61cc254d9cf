"""FAB: the smallest change that crosses the boundary, by repeated exact linearisation.

Croce & Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack" (ICML 2020).
Targeted (FAB-T of AutoAttack), an iteration takes one gradient, of z_t - z_y. Untargeted, it takes one for
every wrong class and goes towards the linearised boundary that is nearest. The final search of the paper is
absent from the released code and from here. With one restart no random number is drawn.

FAB minimises the norm: a misclassified point is stored if it is nearer than all before. So a row ends at the
first misclassified point within the radius under `stop=first`, and returns the nearest one under `stop=last`
and `stop=best`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_vlm.attacks.fab.projection import FLAT, Hyperplanes
from robustbench_vlm.engine import geometry, losses
from robustbench_vlm.engine.interface import Attack, Rows, State, initial, progress
from robustbench_vlm.engine.oracle import Evaluation, Oracle
from robustbench_vlm.engine.row_ops import misclassified, pick, spread
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat

FAR = 1e10  # distance to the nearest success while there is none
DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}


@dataclass(frozen=True)
class FabState(State):
    """The rows of FAB.

    Attributes:
        x: (S, 3, H, W) the point last checked, which may lie outside the ball; the nearest success instead,
            if there is one and the row goes on.
        at: (S, 3, H, W) the point to linearise at next.
        nearest: (S,) norm of the nearest misclassified point so far, 1e10 if none.
        gradients: (S,) int64, image gradients so far.
        eased: (S, 2) start of the search of the next projections, see `projection.Moves`.
    """

    at: Tensor
    nearest: Tensor
    gradients: Tensor
    eased: Tensor

    @property
    def adv(self) -> Tensor:
        """The nearest success within the radius; the image itself where there is none, as in the reference.

        Projecting a point from outside into the ball might give a misclassified image by luck, but the
        reference does not do that.
        """
        return pick(self.broken, self.x, self.images)

    @property
    def forwards(self) -> Tensor:
        """(S,) two an iteration: one to linearise, one to check."""
        return 2 * self.iteration

    @property
    def backwards(self) -> Tensor:
        """(S,) one an iteration if targeted, else one for every wrong class."""
        return self.gradients


@dataclass(frozen=True)
class Fab(Attack):
    """FAB, targeted at one class after the other, or untargeted.

    Attributes:
        steps: iterations for each target and restart.
        targets: target classes, most likely wrong class first; 0 for untargeted.
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

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")

    def __post_init__(self) -> None:
        if min(self.steps, self.restarts) < 1 or self.targets < 0:
            found = f"steps {self.steps}, restarts {self.restarts}, targets {self.targets}"
            raise InputError(
                "fab", found, "at least 1 step and 1 restart, and 0 targets (untargeted) or more"
            )
        if not (0 < self.alpha_max <= 1 and 0 < self.beta <= 1):
            found = f"alpha_max {self.alpha_max}, beta {self.beta}"
            raise InputError("fab", found, "both above 0 and at most 1")
        if not 0 < self.eta < math.inf:
            raise InputError("fab.eta", str(self.eta), "a positive number")

    @property
    def passes(self) -> tuple[int, int]:
        """Two forwards and one gradient a step, if targeted."""
        return 2 * self.steps, self.steps

    def cost(self, n_classes: int) -> tuple[int, int]:
        """Two forwards a step; one gradient for the target, or for each wrong class if untargeted."""
        forwards, gradients = super().cost(n_classes)
        return forwards, gradients * (1 if self.targets else n_classes - 1)

    def start(self, rows: Rows, threat: Threat) -> FabState:
        """The image; for a later restart a point up to half a radius away in a random direction."""
        images = rows.images
        # A restart begins only if nothing was found within eps, so min(nearest, eps) / 2 is eps / 2.
        at = images
        if any(rows.restarts):
            again = torch.tensor(rows.restarts, device=images.device) > 0
            at = pick(again, _around(rows, dataclasses.replace(threat, eps=threat.eps / 2)), images)
        nearest = torch.full((len(images),), FAR, dtype=images.dtype, device=images.device)
        return FabState(
            **initial(rows, threat, at),
            at=at,
            nearest=nearest,
            gradients=torch.zeros_like(rows.labels),
            eased=torch.ones_like(nearest)[:, None].expand(-1, 2).contiguous(),
        )

    def step(self, state: FabState, oracle: Oracle) -> FabState:
        """Linearise, step to the weighted mean of the projections, check it, go back if misclassified."""
        evaluation = self._linearise(state, oracle)
        x, eased = self._advance(state, evaluation)
        logits = oracle.logits(x)

        wrong = misclassified(logits, state.labels)
        norm = _norm(x - state.images, state.threat.norm)
        nearer = wrong & (norm < state.nearest)
        success = nearer & (norm <= geometry.radius(state.threat))
        share = spread(torch.where(wrong, self.beta, 1.0), x)
        broken, stored = success, x
        if state.stop != "first":
            broken, stored = state.broken | success, pick(state.broken & ~success, state.x, x)
        return dataclasses.replace(
            state,
            x=stored,
            at=torch.lerp(state.images, x, share),
            nearest=torch.where(nearer, norm, state.nearest),
            gradients=state.gradients + (1 if self.targets else logits.shape[1] - 1),
            eased=eased,
            broken=broken,
            first=torch.where(success & ((state.first < 0) | ~state.broken), state.iteration, state.first),
            iteration=state.iteration + 1,
            done=state.iteration + 1 >= self.steps,
            **progress(state, evaluation.values),
            nonfinite=~(evaluation.finite & torch.isfinite(logits.sum(1))),
            zero_gradients=state.zero_gradients + evaluation.zero,
        )

    def _linearise(self, state: FabState, oracle: Oracle) -> Evaluation:
        """The logit difference that is driven to zero, with its gradient.

        Untargeted, that of the class whose linearised boundary is nearest.
        """
        if self.targets:
            return oracle.gradient(
                state.at, lambda logits: losses.targeted_margin(logits, state.labels, state.targets)
            )
        found: Evaluation | None = None
        distance = torch.full_like(state.nearest, torch.inf)
        for evaluation in oracle.gradients(state.at, lambda logits: _margins(logits, state.labels)):
            size = _norm(evaluation.gradient, DUAL[state.threat.norm])
            away = evaluation.values.abs() / (losses.TINY + size)
            found = evaluation if found is None else _choose(away < distance, evaluation, found)
            distance = torch.minimum(distance, away)
        assert found is not None, "a classifier has two classes or more"
        return found

    def _advance(self, state: FabState, evaluation: Evaluation) -> tuple[Tensor, Tensor]:
        """Step towards the boundary.

        Returns:
            (S, 3, H, W), the weighted mean, with overshoot, of the projections of iterate and image onto
            {linearised margin = 0}; and (S, 2), the start of the search of the next projections.
        """
        images, at, norm = state.images.flatten(1), state.at.flatten(1), state.threat.norm
        normal = evaluation.gradient.flatten(1)
        # By how much <w, .> must fall. Differences are used, since <w, t> - b would cancel digits.
        falls = torch.stack([evaluation.values, evaluation.values + (images - at).mul_(normal).sum(1)])
        planes = Hyperplanes.of(normal, norm)
        moves = planes.moves((at, images), falls, state.eased.T)
        near, far = moves.lengths.clamp(min=FLAT)
        weight = (near / (near + far)).clamp(0, self.alpha_max)
        near, far = self.eta * moves.turn * torch.stack([1 - weight, weight])
        move = moves.reach[0].mul_(near[:, None]).addcmul_(moves.reach[1], far[:, None])
        mean = torch.lerp(at, images, weight[:, None])
        return mean.addcmul_(planes.signs, move).clamp_(0, 1).view_as(state.images), moves.eased.T


def _norm(delta: Tensor, norm: str) -> Tensor:
    """(S, ...) -> (S,) the norm of each row."""
    flat = delta.flatten(1)
    if norm == "linf":
        return torch.maximum(flat.amax(1), -flat.amin(1))
    return geometry.length(flat) if norm == "l2" else flat.abs().sum(1)


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """(S, C) -> (S, C - 1) z_k - z_y of the wrong classes k, ascending."""
    wrong = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    wrong = wrong + (wrong >= labels[:, None])
    return logits.gather(1, wrong) - logits.gather(1, labels[:, None])


def _choose(mask: Tensor, new: Evaluation, old: Evaluation) -> Evaluation:
    """Row-wise `new` where `mask` (S,), else `old`; finite only where both are."""
    return Evaluation(
        new.logits,
        pick(mask, new.values, old.values),
        pick(mask, new.gradient, old.gradient),
        old.finite & new.finite,
        pick(mask, new.zero, old.zero),
    )


def _around(rows: Rows, threat: Threat) -> Tensor:
    """(n, 3, H, W) points on the ball's surface in random directions, clipped into the box."""
    images = rows.images
    if threat.norm != "l1":  # in L1 `surface_start` projects, but the reference scales
        return geometry.surface_start(images, threat, rows.noise)
    draw = rows.noise.normal(tuple(images.shape[1:]))
    size = draw.double().abs().flatten(1).sum(1).float()
    return (images + geometry.radius(threat) * (draw / spread(size, draw)).to(images.device)).clamp_(0, 1)


plugin = Fab
