"""What an attack is: a state machine over S rows, one image a row, each row at its own iteration.

An attack is a frozen dataclass whose fields are its configuration. `start` sets up rows without the model;
`step` performs one iteration for all rows with a fixed number of model calls. The engine owns batching: it
reads `broken`, `done` and `nonfinite`, and gives a finished row to the next image. So an attack has no loop
over batches, no early exit and no resume of its own, and gets all three.

Rules for `step`: every tensor has leading dimension S; no operation mixes rows, except those of one crew (see
`Attack.assign`); no random numbers; nothing that waits for the device. The state that it is given is spent:
its memory may be written, but not where a row has ended, since the engine keeps such rows as they ended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from robustbench_vlm.engine.noise import Noise
from robustbench_vlm.errors import AttackError
from robustbench_vlm.threat import Threat
from robustbench_vlm.types import Classify

Stop = Literal["first", "last", "best"]


@dataclass(frozen=True)
class Rows:
    """Trajectories that are about to start.

    Attributes:
        images: (n, 3, H, W) float32 in [0, 1].
        labels: (n,) int64.
        targets: (n,) int64 class that the trajectory aims at, -1 if untargeted.
        noise: random numbers of each trajectory.
        restarts: index of each trajectory's restart.
        stop: `first`, a row ends at its first misclassified iterate. The others walk to the end: `last`
            returns the last misclassified iterate (PGD: the last iterate, whatever it is), `best` the
            misclassified iterate of largest objective (FAB: both the nearest one).
    """

    images: Tensor
    labels: Tensor
    targets: Tensor
    noise: Noise
    restarts: tuple[int, ...]
    stop: Stop = "first"


@dataclass(frozen=True)
class State:
    """What every attack knows about its S rows; attacks add their own fields.

    Attributes:
        threat, stop: the same for all rows.
        images, labels, targets: as in `Rows`.
        x: (S, 3, H, W) the iterate last evaluated, always in ball and box for ball attacks.
        iteration: (S,) int64, iterations finished; the evaluation of x_0 is the first.
        broken: (S,) bool, success: with `stop=first` at this iterate, otherwise at any so far.
        done: (S,) bool, the trajectory is walked to its end.
        nonfinite: (S,) bool, a logit or gradient was NaN or infinite.
        first: (S,) int64, iteration of the first success, -1 if none.
        zero_gradients: (S,) int64, evaluations whose image gradient was exactly zero.
        start_value: (S,) what is maximised, at the first evaluation; NaN before it.
        best_value: (S,) its largest value so far, -inf before the first evaluation.
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
        """(S, 3, H, W) the image by which each row is judged, were it to end now."""
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


def common(rows: Rows, threat: Threat, x: Tensor) -> dict[str, Any]:
    """The fields of `State` for rows that have done nothing yet, standing at `x`."""
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


class Attack(Protocol):
    """An attack plug-in."""

    norms: ClassVar[tuple[str, ...]]
    """Norms that it supports; the engine refuses others by name."""

    looks_ahead: ClassVar[bool]
    """Whether idle rows can help a row that walks, see `assign`."""

    @property
    def restarts(self) -> int:
        """Trajectories with fresh noise for each target."""
        ...

    def ranks(self, n_classes: int) -> int:
        """How many target classes are tried, most likely first; 0 if the attack is untargeted."""
        ...

    def substitutions(self, n_classes: int) -> list[str]:
        """What runs otherwise than configured because there are few classes; one sentence each."""
        ...

    def cost(self, n_classes: int) -> tuple[int, int]:
        """(forward passes, image gradients) of an image that survives every trajectory."""
        ...

    def join(self, other: Attack) -> Attack | None:
        """The attack whose `step` serves rows started by either, or None: then they need tables of their own.

        Stages in a row that join share their model calls, each row with the loss of its own stage.
        """
        ...

    def start(self, rows: Rows, threat: Threat) -> State:
        """State of trajectories before their first model call. Row by row: independent of n."""
        ...

    def assign(self, state: AnyState, leaders: Tensor, positions: Tensor) -> AnyState:
        """Rows grouped into crews, each working ahead on one trajectory; called only if `looks_ahead`.

        Args:
            state: of S rows.
            leaders: (S,) int64, the row whose trajectory each row works on; its own index for a row alone.
            positions: (S,) int64, position within the crew, 0 for the lead.

        Returns:
            The state in which every row holds its lead's trajectory. What the rows of a crew find must be
            what the lead alone would find, and stand in all of its rows.
        """
        ...

    def step(self, state: State, oracle: Oracle) -> State:
        """One iteration of every row."""
        ...


class Alone:
    """What an attack inherits whose rows share a table with no other attack and work alone."""

    looks_ahead: ClassVar[bool] = False

    def join(self, other: Attack) -> Attack | None:
        """Only with its equal."""
        same: object = self
        return other if other == same else None

    def assign(self, state: AnyState, leaders: Tensor, positions: Tensor) -> AnyState:
        """Never called."""
        raise NotImplementedError


@dataclass(frozen=True)
class Evaluation:
    """One evaluation with gradient.

    Attributes:
        logits: (S, C).
        values: (S,) what is maximised.
        gradient: (S, 3, H, W) gradient of each row's own value.
        finite: (S,) bool, all logits and gradient entries are finite.
        zero: (S,) bool, the gradient is exactly zero everywhere.
    """

    logits: Tensor
    values: Tensor
    gradient: Tensor
    finite: Tensor
    zero: Tensor


