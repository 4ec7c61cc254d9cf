"""The reference mode of the native engine: our attacks, in the reference's schedule, with its random numbers.

For comparison with published numbers. Images go through a stage in consecutive batches, all rows of a batch
step together to the end, and noise comes from one generator a batch and stage, seeded with the seed, in the
shapes in which the reference draws: so a draw depends on which images of the batch are still robust. Nothing
is resumed in the middle of a batch, and findings depend on order and batch, which is why this is not the
default. Global generators are never touched. Returned are the last misclassified iterates, and clean images
otherwise, as the reference returns them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.attacks.fab import Fab
from robustbench_vlm.attacks.square import Square
from robustbench_vlm.backends import reference_square
from robustbench_vlm.engine import canonical, geometry, losses, trajectories, verification
from robustbench_vlm.engine.interface import Attack, Oracle, Rows, State, Stop, hold, take
from robustbench_vlm.engine.job import Cost, check
from robustbench_vlm.engine.trajectories import End, Walk
from robustbench_vlm.errors import AttackError, InputError
from robustbench_vlm.threat import Threat
from robustbench_vlm.types import Classify, Finding

ATTACKS: tuple[type, ...] = (Apgd, Fab, Square)
NORMS = ("linf", "l2")
LOSSES = ("ce", "dlr", "targeted-dlr")


@dataclass(frozen=True)
class Drawn:
    """Noise of a sub-batch: each draw is one of its whole shape, from the batch's generator.

    Attributes:
        generator: on the CPU.
        n: rows of the sub-batch.
    """

    generator: torch.Generator
    n: int

    def uniform(self, shape: tuple[int, ...], part: str = "") -> Tensor:  # noqa: ARG002 - draws follow each other
        """(n, *shape) float32 on [0, 1)."""
        return torch.rand((self.n, *shape), generator=self.generator)

    def normal(self, shape: tuple[int, ...], part: str = "") -> Tensor:  # noqa: ARG002 - likewise
        """(n, *shape) float32, standard normal."""
        return torch.randn((self.n, *shape), generator=self.generator)

    def streams(self) -> list[np.random.Generator]:
        """None: the batch has one generator.

        Raises:
            AttackError: always.
        """
        raise AttackError("an attack with a stream for every row has no reference mode")


def refuse(stages: Sequence[tuple[str, Attack]], threat: Threat, stop: Stop = "first") -> None:
    """Refuse a chain that has no reference mode.

    Raises:
        InputError: an attack, a loss, a norm or a stopping rule that the reference does not have.
    """
    do = "use the mode fast"
    for name, attack in stages:
        # an attack on a random model draws from the model too, and those draws are not ours to repeat
        if type(attack) not in ATTACKS or threat.norm not in NORMS:
            found = f"stage {name}, {type(attack).__name__.lower()} in {threat.norm}"
            raise InputError("mode reference", found, "apgd, fab or square in linf or l2", do)
        if isinstance(attack, Apgd) and attack.loss not in LOSSES:
            raise InputError("mode reference", f"stage {name}, loss {attack.loss!r}", " or ".join(LOSSES), do)
    if stop == "best":
        raise InputError("mode reference", "stop = 'best'", "'first' or 'last'", do)


@dataclass
class _Run:
    """The arguments of `run`, and what was spent."""

    oracle: Oracle
    classify: Classify
    images: Tensor
    labels: Tensor
    keys: Sequence[str]
    stages: Sequence[tuple[str, Attack]]
    threat: Threat
    seed: int
    rows: int
    wrong: list[list[int]]  # other classes of each image, most likely first
    margins: list[float]  # of the clean images
    judged: int
    unconfirmed: int = 0

    def batch(self, number: int, members: list[int]) -> list[Finding]:
        """The findings of one stage on one batch of images, in order."""
        attack = self.stages[number][1]
        targets = [self.wrong[i][: attack.ranks(len(self.wrong[i]) + 1)] or [-1] for i in members]
        walking = [
            Walk(i, number, [(t, restart) for t in own for restart in range(attack.restarts)])
            for i, own in zip(members, targets, strict=True)
        ]
        generator = torch.Generator().manual_seed(self.seed)
        for leg in range(len(walking[0].path)):
            still = [walk for walk in walking if walk.finding is None]
            if not still:
                break
            self.trajectory(attack, still, leg, generator)
        return [walk.finding for walk in walking if walk.finding is not None]

    def trajectory(self, attack: Attack, still: list[Walk], leg: int, generator: torch.Generator) -> None:
        """One target and restart of the images that are still robust, to the end; the walks are changed."""
        device = self.images.device
        index = torch.tensor([walk.index for walk in still], device=device)
        rows = Rows(
            images=self.images.index_select(0, index),
            labels=self.labels.index_select(0, index),
            targets=torch.tensor([walk.path[leg][0] for walk in still], device=device),
            noise=Drawn(generator, len(still)),
            restarts=tuple(walk.path[leg][1] for walk in still),
            stop="last",
        )
        if isinstance(attack, Square):
            begun, feed = reference_square.begin(attack, rows, self.threat, generator)
            state = self.walk(attack, self.full(begun), len(still), feed)
        else:
            state = self.walk(attack, self.full(attack.start(rows, self.threat)), len(still))
        state = take(state, list(range(len(still))))
        said = verification.opinions(
            self.classify, state.adv, rows.images, rows.labels, self.threat, self.rows
        )
        self.judged += 1
        copies = state.adv.cpu()
        for i, (walk, end) in enumerate(zip(still, trajectories.ends(state), strict=True)):
            walk.spent[leg] = end
            finding = self.finding(walk, leg, end, said[i], copies[i])
            if finding.broken or finding.error or leg == len(walk.path) - 1:
                walk.verdicts[leg] = finding

    def full(self, state: State) -> State:
        """The state in the fixed shape; rows without an image hold copies of the last."""
        last = len(state.labels) - 1
        return take(state, [min(row, last) for row in range(self.rows)])

    def walk(
        self, attack: Attack, state: State, n: int, feed: Callable[[State], None] = lambda _: None
    ) -> State:
        """All rows, step by step, until the first n have ended; `feed` is called before every step."""
        ended = torch.zeros_like(state.broken)
        while not bool(ended[:n].all()):
            feed(state)
            state = hold(~ended, state, attack.step(state, self.oracle))
            ended = state.done | state.nonfinite
        return state

    def finding(self, walk: Walk, leg: int, end: End, said: verification.Opinion, adv: Tensor) -> Finding:
        """What a trajectory found; `adv` (3, H, W) on the CPU is the image that it ended with."""
        i, stage = walk.index, self.stages[walk.stage][0]
        target, restart = walk.path[leg]
        error = ""
        if end.nonfinite or (end.broken and not said.finite):
            where = f"iteration {end.iteration - 1}, target {target}, restart {restart}"
            error = f"{stage}: a logit or gradient is not finite ({where})"
        elif end.broken and said.excess > geometry.slack(self.threat):
            raise AttackError(f"{stage}: {self.keys[i]} is {said.excess:.3g} outside {self.threat} or [0, 1]")
        label = int(self.labels[i])
        broken = end.broken and not error and said.prediction != label
        self.unconfirmed += end.broken and not error and not broken
        return Finding(
            key=self.keys[i],
            broken=broken,
            adv=adv.clone() if broken else self.images[i].detach().cpu().clone(),
            target=target,
            restart=restart,
            iteration=end.first if broken else -1,
            forwards=0,
            backwards=0,
            prediction=said.prediction if broken else label,
            margin=said.margin if broken else self.margins[i],
            error=error,
            stage=stage,
        )


def run(  # noqa: PLR0913 - as `engine.run`
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
    clean: Tensor | None = None,
    on_finding: Callable[[Finding], None],
) -> Cost:
    """As `engine.run`, in order and batch by batch; `rows` is also the number of images in a batch.

    Args as those of `engine.run`. The image of a finding that is not broken is the clean one.

    Raises:
        InputError: a norm or an attack that the reference does not have, or arguments that disagree.
        AttackError: the attack left the ball or the box, or the model gives no gradient.
    """
    check(images, labels, keys, stages, threat, rows, rows, n_classes)
    refuse(stages, threat)
    if not len(images):
        return Cost(0, 0, 0, 0)
    judged = 0
    if clean is None:
        clean, judged = canonical.logits(classify, images, rows), -(-len(images) // rows)
    wrong, margins = verification.wrong_classes(clean, labels), losses.judge(clean, labels).tolist()
    oracle = Oracle(classify)
    what = _Run(oracle, classify, images, labels, keys, stages, threat, seed, rows, wrong, margins, judged)
    standing = verification.attackable(clean, images, labels, keys, [stages[0][0]] * len(images), on_finding)
    for number in range(len(stages)):
        survivors = []
        for begin in range(0, len(standing), rows):
            members = standing[begin : begin + rows]
            for i, finding in zip(members, what.batch(number, members), strict=True):
                on_finding(finding)
                if not finding.broken and not finding.error:
                    survivors.append(i)
        standing = survivors
    return Cost(oracle.calls.forwards, oracle.calls.gradients, what.judged, what.unconfirmed)
