"""The shapes in which attacks call a model: how many rows a call has, idle ones included.

The numbers of a row may depend on the shape of the call that it is in. No library promises that they do not,
so on a CPU a run changes from one shape to another only where the model was seen to give the same bits in
both, on its own images. On a GPU large calls are worth more than equal last bits: there the shape grows
before anything is attacked, and from then on the same rule holds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustbench_vlm.engine import losses
from robustbench_vlm.engine.oracle import Oracle

LEAST = 4
"""Rows of the smallest calls. In calls of one to three rows matrix products round otherwise."""
FIRST = 8
"""Rows of the calls with which `auto` begins; larger ones are tried from there, and so is the smallest."""
FIXED = 64
"""Rows of a full call if no number was asked for: as is expected, and of a view that takes one shape only."""
TRIES, TRIAL = 2, 0.3
"""Calls of each shape, and seconds, after which larger calls are not taken."""
CHEAPER = 0.9
"""A call of twice the rows is taken where a row of it costs at most this part of what it cost before."""


def rounded(rows: int) -> int:
    """The rows of a call with room for `rows` images: 4, or the next multiple of 8.

    Vector units then work on whole vectors.
    """
    return LEAST if rows <= LEAST else -(-rows // FIRST) * FIRST


def halves(rows: int) -> list[int]:
    """The smaller shapes that may be tried, largest first."""
    found = []
    while rows % (2 * LEAST) == 0:
        rows //= 2
        found.append(rows)
    return found


def of_checks(n: int, rows: int) -> int:
    """Rows of the calls in which a model is checked on `n` images.

    They have at most `rows` rows, as the canonical pass has, whatever the attack's calls have: what is
    recorded of a check must not depend on it.
    """
    return rounded(min(n, rows))


def of_fixed(batch_size: int | None) -> int:
    """Rows of every call of a view that takes one shape only, and as expected of a full call of others."""
    return rounded(FIXED if batch_size is None else batch_size)


@dataclass
class Known:
    """What was found out about the shapes of one model; it holds for all attacks of one kind on it.

    Attributes:
        same: whether a small shape gives the bits of a large one, by (large, small).
        reached: rows of the largest calls of `auto` so far.
        tried: whether calls of more rows were tried and not taken.
    """

    same: dict[tuple[int, int], bool] = field(default_factory=dict)
    reached: int = FIRST
    tried: bool = False


@dataclass
class Shapes:
    """The shapes of one run.

    Attributes:
        oracle: the model as attacks call it; knows how many rows fit into memory.
        images: (n, 3, H, W); repeated in turn, they fill the calls that are compared.
        labels: (n,) int64.
        forwards: whether attacks call the model without gradient, so that those calls are compared.
        gradients: the same with gradient.
        batch_size: most rows with a trajectory in a call; None for `auto`.
        known: what is known already, and where it is noted.
    """

    oracle: Oracle
    images: Tensor
    labels: Tensor
    forwards: bool
    gradients: bool
    batch_size: int | None
    known: Known
    _numbers: dict[int, _Called] = field(default_factory=dict)

    @property
    def largest(self) -> int:
        """Rows of a full call as things stand: fewer after the memory ran out."""
        if self.batch_size is None and not self.oracle.fixed:
            wanted = self.known.reached
        else:
            wanted = of_fixed(self.batch_size)
        while wanted > self.oracle.calls.fitting:
            wanted = -(-wanted // 2)
        return wanted

    def fit(self, wanted: int) -> int:
        """The smallest shape with at least `wanted` rows, else the largest."""
        if self.oracle.fixed:
            return self.largest
        if self.batch_size is None:
            self._grow(wanted)
        largest = self.largest
        for shape in reversed(halves(largest)):
            if shape >= wanted and self._same_bits(largest, shape):
                return shape
        return largest

    def _grow(self, wanted: int) -> None:
        """Double the rows of full calls while there is work for them and a row gets cheaper."""
        known = self.known
        while self.largest == known.reached < wanted and not known.tried:
            now, double = known.reached, 2 * known.reached
            on_cpu = self.images.device.type == "cpu"
            cheaper = self._cheaper(now, double) and double <= self.oracle.calls.fitting
            if cheaper and (self._same_bits(double, now) or not on_cpu):
                smaller = [(small, same) for (large, small), same in known.same.items() if large == now]
                known.same |= {(double, small): same and known.same[double, now] for small, same in smaller}
                known.reached = double
            else:
                known.tried = True
            self._numbers = {shape: found for shape, found in self._numbers.items() if shape == double}

    def _cheaper(self, now: int, double: int) -> bool:
        """Whether a row costs less in calls of `double` rows.

        Before it is denied, calls are repeated and the fastest of each shape count: the first call of a shape
        also chooses kernels, and in any call another process may have had the core.
        """
        least = {shape: self._called(shape).seconds for shape in (double, now)}
        tries, began = 1, time.perf_counter()
        while least[double] > CHEAPER * least[now]:
            if tries >= TRIES and time.perf_counter() - began >= TRIAL:
                return False
            least = {shape: min(least[shape], self._call(shape).seconds) for shape in least}
            tries += 1
        return True

    def _same_bits(self, large: int, small: int) -> bool:
        """Whether the last rows of a large call have the same bits in a small call of their own.

        The large call may be any that was seen to give the bits of the large shape.
        """
        if (large, small) not in self.known.same:
            between = [shape for shape in halves(large) if shape > small]
            equal = [shape for shape in between if self.known.same.get((large, shape))]
            numbers = [self._called(shape).numbers for shape in (min(equal, default=large), small)]
            pairs = zip(*numbers, strict=True)
            # NaN differs from itself, so a model with NaN keeps one shape.
            self.known.same[large, small] = all(torch.equal(a[-small:], b) for a, b in pairs)
        return self.known.same[large, small]

    def _called(self, shape: int) -> _Called:
        """What calls of some shape give; made once."""
        if shape not in self._numbers:
            self._numbers[shape] = self._call(shape)
        return self._numbers[shape]

    def _call(self, shape: int) -> _Called:
        """Call the model as the attacks do: without gradient, with it, or both.

        The images of a call are the last ones of larger calls.
        """
        chosen = torch.arange(-shape, 0, device=self.images.device) % len(self.images)
        images, labels = self.images[chosen], self.labels[chosen]
        _wait(images.device)
        started, numbers = time.perf_counter(), []
        if self.forwards:
            numbers.append(self.oracle.logits(images))
        if self.gradients:
            found = self.oracle.gradient(images, lambda z: losses.cross_entropy(z, labels, labels))
            numbers += [found.logits, found.gradient]
        _wait(images.device)
        return _Called(numbers, (time.perf_counter() - started) / shape)


@dataclass(frozen=True)
class _Called:
    """Logits and image gradients of calls of one shape, and the seconds of a row in them."""

    numbers: list[Tensor]
    seconds: float


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
