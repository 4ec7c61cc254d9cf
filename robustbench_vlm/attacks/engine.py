"""The engine: continuous batching of images over a fixed number of rows, and the verdict on each image.

Every model call has exactly `rows` rows; rows without work hold copies. So a row's numbers do not depend on
how many rows are alive, and neither do verdicts, adversarial images or margins. An image walks its
trajectories (target, restart) one after another in one row; when it is broken or done, the next image takes
the row, and when no image is left, later trajectories of images still walking do. What ends a row is judged
in the canonical pass: without gradient, in the same fixed shape. The finding is that of the first success in
the order of trajectories, and counts what a walk up to there spends, so it does not show what ran beside.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustbench_vlm.attacks import geometry, losses
from robustbench_vlm.attacks.interface import Attack, Oracle, Rows, State, Stop, hold, scatter, take
from robustbench_vlm.errors import AttackError, InputError
from robustbench_vlm.threat import Threat
from robustbench_vlm.types import Classify, Finding

POLL = {"cpu": 1, "cuda": 8}  # iterations between two looks at the flags: a look waits for the device


def logits(classify: Classify, images: Tensor, rows: int) -> Tensor:
    """The canonical clean pass: (N, 3, H, W) -> (N, C) float32, every call padded to `rows` rows."""
    found = []
    with torch.no_grad():
        for chunk in torch.split(images, rows):
            found.append(classify(padded(chunk, rows))[: len(chunk)].float())
    return torch.cat(found)


def position_dependence(classify: Classify, images: Tensor, rows: int) -> float:
    """Largest change of a logit when the same images stand in other rows of the same shape.

    Anything but 0 means that the numbers of a row depend on which row it is, and then findings may differ in
    their last bits with scheduling. For integrity checks and self-tests.
    """
    batch = padded(images[:rows], rows)
    straight = logits(classify, batch, rows)
    turned = logits(classify, batch.roll(rows // 2 + 1, 0), rows).roll(-(rows // 2 + 1), 0)
    return float((straight - turned).abs().max())


def padded(images: Tensor, rows: int) -> Tensor:
    """(n, 3, H, W), n <= rows -> (rows, 3, H, W), filled with copies of the first row."""
    missing = rows - len(images)
    return images if missing == 0 else torch.cat([images, images[:1].expand(missing, *images.shape[1:])])


@dataclass(eq=False)
class _Walk:
    """One image and its trajectories.

    Attributes:
        index: position of the image.
        path: (target class, restart) of each trajectory, in order.
        given: trajectories handed out so far.
        spent: (forwards, backwards, zero gradients) of each trajectory that ended.
        verdicts: what the canonical pass said where a trajectory was decisive: a success, an error, the end.
    """

    index: int
    path: list[tuple[int, int]]
    given: int = 0
    spent: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    verdicts: dict[int, Finding] = field(default_factory=dict)

    @property
    def cut(self) -> int:
        """The first decisive trajectory known; later ones no longer matter."""
        return min(self.verdicts, default=len(self.path))

    @property
    def finding(self) -> Finding | None:
        """The finding, once nothing that still runs can come before it."""
        cut = self.cut
        if cut == len(self.path) or any(number not in self.spent for number in range(cut + 1)):
            return None
        columns = zip(*(self.spent[number] for number in range(cut + 1)), strict=True)
        forwards, backwards, zero_gradients = (sum(column) for column in columns)
        return dataclasses.replace(
            self.verdicts[cut], forwards=forwards, backwards=backwards, zero_gradients=zero_gradients
        )


@dataclass
class _Leg:
    """One trajectory of one image, in a row or about to be."""

    walk: _Walk
    number: int
    held: State | None = None  # one row, to go on after a success that the canonical pass did not confirm

    @property
    def final(self) -> bool:
        return self.number == len(self.walk.path) - 1

    @property
    def void(self) -> bool:
        """An earlier trajectory of the same image has decided."""
        return self.number > self.walk.cut


@dataclass
class _Run:
    """The arguments of `run`, and what is under way."""

    oracle: Oracle
    images: Tensor
    labels: Tensor
    keys: Sequence[str]
    attack: Attack
    threat: Threat
    stage: str
    seed: int
    rows: int
    live: int
    stop: Stop
    on_finding: Callable[[Finding], None]
    waiting: deque[_Walk] = field(default_factory=deque)
    walking: list[_Walk] = field(default_factory=list)
    held: deque[_Leg] = field(default_factory=deque)
    jury: list[tuple[_Leg, State]] = field(default_factory=list)

    def begin(self, legs: list[_Leg]) -> State:
        """Fresh rows for trajectories."""
        index = torch.tensor([leg.walk.index for leg in legs], device=self.images.device)
        paths = [leg.walk.path[leg.number] for leg in legs]
        names = [f"{self.seed}/{self.keys[leg.walk.index]}/{self.stage}" for leg in legs]
        rows = Rows(
            images=self.images.index_select(0, index),
            labels=self.labels.index_select(0, index),
            targets=torch.tensor([target for target, _ in paths], device=self.images.device),
            names=tuple(f"{name}/{t}/{r}" for name, (t, r) in zip(names, paths, strict=True)),
            restarts=tuple(restart for _, restart in paths),
            stop=self.stop,
        )
        return self.attack.start(rows, self.threat)

    def next_leg(self) -> _Leg | None:
        """What a free row does next: go on, begin an image, or run ahead on one that is still walking."""
        while self.held:
            leg = self.held.popleft()
            if not leg.void:
                return leg
        if self.waiting:
            walk = self.waiting.popleft()
            self.walking.append(walk)
            return self.lead(walk)
        ahead = [walk for walk in self.walking if walk.given < walk.cut and self.stop == "first"]
        return self.lead(min(ahead, key=lambda walk: walk.given)) if ahead else None

    @staticmethod
    def lead(walk: _Walk) -> _Leg:
        """The next trajectory of an image."""
        walk.given += 1
        return _Leg(walk, walk.given - 1)

    def fill(self, state: State | None, slots: dict[int, _Leg]) -> State | None:
        """Give rows without a trajectory to the next one; `slots` is changed."""
        given: list[tuple[int, _Leg]] = []
        for slot in range(self.live):
            leg = self.next_leg() if slot not in slots else None
            if leg is not None:
                given.append((slot, leg))
        fresh = [(slot, leg) for slot, leg in given if leg.held is None]
        if fresh:
            begun = self.begin([leg for _, leg in fresh])
            if state is None:
                state = take(begun, [min(row, len(fresh) - 1) for row in range(self.rows)])
            state = scatter(state, [slot for slot, _ in fresh], begun)
        for slot, leg in given:
            slots[slot] = leg
            if leg.held is not None and state is not None:
                state, leg.held = scatter(state, [slot], leg.held), None
        return state

    def collect(self, state: State, slots: dict[int, _Leg]) -> None:
        """Take rows that have ended out of `slots`: to the jury if they may decide, else they are lost."""
        flags = torch.stack([state.broken, state.done, state.nonfinite]).tolist()
        ended: list[int] = []
        for slot in sorted(slots):
            broken, done, nonfinite = (column[slot] for column in flags)
            if slots[slot].void:
                del slots[slot]
            elif done or nonfinite or (broken and self.stop == "first"):
                ended.append(slot)
        if not ended:
            return
        rows = take(state, ended)
        for i, slot in enumerate(ended):
            leg, row = slots.pop(slot), take(rows, [i])
            lost = self.stop == "first" and not flags[0][slot] and not flags[2][slot]
            if lost and not leg.final:
                self.lose(leg, row)
            else:
                self.jury.append((leg, row))

    def lose(self, leg: _Leg, row: State) -> None:
        """A trajectory that ended without success: the image walks on at once, if nobody ran ahead of it."""
        leg.walk.spent[leg.number] = _spent(row)
        self.report(leg.walk)
        if leg.number + 1 == leg.walk.given < leg.walk.cut:
            self.held.append(self.lead(leg.walk))

    def judge(self) -> None:
        """The canonical pass over rows that may be decisive: verdicts, or back to the rows."""
        called, self.jury = self.jury[: self.rows], self.jury[self.rows :]
        adv = torch.cat([row.adv for _, row in called])
        labels = torch.cat([row.labels for _, row in called])
        clean = torch.cat([row.images for _, row in called])
        found = logits(self.oracle.classify, adv, self.rows)
        outside = geometry.excess(adv, clean, self.threat).tolist()
        margins, predictions = losses.judge(found, labels).tolist(), found.argmax(1).tolist()
        finite, copies = found.isfinite().all(1).tolist(), adv.cpu()
        for i, (leg, row) in enumerate(called):
            if leg.void:
                continue  # an earlier trajectory of the image was judged a moment ago
            key = self.keys[leg.walk.index]
            error = "" if finite[i] and not bool(row.nonfinite) else self.trouble(leg, row)
            if not error and outside[i] > geometry.slack(self.threat):
                raise AttackError(f"{self.stage}: {key} is {outside[i]:.3g} outside {self.threat} or [0, 1]")
            wrong = not error and predictions[i] != int(row.labels)
            unconfirmed = bool(row.broken) and self.stop == "first"
            if not error and not wrong and (unconfirmed or not row.done or not leg.final):
                self.go_on(leg, dataclasses.replace(row, broken=torch.zeros_like(row.broken)))
                continue
            target, restart = leg.walk.path[leg.number]
            first = int(row.first) if int(row.first) >= 0 else int(row.iteration)
            leg.walk.spent[leg.number] = _spent(row)
            leg.walk.verdicts[leg.number] = Finding(
                key=key,
                broken=wrong,
                adv=copies[i].clone(),
                target=target,
                restart=restart,
                iteration=first if wrong else -1,
                forwards=0,
                backwards=0,
                prediction=predictions[i],
                margin=margins[i],
                error=error,
            )
            self.report(leg.walk)

    def go_on(self, leg: _Leg, row: State) -> None:
        """A row whose success was not confirmed, or whose trajectory ended without one."""
        if bool(row.done) and leg.final:
            self.jury.append((leg, row))  # judged once more, by the image it ends with
        elif bool(row.done):
            self.lose(leg, row)
        else:
            leg.held = row
            self.held.append(leg)

    def report(self, walk: _Walk) -> None:
        """Hand out the finding of an image as soon as there is one."""
        finding = walk.finding
        if finding is not None:
            self.walking.remove(walk)
            self.on_finding(finding)

    def trouble(self, leg: _Leg, row: State) -> str:
        target, restart = leg.walk.path[leg.number]
        where = f"iteration {int(row.iteration) - 1}, target {target}, restart {restart}"
        return f"{self.stage}: a logit or gradient is not finite ({where})"


def _spent(row: State) -> tuple[int, int, int]:
    """What a trajectory has spent: forwards, backwards, zero gradients."""
    return int(row.forwards), int(row.backwards), int(row.zero_gradients)


def run(  # noqa: PLR0913 - the arguments are the experiment, and nothing else
    classify: Classify,
    images: Tensor,
    labels: Tensor,
    keys: Sequence[str],
    attack: Attack,
    threat: Threat,
    *,
    stage: str,
    seed: int,
    n_classes: int,
    rows: int,
    live: int | None = None,
    stop: Stop = "first",
    clean: Tensor | None = None,
    on_finding: Callable[[Finding], None],
) -> None:
    """Attack every image and report one finding each, in whatever order they end.

    A finding depends on the model, the image, its label and key, the attack, threat, stage name, seed and
    `rows`; not on the other images, their order, or `live`. So a run is resumed by leaving out the keys
    that are found.

    Args:
        classify: (B, 3, H, W) in [0, 1] -> logits (B, n_classes); in eval mode, parameters best frozen.
        images: (N, 3, H, W) float32 in [0, 1], on the model's device.
        labels: (N,) int64.
        keys: N distinct names.
        attack: the plug-in.
        threat: ball and radius.
        stage: name of the attack in its chain; part of the noise's name.
        seed: part of the noise's name.
        n_classes: classes that `classify` tells apart.
        rows: fixed shape of every model call.
        live: rows in use, at most `rows` (and that by default).
        stop: `first`, an image ends at its first confirmed success; `last`, trajectories are walked to
            their end and judged there.
        clean: (N, n_classes) logits of `logits(classify, images, rows)`, when already known.
        on_finding: called once per image. A misclassified clean image is reported as broken without attack.

    Raises:
        InputError: a norm that the attack does not know, pixels outside [0, 1], or arguments that disagree.
        AttackError: the attack left the ball or the box, or the model gives no gradient.
    """
    live = rows if live is None else live
    _check(images, labels, keys, attack, threat, rows, live)
    if not len(images):
        return
    clean = logits(classify, images, rows) if clean is None else clean
    if tuple(clean.shape) != (len(images), n_classes):
        raise InputError("clean logits", str(tuple(clean.shape)), str((len(images), n_classes)))
    state_of = _Run(
        Oracle(classify), images, labels, keys, attack, threat, stage, seed, rows, live, stop, on_finding
    )
    state_of.waiting.extend(_plan(state_of, clean))
    poll = POLL.get(images.device.type, 1)
    slots: dict[int, _Leg] = {}
    state: State | None = None
    while state_of.waiting or state_of.walking:
        state = state_of.fill(state, slots)
        if slots and state is not None:
            for _ in range(poll):
                stepped = attack.step(state, state_of.oracle)
                state = stepped if poll == 1 else hold(_active(state), state, stepped)
            state_of.collect(state, slots)
        state_of.jury = [(leg, row) for leg, row in state_of.jury if not leg.void]
        # while images wait, full juries are cheapest; afterwards a verdict at once frees rows that run ahead
        while state_of.jury and (len(state_of.jury) >= rows or not state_of.waiting):
            state_of.judge()


def _active(state: State) -> Tensor:
    """(S,) rows that have not ended and so may move."""
    ended = state.done | state.nonfinite
    return ~(ended | state.broken) if state.stop == "first" else ~ended


def _plan(what: _Run, clean: Tensor) -> list[_Walk]:
    """A walk for every image that is attackable; the others are reported at once."""
    ranking = clean.argsort(dim=1, descending=True, stable=True).tolist()
    margins, finite = losses.judge(clean, what.labels).tolist(), clean.isfinite().all(1).tolist()
    predictions, labels = clean.argmax(1).tolist(), what.labels.tolist()
    walks = []
    for index, label in enumerate(labels):
        if finite[index] and predictions[index] == label:
            wrong = [k for k in ranking[index] if k != label][: what.attack.ranks(clean.shape[1])]
            path = [(target, restart) for target in wrong or [-1] for restart in range(what.attack.restarts)]
            walks.append(_Walk(index, path))
            continue
        error = "" if finite[index] else f"{what.stage}: a logit of the clean image is not finite"
        adv, key, said = what.images[index].detach().cpu().clone(), what.keys[index], predictions[index]
        what.on_finding(Finding(key, not error, adv, -1, 0, -1, 0, 0, said, margins[index], 0, error))
    return walks


def _check(
    images: Tensor, labels: Tensor, keys: Sequence[str], attack: Attack, threat: Threat, rows: int, live: int
) -> None:
    name = type(attack).__name__.lower()
    if threat.norm not in attack.norms:
        raise InputError(f"attack {name}", f"norm {threat.norm!r}", " or ".join(attack.norms))
    if not 1 <= live <= rows:
        raise InputError("live rows", str(live), f"1 to {rows}, the rows of every model call")
    if not len(images) == len(labels) == len(keys) or len(set(keys)) != len(keys):
        found = f"{len(images)} images, {len(labels)} labels, {len(set(keys))} distinct of {len(keys)} keys"
        raise InputError("attack", found, "as many labels and distinct keys as images")
    if len(images) and (images.dtype != torch.float32 or images.min() < 0 or images.max() > 1):
        low, high = float(images.min()), float(images.max())
        raise InputError("images", f"{images.dtype} in [{low:.4g}, {high:.4g}]", "float32 pixels in [0, 1]")