@dataclass
class Calls:
    """Model calls so far: forwards without gradient, and image gradients."""

    forwards: int = 0
    gradients: int = 0


@dataclass(frozen=True)
class Oracle:
    """The model as attacks see it: always all S rows, gradients with respect to images only.

    Whatever precision the model works in, attacks are given float32.

    Attributes:
        once: a forward can be differentiated only once (a compiled or replayed model overwrites what further
            backward passes need), so every gradient has a forward of its own.
    """

    classify: Classify
    calls: Calls = field(default_factory=Calls)
    once: bool = False

    def logits(self, images: Tensor) -> Tensor:
        """(S, 3, H, W) -> (S, C), without gradient."""
        self.calls.forwards += 1
        with torch.no_grad():
            return self.classify(images.clone()).detach().float()  # a model may write into its input

    def gradient(self, images: Tensor, objective: Callable[[Tensor], Tensor]) -> Evaluation:
        """Evaluate and differentiate `objective` (logits (S, C) -> (S,)) at `images`.

        The sum over rows is differentiated, so each row's gradient is its own whatever S is. Parameters
        never receive a gradient.

        Raises:
            AttackError: the logits do not depend on the image through differentiable operations.
        """
        (seen,) = self.gradients(images, lambda logits: objective(logits)[:, None])
        return seen

    def gradients(self, images: Tensor, objectives: Callable[[Tensor], Tensor]) -> Iterator[Evaluation]:
        """As `gradient`, for M objectives (logits (S, C) -> (S, M)): one forward, M backward passes.

        One after the other, so that no more than one gradient need be held at a time.
        """
        leaf, logits, values = self._evaluate(images, objectives)
        last = values.shape[1] - 1
        for number in range(last + 1):
            if number and self.once:
                leaf, logits, values = self._evaluate(images, objectives)
            yield self._differentiate(leaf, logits, values[:, number], keep=number < last and not self.once)

    def _evaluate(
        self, images: Tensor, objectives: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Leaf, logits and values with their graph."""
        leaf = images.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.classify(leaf.clone()).float()
            return leaf, logits, objectives(logits)

    def _differentiate(self, leaf: Tensor, logits: Tensor, values: Tensor, *, keep: bool) -> Evaluation:
        """The gradient of `values` (S,); `keep` spares the graph for further backward passes."""
        self.calls.gradients += 1
        if not values.requires_grad:
            raise AttackError("the model gives no gradient with respect to the image: is it under no_grad?")
        (gradient,) = torch.autograd.grad(values.sum(), leaf, retain_graph=keep, allow_unused=True)
        if gradient is None:
            raise AttackError("the model's logits do not depend on the image")
        # one reduction tells zero, finite and neither apart: NaN and infinity pass through a maximum
        largest = gradient.flatten(1).abs().amax(1)
        finite = torch.isfinite(largest + logits.detach().sum(1))
        return Evaluation(logits.detach(), values.detach(), gradient, finite, largest == 0)


def misclassified(logits: Tensor, labels: Tensor) -> Tensor:
    """(S,) bool: the first largest logit is not the label's."""
    return logits.argmax(1) != labels


def spread(values: Tensor, images: Tensor) -> Tensor:
    """(S,) row values shaped to broadcast over (S, 3, H, W)."""
    return values.reshape(-1, *[1] * (images.ndim - 1))


def pick(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Row-wise `new` where `mask` (S,) else `old`; on the CPU without copying when all rows agree."""
    if mask.device.type == "cpu":
        count = int(mask.sum())
        if count == 0:
            return old
        if count == mask.numel():
            return new
    return torch.where(spread(mask, new) if new.ndim > 1 else mask, new, old)


def _tensors(state: State) -> dict[str, Any]:
    return {
        field.name: value
        for field in dataclasses.fields(state)
        if isinstance(value := getattr(state, field.name), Tensor)
    }


def take(state: AnyState, slots: list[int]) -> AnyState:
    """A copy of the given rows as a state of `len(slots)` rows."""
    return rows_of(state, torch.tensor(slots, device=state.labels.device))


def rows_of(state: AnyState, index: Tensor) -> AnyState:
    """The same with the rows as (n,) int64."""
    rows: dict[str, Any] = {k: v.index_select(0, index) for k, v in _tensors(state).items()}
    return dataclasses.replace(state, **rows)


def single(state: AnyState, slot: int) -> AnyState:
    """One row as a view of a state that nothing steps any more."""
    row: dict[str, Any] = {k: v[slot : slot + 1] for k, v in _tensors(state).items()}
    return dataclasses.replace(state, **row)


def scatter(state: AnyState, slots: list[int], fresh: AnyState) -> AnyState:
    """`state` with row i of `fresh` in slot `slots[i]`."""
    index = torch.tensor(slots, device=state.labels.device)
    new = _tensors(fresh)
    filled: dict[str, Any] = {k: v.index_copy(0, index, new[k]) for k, v in _tensors(state).items()}
    return dataclasses.replace(state, **filled)


def freeze(active: Tensor, old: AnyState, new: AnyState) -> AnyState:
    """`new` for rows in `active` (S,) bool, `old` for the others: what ended stays as it ended."""
    before = _tensors(old)
    changed: dict[str, Any] = {
        name: torch.where(spread(active, value), value, before[name])
        for name, value in _tensors(new).items()
        if value is not before[name]
    }
    return dataclasses.replace(new, **changed)
