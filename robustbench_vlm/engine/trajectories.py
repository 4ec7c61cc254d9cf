"""The trajectories of one image in one stage, the finding that they amount to, and stages that share rows.

The finding is that of the first success in the order of trajectories (target by target, restart by restart),
and it counts what the trajectories up to there spent. So it does not show which trajectories really ran, or
beside what.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from robustbench_vlm.engine.interface import Attack, State
from robustbench_vlm.engine.job import Stages
from robustbench_vlm.errors import InputError
from robustbench_vlm.types import Finding


@dataclass(frozen=True)
class End:
    """The state of a row when its trajectory ended; see `interface.State`.

    Attributes:
        broken, done, nonfinite, first, iteration, forwards, backwards, zero_gradients: as in `State`.
        progress: by how much the objective rose above its first value; 0 if nothing was evaluated.
    """

    broken: bool
    done: bool
    nonfinite: bool
    first: int
    iteration: int
    forwards: int
    backwards: int
    zero_gradients: int
    progress: float


def ends(state: State) -> list[End]:
    """The end of every row of a state, with few reads from the device."""
    flags = torch.stack([state.broken, state.done, state.nonfinite], dim=1).tolist()
    counts = [state.first, state.iteration, state.forwards, state.backwards, state.zero_gradients]
    whole = torch.stack(counts, dim=1).tolist()
    # The difference is NaN for a row that was never evaluated.
    rises = (state.best_value - state.start_value).nan_to_num(nan=0.0).clamp(min=0).tolist()
    names = [field.name for field in dataclasses.fields(End)]
    rows = ((*flag, *count, rise) for flag, count, rise in zip(flags, whole, rises, strict=True))
    return [End(**dict(zip(names, row, strict=True))) for row in rows]


@dataclass(eq=False)
class Trajectories:
    """All trajectories of one image in one stage.

    Attributes:
        index: position of the image in the run.
        stage: position of the stage in the job.
        pairs: (target class, restart) of each trajectory, in order.
        started: number of trajectories that were handed out so far.
        ends: end of each trajectory that has ended, by its number.
        decisive: finding of each trajectory that can decide, by its number: a success that was confirmed, an
            error, or the end of the last one. Its counts are those of the trajectory's own.
    """

    index: int
    stage: int
    pairs: list[tuple[int, int]]
    started: int = 0
    ends: dict[int, End] = field(default_factory=dict)
    decisive: dict[int, Finding] = field(default_factory=dict)

    @property
    def first_decisive(self) -> int:
        """Number of the first decisive trajectory known, else of all; later ones do not matter."""
        return min(self.decisive, default=len(self.pairs))

    @property
    def left(self) -> int:
        """How many trajectories that matter were not handed out yet."""
        return max(self.first_decisive - self.started, 0)

    @property
    def finding(self) -> Finding | None:
        """The finding about the image, once no trajectory that still runs can come before it."""
        number = self.first_decisive
        if number == len(self.pairs) or any(earlier not in self.ends for earlier in range(number + 1)):
            return None
        spent = [self.ends[earlier] for earlier in range(number + 1)]
        return dataclasses.replace(
            self.decisive[number],
            forwards=sum(end.forwards for end in spent),
            backwards=sum(end.backwards for end in spent),
            zero_gradients=sum(end.zero_gradients for end in spent),
            progress=max(end.progress for end in spent),
        )

    def decide(self, number: int, end: End, finding: Finding) -> None:
        """Enter a trajectory that can decide."""
        self.ends[number] = end
        self.decisive[number] = finding

    def next(self) -> Trajectory:
        """Hand out the next trajectory."""
        self.started += 1
        return Trajectory(self, self.started - 1)


@dataclass(eq=False)
class Trajectory:
    """One trajectory, in a row or waiting for one.

    Attributes:
        image: the trajectories of its image.
        number: its position among them.
        paused: its state of one row, if it goes on after a success that the canonical pass did not confirm.
    """

    image: Trajectories
    number: int
    paused: State | None = None

    @property
    def pair(self) -> tuple[int, int]:
        """Its target class (-1 for none) and restart."""
        return self.image.pairs[self.number]

    @property
    def last(self) -> bool:
        """Whether no other trajectory of the image follows."""
        return self.number == len(self.image.pairs) - 1

    @property
    def obsolete(self) -> bool:
        """Whether an earlier trajectory of the same image is decisive."""
        return self.number > self.image.first_decisive

    def nonfinite_error(self, stage: str, end: End) -> str:
        """The error of a finding whose trajectory met a number that is not finite."""
        target, restart = self.pair
        where = f"iteration {end.iteration - 1}, target {target}, restart {restart}"
        return f"{stage}: a logit or gradient is not finite ({where})"


def of_image(index: int, stage: int, attack: Attack, wrong: Sequence[int]) -> Trajectories:
    """The trajectories of an image.

    Args:
        index: position of the image in the run.
        stage: position of the stage in the job.
        attack: of that stage.
        wrong: wrong classes of the image, most likely first.
    """
    return Trajectories(index, stage, attack.trajectories(wrong))


def shared_attack(stages: Stages) -> Attack:
    """The attack that steps the rows of all stages: that of the first, as good as any other.

    Raises:
        InputError: the stages cannot share rows.
    """
    (_, attack), *rest = stages
    for name, other in rest:
        if not attack.shares_rows(other):
            found = "an attack that cannot share rows with the stages before it"
            raise InputError(f"stage {name}", found, "stages of one group")
    return attack


def groups(stages: Stages) -> list[Stages]:
    """The stages of a chain, grouped where stages that follow each other share rows."""
    found: list[list[tuple[str, Attack]]] = []
    for stage in stages:
        if found and found[-1][0][1].shares_rows(stage[1]):
            found[-1].append(stage)
        else:
            found.append([stage])
    return list(found)
