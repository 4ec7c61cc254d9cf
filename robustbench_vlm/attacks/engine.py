"""The engine: continuous batching of images over a fixed number of rows, and the verdict on each image.

Every model call has exactly `rows` rows; rows without work hold copies. So a row's numbers do not depend on
how many rows are alive, and neither do verdicts, adversarial images or margins. An image walks its
trajectories (target, restart) one after another in one row; when it is broken or done, the next image takes
the row. What ends a row is judged in the canonical pass: without gradient, in the same fixed shape.
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


@dataclass
class _Job:
    """One image on its way through its trajectories."""

    index: int
    walk: list[tuple[int, int]]  # (target class, restart) of each trajectory, in order
    at: int = 0
    forwards: int = 0
    backwards: int = 0
    zero_gradients: int = 0
    held: State | None = None  # one row, to go on after a success that the canonical pass did not confirm

    @property
    def final(self) -> bool:
        return self.at == len(self.walk) - 1


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
    queue: deque[_Job] = field(default_factory=deque)
    jury: list[tuple[_Job, State]] = field(default_factory=list)

    def names(self, job: _Job) -> str:
        target, restart = job.walk[job.at]
        return f"{self.seed}/{self.keys[job.index]}/{self.stage}/{target}/{restart}"

    def begin(self, jobs: list[_Job]) -> State:
        """Fresh rows for jobs at the begin of a trajectory."""
        index = torch.tensor([job.index for job in jobs], device=self.images.device)
        targets = [job.walk[job.at][0] for job in jobs]
        rows = Rows(
            images=self.images.index_select(0, index),
            labels=self.labels.index_select(0, index),
            targets=torch.tensor(targets, device=self.images.device),
            names=tuple(self.names(job) for job in jobs),
            restarts=tuple(job.walk[job.at][1] for job in jobs),
            stop=self.stop,
        )
        return self.attack.start(rows, self.threat)

    def fill(self, state: State | None, slots: dict[int, _Job]) -> State | None:
        """Give rows without a job to the next images; `slots` is changed."""
        free = [slot for slot in range(self.live) if slot not in slots]
        given = [(slot, self.queue.popleft()) for slot in free[: len(self.queue)]]
        fresh = [(slot, job) for slot, job in given if job.held is None]
        if fresh:
            begun = self.begin([job for _, job in fresh])
            if state is None:
                state = take(begun, [min(row, len(fresh) - 1) for row in range(self.rows)])
            state = scatter(state, [slot for slot, _ in fresh], begun)
        for slot, job in given:
            slots[slot] = job
            if job.held is not None and state is not None:
                state, job.held = scatter(state, [slot], job.held), None
        return state

    def collect(self, state: State, slots: dict[int, _Job]) -> State:
        """Take rows that have ended out of `slots`: to the jury, to their next trajectory, or as an error."""
        flags = torch.stack([state.broken, state.done, state.nonfinite]).tolist()
        judged: list[int] = []
        again: list[int] = []
        for slot in sorted(slots):
            broken, done, nonfinite = (column[slot] for column in flags)
            success = broken and self.stop == "first"
            if not (success or done or nonfinite):
                continue
            walked_on = done and not broken and not nonfinite and self.stop == "first"
            (again if walked_on and not slots[slot].final else judged).append(slot)
        if judged:
            rows = take(state, judged)
            self.jury += [(slots.pop(slot), take(rows, [i])) for i, slot in enumerate(judged)]
        if again:
            rows = take(state, again)
            for i, slot in enumerate(again):
                _count(slots[slot], take(rows, [i]))
                slots[slot].at += 1
            state = scatter(state, again, self.begin([slots[slot] for slot in again]))
        return state

    def judge(self) -> None:
        """The canonical pass over waiting rows: findings, or back to the queue."""
        waiting, self.jury = self.jury[: self.rows], self.jury[self.rows :]
        adv = torch.cat([row.adv for _, row in waiting])
        labels = torch.cat([row.labels for _, row in waiting])
        clean = torch.cat([row.images for _, row in waiting])
        found = logits(self.oracle.classify, adv, self.rows)
        outside = geometry.excess(adv, clean, self.threat).tolist()
        margins, predictions = losses.judge(found, labels).tolist(), found.argmax(1).tolist()
        finite, copies = found.isfinite().all(1).tolist(), adv.cpu()
        for i, (job, row) in enumerate(waiting):
            error = "" if finite[i] and not bool(row.nonfinite) else self.trouble(job, row)
            if not error and outside[i] > geometry.slack(self.threat):
                key = self.keys[job.index]
                raise AttackError(f"{self.stage}: {key} is {outside[i]:.3g} outside {self.threat} or [0, 1]")
            wrong = not error and predictions[i] != int(row.labels)
            unconfirmed = bool(row.broken) and self.stop == "first"
            if not error and not wrong and (unconfirmed or not row.done or not job.final):
                self.go_on(job, dataclasses.replace(row, broken=torch.zeros_like(row.broken)))
                continue
            _count(job, row)
            target, restart = job.walk[job.at]
            first = int(row.first) if int(row.first) >= 0 else int(row.iteration)
            self.on_finding(
                Finding(
                    key=self.keys[job.index],
                    broken=wrong,
                    adv=copies[i].clone(),
                    target=target,
                    restart=restart,
                    iteration=first if wrong else -1,
                    forwards=job.forwards,
                    backwards=job.backwards,
                    prediction=predictions[i],
                    margin=margins[i],
                    zero_gradients=job.zero_gradients,
                    error=error,
                )
            )

    def go_on(self, job: _Job, row: State) -> None:
        """A row whose success was not confirmed, or whose trajectory ended without one."""
        if bool(row.done) and job.final:
            self.jury.append((job, row))  # judged once more, by the image it ends with
            return
        if bool(row.done):
            _count(job, row)
            job.at += 1
        else:
            job.held = row
        self.queue.appendleft(job)

    def trouble(self, job: _Job, row: State) -> str:
        target, restart = job.walk[job.at]
        where = f"iteration {int(row.iteration) - 1}, target {target}, restart {restart}"
        return f"{self.stage}: a logit or gradient is not finite ({where})"


def _count(job: _Job, row: State) -> None:
    """Add what a finished trajectory has spent."""
    job.forwards += int(row.forwards)
    job.backwards += int(row.backwards)
    job.zero_gradients += int(row.zero_gradients)


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
    state_of.queue.extend(_plan(state_of, clean))
    poll = POLL.get(images.device.type, 1)
    slots: dict[int, _Job] = {}
    state: State | None = None
    while state_of.queue or slots or state_of.jury:
        state = state_of.fill(state, slots)
        if slots and state is not None:
            for _ in range(poll):
                stepped = attack.step(state, state_of.oracle)
                state = stepped if poll == 1 else hold(_active(state), state, stepped)
            state = state_of.collect(state, slots)
        idle = not slots and not state_of.queue
        while len(state_of.jury) >= rows or (state_of.jury and idle):
            state_of.judge()


def _active(state: State) -> Tensor:
    """(S,) rows that have not ended and so may move."""
    ended = state.done | state.nonfinite
    return ~(ended | state.broken) if state.stop == "first" else ~ended


def _plan(what: _Run, clean: Tensor) -> list[_Job]:
    """A job for every image that is attackable; the others are reported at once."""
    ranking = clean.argsort(dim=1, descending=True, stable=True).tolist()
    margins, finite = losses.judge(clean, what.labels).tolist(), clean.isfinite().all(1).tolist()
    predictions, labels = clean.argmax(1).tolist(), what.labels.tolist()
    jobs = []
    for index, label in enumerate(labels):
        if finite[index] and predictions[index] == label:
            wrong = [k for k in ranking[index] if k != label][: what.attack.ranks(clean.shape[1])]
            walk = [(target, restart) for target in wrong or [-1] for restart in range(what.attack.restarts)]
            jobs.append(_Job(index, walk))
            continue
        error = "" if finite[index] else f"{what.stage}: a logit of the clean image is not finite"
        adv = what.images[index].detach().cpu().clone()
        what.on_finding(
            Finding(
                what.keys[index],
                not error,
                adv,
                -1,
                0,
                -1,
                0,
                0,
                predictions[index],
                margins[index],
                0,
                error,
            )
        )
    return jobs


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
