"""How many model calls an evaluation makes, and of which shape: what its price is computed from.

The numbers of this file are counted, not measured: those of the checks by a model that counts its calls
(`tests/test_estimate.py` holds them), those of attacks from their cards and the schedule of the engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from robustbench_vlm.backends.backend import Backend
from robustbench_vlm.engine import attack_watch, batch_shapes, derivatives, gradient_check, model_checks
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
    """How a backend puts images into calls of the attacked model.

    Attributes:
        backend: who attacks.
        full: rows of a full call.
        active: rows of it that may hold an image.
        shrinks: whether calls become smaller where few images are left, as they do on a CPU.
        tries: whether the rows of a full call are found by trial, from `batch_shapes.FIRST` up.
    """

    backend: Backend
    full: int
    active: int
    shrinks: bool
    tries: bool = False

    @classmethod
    def of(cls, backend: Backend, rows: int, batch_size: int | None, *, on_cpu: bool) -> Schedule:
        """Of a backend, the rows of the canonical pass, what was asked for, and the device."""
        if not backend.keyed:
            return cls(backend, rows, rows, shrinks=False)
        full, free = batch_shapes.of_fixed(batch_size), not backend.precision.fixed
        return cls(backend, full, batch_size or full, on_cpu and free, batch_size is None and on_cpu and free)

    def shape(self, wanted: int) -> int:
        """Rows of a call with at least `wanted` images."""
        smaller = batch_shapes.halves(self.full) if self.shrinks else []
        return min(shape for shape in (self.full, *smaller) if shape >= wanted)

    def stage(
        self, attack: Attack, n_classes: int, images: int, *, ahead: bool, worst: bool
    ) -> Iterator[Calls]:
        """Calls of one attack whose trajectories all run to their end.

        Args:
            attack: of the stage.
            n_classes: of the model.
            images: that enter the stage.
            ahead: whether trajectories of one image run beside each other; on a CPU only in rows that
                rounding leaves over.
            worst: whether rows that look ahead save no call.
        """
        count = len(attack.trajectories(range(n_classes - 1)))
        forwards, gradients = (total // count for total in attack.cost(n_classes))
        beside = ahead and not self.shrinks
        turns, together = (1, images * count) if beside else (count, images)
        full, rest = divmod(together, self.active)
        if full:
            number = turns * full
            yield Calls(self.shape(self.active), number * forwards, number * gradients)
        if rest:
            shape = self.shape(rest)
            looks = isinstance(attack, LookaheadAttack) and self.backend.keyed and not worst
            saved = min(shape / rest, LOOKAHEAD) if looks else 1
            if ahead and self.shrinks:
                turns = math.ceil(turns * rest / min(shape, self.active))
            yield Calls(shape, math.ceil(turns * forwards / saved), turns * gradients)

    def shape_tests(self, group: Stages, called: list[Calls], *, all_of_them: bool) -> Iterator[Calls]:
        """Calls that find out which shapes give the same bits, and which are fast.

        Args:
            group: stages that share rows.
            called: the calls that the group makes.
            all_of_them: whether every smaller shape will be wanted, as where images end one by one.
        """
        wanted = {calls.rows for calls in called}
        if not self.shrinks or not wanted:
            return
        largest = max(wanted)
        if all_of_them:
            wanted |= {*batch_shapes.halves(largest)}
        begun = batch_shapes.FIRST if self.tries else self.full
        wanted |= {shape for shape in batch_shapes.halves(largest) if self.tries and shape > begun}
        if wanted <= {begun}:
            return
        passes = group[0][1].passes
        forwards, gradients = int(passes[0] > passes[1]), int(passes[1] > 0)
        for shape in sorted({*wanted, begun}):
            yield Calls(shape, forwards + gradients, gradients)


def before(rows: int, n: int, *, white_box: bool, worst: bool) -> Calls:
    """Calls of the checks before an attack; they are made once for all radii.

    Args:
        rows: of every call.
        n: number of images, of which at most `model_checks.SAMPLE` are used.
        white_box: whether the chain takes gradients.
        worst: whether derivatives along lines disagree, so that the lines are cut into finer parts.
    """
    used = min(n, model_checks.SAMPLE)

    def calls(images: int) -> int:
        return math.ceil(images / rows)

    whole = calls(used)
    if not white_box:
        return Calls(rows, 7 * whole)
    points = min(used, max(gradient_check.LEAST_POINTS, used // 2))
    lines = min(used, max(gradient_check.LEAST_LINES, used // 8))
    along = (2 + 6 * (used > 1)) * lines  # short lines in two parts, and lines to other images in six
    ends = 2 * (1 + (used > 1)) * lines
    gradients = whole + calls(points) + calls(along)  # the first with two backward passes
    forwards = 7 * whole + gradients + calls(points) + calls(8 * points) + calls(ends)
    if worst:
        finer = calls(derivatives.FINER * along)
        return Calls(rows, forwards + calls(ends) + finer, gradients + whole + finer)
    return Calls(rows, forwards, gradients + whole)


def after(
    rows: int, called: int, attack_gradients: int, images: int, stages: int, *, worst: bool
) -> list[Calls]:
    """Calls of the checks after an attack that an image survived; they are made for each radius.

    Args:
        rows: of calls of the canonical pass.
        called: of calls in which the checks see the model.
        attack_gradients: gradient calls of the attack, some of which are made again.
        images: that are attacked.
        stages: of the attack.
        worst: as for `before`.
    """
    again = [Calls(rows, 1)]
    if not attack_gradients:
        return again
    least, most = attack_watch.LINES
    lines = min(images, most, max(least, images * stages // 8))
    kept = math.ceil(attack_watch.ROWS * _kept(attack_gradients) / called)
    ends, along = math.ceil(2 * lines / called), math.ceil(attack_watch.PARTS * lines / called)
    again.append(Calls(called, kept + ends + along, kept + along))
    if worst:
        finer = math.ceil(derivatives.FINER * attack_watch.PARTS * lines / called)
        again.append(Calls(called, ends + finer, finer))
    return again


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
