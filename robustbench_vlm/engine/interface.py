"""The contract of attacks: a state machine over S rows, each row with one image at its own iteration.

An attack is a frozen dataclass whose fields are its configuration. `start` sets up rows without the model;
`step` performs one iteration of all rows with a fixed number of model calls. The engine owns batching: it
reads `broken`, `done` and `nonfinite`, and gives a finished row to the next image. So an attack has no loop
over batches, no early exit and no resume of its own, and gets all three.

Rules for `step`:

- Every tensor of a state has leading dimension S.
- No operation mixes rows, except those of one lookahead group (`LookaheadAttack`).
- No random numbers: all noise is drawn in `start`.
- Nothing waits for the device.
- `step` may write into the memory of the state that it is given, but not into rows that have ended: the
  engine may step those once more before it takes them from the state in which they ended.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from robustbench_vlm.engine import losses
from robustbench_vlm.engine.noise import Noise
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.threat import Threat

Stop = Literal["first", "last", "best"]
"""When a trajectory ends and which iterate it returns; see `Rows`."""


@dataclass(frozen=True)
class Rows:
    """Trajectories that are about to start, one a row.

    Attributes:
        images: (n, 3, H, W) float32 in [0, 1].
        labels: (n,) int64.
        targets: (n,) int64 class that each trajectory aims at, -1 if untargeted.
        noise: random numbers of each trajectory.
        restarts: index of each trajectory's restart.
        stop: `first`: a row ends at its first misclassified iterate. With `last` and `best` it runs to its
            end. `last` returns the last misclassified iterate (PGD: the last iterate, whatever it is), `best`
            the misclassified iterate of largest objective. FAB returns the nearest one with both.
        loss_names: losses of all stages whose rows share this state; empty if the stage is alone.
    """

    images: Tensor
    labels: Tensor
    targets: Tensor
    noise: Noise
    restarts: tuple[int, ...]
    stop: Stop = "first"
    loss_names: tuple[losses.Name, ...] = ()


@dataclass(frozen=True)
class State:
    """What every attack knows about its S rows; attacks add their own fields.

    Attributes:
        threat, stop: the same for all rows.
        images, labels, targets: as in `Rows`.
        x: (S, 3, H, W) the iterate last evaluated, always in ball and box for ball attacks.
        iteration: (S,) int64, iterations finished; the evaluation of the start is the first.
        broken: (S,) bool, success: with `stop=first` at this iterate, otherwise at any so far.
        done: (S,) bool, the trajectory has reached its end.
        nonfinite: (S,) bool, a logit or gradient was NaN or infinite.
        first: (S,) int64, iteration of the first success, -1 if none.
        zero_gradients: (S,) int64, evaluations whose image gradient was exactly zero.
        start_value: (S,) the objective at the first evaluation; NaN before it.
        best_value: (S,) the largest objective so far, -inf before the first evaluation.
    """

    threat: Threat
    stop: Stop
    images: Tensor
    labels: Tensor
    targets: Tensor
    x: Tensor
    iteration: Tensor
    broken: Tensor
    done: Tensor
    nonfinite: Tensor
    first: Tensor
    zero_gradients: Tensor
    start_value: Tensor
    best_value: Tensor

    @property
    def adv(self) -> Tensor:
        """(S, 3, H, W) the image that each row returns, were it to end now."""
        return self.x

    @property
    def forwards(self) -> Tensor:
        """(S,) forward passes spent on each trajectory so far."""
        return self.iteration

    @property
    def backwards(self) -> Tensor:
        """(S,) image gradients spent on each trajectory so far."""
        return self.iteration


AnyState = TypeVar("AnyState", bound=State)


def initial(rows: Rows, threat: Threat, x: Tensor) -> dict[str, Any]:
    """The fields of `State` for rows that will evaluate `x` first."""
    labels = rows.labels
    zero = torch.zeros_like(labels)
    false = torch.zeros_like(labels, dtype=torch.bool)
    number = torch.zeros(len(labels), dtype=rows.images.dtype, device=rows.images.device)
    return {
        "threat": threat,
        "stop": rows.stop,
        "images": rows.images,
        "labels": labels,
        "targets": rows.targets,
        "x": x,
        "iteration": zero,
        "broken": false,
        "done": false,
        "nonfinite": false,
        "first": zero - 1,
        "zero_gradients": zero,
        "start_value": number + torch.nan,
        "best_value": number - torch.inf,
    }


def progress(state: State, values: Tensor) -> dict[str, Any]:
    """`start_value` and `best_value` after an evaluation that gave `values` (S,)."""
    return {
        "start_value": torch.where(state.iteration == 0, values, state.start_value),
        "best_value": torch.maximum(state.best_value, values),
    }


class Attack(ABC):
    """An attack plug-in: a frozen dataclass with the members `norms`, `passes`, `start` and `step`.

    The other members are derived from three fields, where the dataclass has them: `loss` (a name of
    `losses.LOSSES`), `restarts` (trajectories with fresh noise) and `targets` (number of target classes, most
    likely first; 0 if untargeted).

    A file of the folder `attacks` that ends in `plugin = <the class>` is found by its name, and the contract
    tests (`tests/test_attacks.py`) run it under each of its norms and each stopping rule without being told
    of it. They take the numbers from the packaged chains that use the attack, with fewer steps, or from the
    defaults of its fields if no chain does; so give fields defaults until there is a chain.
    """

    norms: ClassVar[tuple[str, ...]]
    """Norms that it supports, of `linf`, `l2`, `l1`; the engine refuses others."""

    @property
    @abstractmethod
    def passes(self) -> tuple[int, int]:
        """(forward passes, image gradients) of one trajectory that finds nothing."""

    @abstractmethod
    def start(self, rows: Rows, threat: Threat) -> State:
        """The state of trajectories before their first model call; each row independent of the others."""

    @abstractmethod
    def step(self, state: Any, oracle: Oracle) -> State:  # noqa: ANN401 - of the class that `start` returns
        """One iteration of every row."""

    def target_count(self, n_classes: int) -> int:
        """How many target classes are tried; 0 if the attack is untargeted."""
        targets: int = getattr(self, "targets", 0)
        return min(targets, n_classes - 1)

    def trajectories(self, wrong: Sequence[int]) -> list[tuple[int, int]]:
        """(target class, restart) of each trajectory of an image, in order; the class is -1 if untargeted.

        Args:
            wrong: wrong classes of the image, most likely first.
        """
        targets = wrong[: self.target_count(len(wrong) + 1)] or [-1]
        return [(target, restart) for target in targets for restart in range(getattr(self, "restarts", 1))]

    def cost(self, n_classes: int) -> tuple[int, int]:
        """(forward passes, image gradients) of an image that survives every trajectory."""
        count = len(self.trajectories(range(n_classes - 1)))
        forwards, gradients = self.passes
        return count * forwards, count * gradients

    def substitutions(self, n_classes: int) -> list[str]:
        """What runs otherwise than configured because there are few classes; one sentence each."""
        return losses.few_classes(getattr(self, "loss", None), getattr(self, "targets", 0), n_classes)

    @property
    def cross_entropy_only(self) -> bool:
        """Whether cross-entropy is all that it maximises, so that it fails where softmax saturates."""
        return getattr(self, "loss", None) == "ce"

    def shares_rows(self, other: Attack) -> bool:
        """Whether the rows that `other` starts can be stepped by this attack, and the other way round.

        Stages in a row that share rows also share model calls. An attack that says yes to another `loss`
        must step each row with the loss of its own stage; all of them are in `Rows.loss_names`.
        """
        same: object = self
        return other == same


class LookaheadAttack(Attack):
    """An attack whose idle rows can help another row, because its proposals do not depend on outcomes."""

    @abstractmethod
    def assign(self, state: Any, leaders: Tensor, positions: Tensor) -> Any:  # noqa: ANN401 - as in `step`
        """Assign rows to lookahead groups; the rows of a group work ahead on the trajectory of its leader.

        Args:
            state: of S rows.
            leaders: (S,) int64, the row whose trajectory each row works on; its own index for a row alone.
            positions: (S,) int64, position within the group, 0 for the leader.

        Returns:
            The state in which every row has its leader's trajectory. What the rows of a group find must be
            what the leader alone would find, and stand in all of its rows.
        """
