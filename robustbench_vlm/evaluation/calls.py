"""How many model calls an evaluation makes, and of which shape: what its price is computed from.

The numbers of this file are counted, not measured: those of the checks by a model that counts its calls
(`tests/test_estimate.py` holds them), those of attacks from their cards and the schedule of the engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from robustbench_vlm.backends.backend import Backend
from robustbench_vlm.engine import attack_watch, batch_shapes
from robustbench_vlm.engine.interface import Attack, LookaheadAttack
from robustbench_vlm.engine.job import Stages
from robustbench_vlm.evaluation.chain import Chain


@dataclass(frozen=True)
class Calls:
    """Model calls of one shape.

    Attributes:
        rows: images in each call.
        forwards: forward passes, those before a gradient included.
        gradients: backward passes.
    """

    rows: int
    forwards: int
    gradients: int = 0


LOOKAHEAD = 4
"""Factor by which rows that look ahead save calls, where each image has as many; measured: up to 5."""
QUICK = 5
"""Gradient calls, or queries of a chain without gradients, after which an image that is easily broken is."""


@dataclass(frozen=True)
class Schedule:
    """How a backend puts images into calls.

    Attributes:
        backend: who attacks.
        rows: of every full call.
        active: rows that may hold an image.
        shrinks: whether calls become smaller where few images are left, as they do on a CPU.
    """

    backend: Backend
    rows: int
    active: int
    shrinks: bool

    def shape(self, wanted: int) -> int:
        """Rows of a call with at least `wanted` images."""
        smaller = batch_shapes.halves(self.rows) if self.shrinks else []
        return min(shape for shape in (self.rows, *smaller) if shape >= wanted)

    def stage(
        self, attack: Attack, n_classes: int, images: int, *, ahead: bool, worst: bool
    ) -> Iterator[Calls]:
        """Calls of one attack whose trajectories all run to their end.

        Args:
            attack: of the stage.
            n_classes: of the model.
            images: that enter the stage.
            ahead: whether trajectories of one image run beside each other.
            worst: whether rows that look ahead save no call.
        """
        count = len(attack.trajectories(range(n_classes - 1)))
        forwards, gradients = (total // count for total in attack.cost(n_classes))
        turns, together = (1, images * count) if ahead else (count, images)
        full, rest = divmod(together, self.active)
        if full:
            number = turns * full
            yield Calls(self.shape(self.active), number * forwards, number * gradients)
        if rest:
            shape = self.shape(rest)
            looks = isinstance(attack, LookaheadAttack) and self.backend.keyed and not worst
            saved = min(shape / rest, LOOKAHEAD) if looks else 1
            yield Calls(shape, math.ceil(turns * forwards / saved), turns * gradients)

    def shape_tests(self, group: Stages, called: list[Calls], *, all_of_them: bool) -> Iterator[Calls]:
        """Calls that find out whether smaller shapes give the same bits.

        Args:
            group: stages that share rows.
            called: the calls that the group makes.
            all_of_them: whether every smaller shape will be wanted, as where images end one by one.
        """
        wanted = {calls.rows for calls in called if calls.rows < self.rows}
        if not wanted:
            return
        gradients = int(any(attack.passes[1] for _, attack in group))
        smaller = batch_shapes.halves(self.rows)
        for shape in smaller if all_of_them else sorted(wanted):
            yield Calls(shape, 1 + gradients, gradients)
        if gradients:
            yield Calls(self.rows, 1, 1)


def before(rows: int, n: int, *, white_box: bool, worst: bool) -> Calls:
    """Calls of the checks before an attack; they are made once for all radii.

    Args:
        rows: of every call.
        n: number of images, of which at most `rows` are used.
        white_box: whether the chain takes gradients.
        worst: whether derivatives along lines disagree, so that the lines are cut into finer parts.
    """
    if not white_box:
        return Calls(rows, 7)
    ends = math.ceil(
        8 * min(n, max(1, rows // 2)) / rows
    )  # both ends of four steps from at most rows / 2 images
    forwards, gradients = 12 + ends, 4
    return Calls(rows, forwards + 5, gradients + 4) if worst else Calls(rows, forwards, gradients)


def after(rows: int, attack_gradients: int, *, worst: bool) -> Calls:
    """Calls of the checks after an attack that an image survived; they are made for each radius.

    Args:
        rows: of every call.
        attack_gradients: gradient calls of the attack, some of which are made again.
        worst: as for `before`.
    """
    if not attack_gradients:
        return Calls(rows, 1)
    again = math.ceil(attack_watch.ROWS * _kept(attack_gradients) / rows)
    forwards, gradients = 3 + again, 1 + again
    return Calls(rows, forwards + 5, gradients + 4) if worst else Calls(rows, forwards, gradients)


def _kept(calls: int) -> int:
    """Of how many of an attack's gradient calls some rows are kept (`attack_watch.GradientWatch`)."""
    kept, due = 0, 1
    while due <= calls:
        kept, due = kept + 1, int(attack_watch.GROWTH * due) + 1
    return kept


def of_cell(
    chain: Chain, n_classes: int, schedule: Schedule, n: int, attacked: int, *, worst: bool
) -> list[Calls]:
    """Calls of the clean pass, of the attack and of its verification for one radius.

    Args:
        chain: of attacks.
        n_classes: of the model.
        schedule: of the backend.
        n: number of images.
        attacked: how many of them meet every stage in full; the others are broken by the first one at once.
        worst: whether looking ahead saves no call.
    """
    first, rows = chain.stop == "first", chain.rows
    found = [Calls(rows, math.ceil(n / rows))]
    if n > attacked:
        quick = QUICK * math.ceil((n - attacked) / schedule.active)
        gradients = quick if chain.stages[0][1].passes[1] else 0
        found += [Calls(schedule.shape(min(n - attacked, schedule.active)), quick, gradients), Calls(rows, 1)]
    for group in schedule.backend.groups(chain.stages) if attacked else ():
        called = [
            calls
            for _, attack in group
            for calls in schedule.stage(
                attack, n_classes, attacked, ahead=first and schedule.backend.keyed, worst=worst
            )
        ]
        tests = schedule.shape_tests(group, called, all_of_them=first and attacked > 1)
        found += [*called, *tests, Calls(rows, len(group) * math.ceil(attacked / rows))]
    return found
