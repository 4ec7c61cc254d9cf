"""The engine: continuous batching of images over a fixed number of rows, and the verdict on each image.

Every model call has exactly `rows` rows; rows without work hold copies. So a row's numbers do not depend on
how many rows are alive, and neither do verdicts, adversarial images or margins. An image walks its
trajectories (stage, target, restart) one after another in one row; when it is broken or done, the next image
takes the row, and when no image is left, later trajectories of images still walking do, or the rows of a crew
help one. On a CPU, where idle rows cost as much as others, calls then shrink to a shape that was seen to give
the same bits. What ends a row is judged in the canonical pass: fp32, without gradient, in the fixed shape.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from robustbench_vlm.engine import batch_shapes, canonical, geometry, trajectories, verification
from robustbench_vlm.engine.batch_shapes import Shapes
from robustbench_vlm.engine.interface import Attack, Oracle, Rows, State, Stop, hold, scatter, single, take
from robustbench_vlm.engine.job import Block, Cost, check, checked
from robustbench_vlm.engine.noise import Keyed
from robustbench_vlm.engine.trajectories import End, Leg, Walk
from robustbench_vlm.errors import AttackError, InputError
from robustbench_vlm.threat import Threat
from robustbench_vlm.types import Classify, Finding

POLL = {"cpu": 1, "cuda": 8}  # iterations between two looks at the flags: a look waits for the device


@dataclass
class _Run:
    """The arguments of `run`, and what is under way."""

    oracle: Oracle
    classify: Classify
    device: torch.device
    blocks: Iterator[Block]  # images that nobody has looked at yet
    stages: Sequence[tuple[str, Attack]]
    attack: Attack  # steps the rows of all stages
    threat: Threat
    seed: int
    rows: int
    live: int
    stop: Stop
    on_finding: Callable[[Finding], None]
    keys: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    images: dict[int, Tensor] = field(default_factory=dict)  # those that wait or walk
    wrong: dict[int, list[int]] = field(default_factory=dict)  # their other classes, most likely first
    waiting: deque[Walk] = field(default_factory=deque)
    walking: list[Walk] = field(default_factory=list)
    held: deque[Leg] = field(default_factory=deque)
    jury: list[tuple[Leg, State, End]] = field(default_factory=list)
    crews: list[int] = field(default_factory=list)  # the lead of each row; empty where no row has one
    shapes: Shapes | None = None  # none where all calls have the full one
    judged: int = 0
    unconfirmed: int = 0

    def plan(self, block: Block, *, own: bool) -> None:
        """A walk for every image that is attackable; the others are reported at once.

        Args:
            block: the images.
            own: whether to copy those that walk, so that nothing holds on to the whole block.
        """
        first = len(self.keys)
        self.keys += block.keys
        self.labels += block.labels.tolist()
        wrong = verification.wrong_classes(block.clean, block.labels)
        names = [self.stages[stage][0] for stage in block.begin]
        for i in verification.attackable(
            block.clean, block.images, block.labels, block.keys, names, self.on_finding
        ):
            image = block.images[i]
            self.images[first + i], self.wrong[first + i] = image.clone() if own else image, wrong[i]
            self.waiting.append(self.walk(first + i, block.begin[i]))

    def more(self) -> bool:
        """Whether there is work left; a block is opened before all rows could use up the last one."""
        while len(self.waiting) < 2 * self.rows and (block := next(self.blocks, None)) is not None:
            self.plan(block, own=True)
        return bool(self.waiting or self.walking)

    def walk(self, index: int, stage: int) -> Walk:
        """The trajectories of an image in a stage."""
        _, attack = self.stages[stage]
        wrong = self.wrong[index]
        targets = wrong[: attack.ranks(len(wrong) + 1)] or [-1]
        return Walk(index, stage, [(t, restart) for t in targets for restart in range(attack.restarts)])

    def begin(self, legs: list[Leg]) -> State:
        """Fresh rows for trajectories of one stage."""
        index = [leg.walk.index for leg in legs]
        paths = [leg.walk.path[leg.number] for leg in legs]
        stage, attack = self.stages[legs[0].walk.stage]
        names = [f"{self.seed}/{self.keys[leg.walk.index]}/{stage}" for leg in legs]
        rows = Rows(
            images=torch.stack([self.images[i] for i in index]),
            labels=torch.tensor([self.labels[i] for i in index], device=self.device),
            targets=torch.tensor([target for target, _ in paths], device=self.device),
            noise=Keyed(tuple(f"{name}/{t}/{r}" for name, (t, r) in zip(names, paths, strict=True))),
            restarts=tuple(restart for _, restart in paths),
            stop=self.stop,
        )
        return attack.start(rows, self.threat)

    def shape(self, busy: int) -> int:
        """Rows of the next calls, for all that can take one: in large calls a row costs less."""
        if self.shapes is None or 2 * (busy + len(self.waiting)) > self.rows == self.live:
            return self.rows
        free = len(self.waiting)
        if self.stop == "first":  # later trajectories too
            free = sum(max(walk.cut - walk.given, 0) for walk in (*self.walking, *self.waiting))
        return self.shapes.smallest(min(self.live, busy + len(self.held) + free))

    def next_leg(self) -> Leg | None:
        """What a free row does next: go on, begin an image, or run ahead on one that is still walking."""
        while self.held:
            leg = self.held.popleft()
            if not leg.void:
                return leg
        if self.waiting:
            walk = self.waiting.popleft()
            self.walking.append(walk)
            return walk.lead()
        ahead = [walk for walk in self.walking if walk.given < walk.cut and self.stop == "first"]
        return min(ahead, key=lambda walk: walk.given).lead() if ahead else None

    def fill(self, state: State | None, slots: dict[int, Leg]) -> State | None:
        """Give rows without a trajectory to the next one; `slots` is changed."""
        given: list[tuple[int, Leg]] = []
        shape = self.shape(len(slots))
        if state is not None and len(state.labels) != shape:
            state, self.crews = batch_shapes.fit(state, slots, shape), [-1]  # who led is not where it was
        for slot in range(min(self.live, shape)):
            leg = self.next_leg() if slot not in slots else None
            if leg is not None:
                given.append((slot, leg))
        for stage in sorted({leg.walk.stage for _, leg in given if leg.held is None}):
            fresh = [(slot, leg) for slot, leg in given if leg.held is None and leg.walk.stage == stage]
            begun = self.begin([leg for _, leg in fresh])
            if state is None:
                state = take(begun, [min(row, len(fresh) - 1) for row in range(shape)])
            state = scatter(state, [slot for slot, _ in fresh], begun)
        for slot, leg in given:
            slots[slot] = leg
            if leg.held is not None and state is not None:
                state, leg.held = scatter(state, [slot], leg.held), None
        return state

    def muster(self, state: State, slots: dict[int, Leg]) -> State:
        """Rows that nobody needs, to the help of those that walk, as evenly as it goes."""
        alone = list(range(len(state.labels)))
        leads = list(alone)
        if not self.waiting and not self.held and slots:
            most = min(self.live, len(alone))
            busy, idle = sorted(slots), [slot for slot in range(most) if slot not in slots]
            for i, slot in enumerate(idle):
                leads[slot] = busy[i % len(busy)]
        if leads == alone == (self.crews or alone):
            return state
        self.crews = leads
        met: dict[int, int] = {}
        place = [0] * len(alone)
        for slot in sorted(alone, key=lambda slot: (leads[slot] != slot, slot)):
            place[slot] = met.get(leads[slot], 0)
            met[leads[slot]] = place[slot] + 1
        device = state.labels.device
        return self.attack.muster(
            state, torch.tensor(leads, device=device), torch.tensor(place, device=device)
        )

    def collect(self, state: State, slots: dict[int, Leg]) -> bool:
        """Take rows that have ended out of `slots`: to the jury if they may decide, else they are lost."""
        flags = state.done | state.nonfinite
        if self.stop == "first":
            flags = flags | state.broken
        ended = [slot for slot in flags.nonzero().flatten().tolist() if slot in slots]
        if ended:
            rows = take(state, ended)
            for i, (slot, end) in enumerate(zip(ended, trajectories.ends(rows), strict=True)):
                leg = slots.pop(slot)
                lost = self.stop == "first" and not end.broken and not end.nonfinite
                if lost and not leg.final:
                    self.lose(leg, end)
                else:
                    self.jury.append((leg, single(rows, i), end))
        return bool(ended)

    def lose(self, leg: Leg, end: End) -> None:
        """A trajectory that ended without success: the image walks on at once, if nobody ran ahead of it."""
        leg.walk.spent[leg.number] = end
        self.report(leg.walk)
        if leg.number + 1 == leg.walk.given < leg.walk.cut:
            self.held.append(leg.walk.lead())

    def due(self, busy: int) -> bool:
        """Whether to judge: full juries are cheapest, but while no image waits a verdict frees other rows."""
        least = max(busy, 1) if self.shapes is not None and self.shapes.some else 1
        return len(self.jury) >= (self.rows if self.waiting else min(least, self.rows))

    def judge(self, slots: dict[int, Leg]) -> None:
        """The canonical pass over rows that may be decisive: verdicts, or back to the rows.

        Rows in `slots` that a verdict makes void are taken out of it.
        """
        called, self.jury = self.jury[: self.rows], self.jury[self.rows :]
        adv = torch.cat([row.adv for _, row, _ in called])
        labels = torch.cat([row.labels for _, row, _ in called])
        clean = torch.cat([row.images for _, row, _ in called])
        found = verification.opinions(self.classify, adv, clean, labels, self.threat, self.rows)
        self.judged += 1
        right, copies = labels.tolist(), adv.cpu()
        for i, (leg, row, end) in enumerate(called):
            if leg.void:
                continue  # an earlier trajectory of the image was judged a moment ago
            key, stage, said = self.keys[leg.walk.index], self.stages[leg.walk.stage][0], found[i]
            error = "" if said.finite and not end.nonfinite else self.trouble(leg, end)
            if not error and said.excess > geometry.slack(self.threat):
                raise AttackError(f"{stage}: {key} is {said.excess:.3g} outside {self.threat} or [0, 1]")
            wrong = not error and said.prediction != right[i]
            unconfirmed = end.broken and not error and not wrong
            self.unconfirmed += unconfirmed
            again = unconfirmed and self.stop == "first"
            if not error and not wrong and (again or not end.done or not leg.final):
                self.go_on(leg, row, end)
                continue
            target, restart = leg.walk.path[leg.number]
            first = end.first if end.first >= 0 else end.iteration
            leg.walk.spent[leg.number] = end
            leg.walk.verdicts[leg.number] = Finding(
                key=key,
                broken=wrong,
                adv=copies[i].clone(),
                target=target,
                restart=restart,
                iteration=first if wrong else -1,
                forwards=0,
                backwards=0,
                prediction=said.prediction,
                margin=said.margin,
                error=error,
                stage=stage,
            )
            self.report(leg.walk)
        for slot in [slot for slot, leg in slots.items() if leg.void]:
            del slots[slot]
        self.jury = [called for called in self.jury if not called[0].void]

    def go_on(self, leg: Leg, row: State, end: End) -> None:
        """A row whose success was not confirmed, or whose trajectory ended without one."""
        row = dataclasses.replace(row, broken=torch.zeros_like(row.broken))
        if end.done and leg.final:  # judged once more, by the image it ends with
            self.jury.append((leg, row, dataclasses.replace(end, broken=False)))
        elif end.done:
            self.lose(leg, end)
        else:
            leg.held = row
            self.held.append(leg)

    def report(self, walk: Walk) -> None:
        """Hand out the finding of a walk as soon as there is one; a survivor enters the next stage."""
        finding = walk.finding
        if finding is None:
            return
        self.walking.remove(walk)
        if not finding.broken and not finding.error and walk.stage + 1 < len(self.stages):
            self.waiting.append(self.walk(walk.index, walk.stage + 1))
        else:
            del self.images[walk.index], self.wrong[walk.index]
        self.on_finding(finding)

    def trouble(self, leg: Leg, end: End) -> str:
        target, restart = leg.walk.path[leg.number]
        where = f"iteration {end.iteration - 1}, target {target}, restart {restart}"
        return f"{self.stages[leg.walk.stage][0]}: a logit or gradient is not finite ({where})"


def run(  # noqa: PLR0913 - the arguments are the experiment, and nothing else
    classify: Classify,
    images: Tensor,
    labels: Tensor,
    keys: Sequence[str],
    stages: Sequence[tuple[str, Attack]],
    threat: Threat,
    *,
    seed: int,
    n_classes: int,
    rows: int,
    live: int | None = None,
    stop: Stop = "first",
    clean: Tensor | None = None,
    begin: Sequence[int] | None = None,
    more: Iterable[Block] = (),
    find: Classify | None = None,
    on_finding: Callable[[Finding], None],
) -> Cost:
    """Attack every image and report one finding for each stage that it enters, in whatever order they end.

    A finding depends on the model, the image, its label and key, the attack, threat, stage name, seed and
    `rows`; not on the other images, their order, or `live`. So a run is resumed by leaving out what is found.

    Args:
        classify: (B, 3, H, W) in [0, 1] -> logits (B, n_classes); in eval mode, parameters best frozen.
        images: (N, 3, H, W) float32 in [0, 1], on the model's device.
        labels: (N,) int64.
        keys: N distinct names.
        stages: (name, attack) in order, attacks that `join`; each is given the survivors of the one before.
            The name is part of the noise's name.
        threat: ball and radius.
        seed: part of the noise's name.
        n_classes: classes that `classify` tells apart.
        rows: fixed shape of every model call.
        live: rows in use, at most `rows` (and that by default).
        stop: see `interface.Rows`.
        clean: (N, n_classes) logits of `canonical.logits(classify, images, rows)`, when already known.
        begin: the stage in which each image begins; the first by default.
        more: further images, if `images` is not empty; each block is opened when those before run out.
        find: the model as attacks see it, when that is not `classify`: in lower precision, compiled. Verdicts
            are `classify`'s in any case.
        on_finding: called once per image and stage. A misclassified clean image is reported as broken without
            attack.

    Raises:
        InputError: a norm that an attack does not know, pixels outside [0, 1], or arguments that disagree.
        AttackError: the attack left the ball or the box, or the model gives no gradient.
    """
    live = rows if live is None else live
    check(images, labels, keys, stages, threat, rows, live, n_classes)
    if not len(images):
        return Cost(0, 0, 0, 0)
    judged = 0
    if clean is None:
        clean, judged = canonical.logits(classify, images, rows), -(-len(images) // rows)
    if tuple(clean.shape) != (len(images), n_classes):
        raise InputError("clean logits", str(tuple(clean.shape)), str((len(images), n_classes)))
    oracle, attack = Oracle(find or classify, once=find not in (None, classify)), trajectories.joined(stages)
    blocks = map(
        partial(checked, stages=stages, threat=threat, rows=rows, live=live, n_classes=n_classes), more
    )
    what = _Run(
        oracle, classify, images.device, blocks, stages, attack, threat, seed, rows, live, stop, on_finding
    )
    what.judged = judged
    if oracle.classify is classify and images.device.type == "cpu":  # elsewhere idle rows cost little
        what.shapes = Shapes(oracle, images, labels, clean, rows, attack.cost(n_classes)[1] > 0)
    what.plan(Block(images, labels, keys, clean, begin or [0] * len(images)), own=False)
    poll = POLL.get(images.device.type, 1)
    slots: dict[int, Leg] = {}
    state: State | None = None
    changed = True
    while what.more():
        if changed:
            state = what.fill(state, slots)
            state = what.muster(state, slots) if attack.crews and state is not None else state
        if slots and state is not None:
            for _ in range(poll):
                stepped = attack.step(state, oracle)
                state = stepped if poll == 1 else hold(_active(state), state, stepped)
            changed = what.collect(state, slots)
        while what.due(len(slots)):
            what.judge(slots)
            changed = True
    return Cost(oracle.calls.forwards, oracle.calls.gradients, what.judged, what.unconfirmed)


def _active(state: State) -> Tensor:
    """(S,) rows that have not ended and so may move."""
    ended = state.done | state.nonfinite
    return ~(ended | state.broken) if state.stop == "first" else ~ended
