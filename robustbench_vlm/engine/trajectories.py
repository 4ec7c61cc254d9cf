"""An image's way through the trajectories of one stage, what it amounts to, and which stages share rows.

The finding is that of the first success in the order of trajectories, and counts what a walk up to there
spends, so it does not show what ran beside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from robustbench_vlm.engine.interface import Attack, State
from robustbench_vlm.errors import InputError
from robustbench_vlm.types import Finding


@dataclass(frozen=True)
class End:
    """How a row stood when it ended, and what its trajectory took; see `interface.State`."""

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
    """Of every row of a state, read at once."""
    flags = torch.stack([state.broken, state.done, state.nonfinite], dim=1).tolist()
    counts = [state.first, state.iteration, state.forwards, state.backwards, state.zero_gradients]
    whole = torch.stack(counts, dim=1).tolist()
    # where nothing was evaluated the rise is not a number
    rises = (state.best_value - state.start_value).nan_to_num(nan=0.0).clamp(min=0).tolist()
    names = [field.name for field in dataclasses.fields(End)]
    rows = ((*flag, *count, rise) for flag, count, rise in zip(flags, whole, rises, strict=True))
    return [End(**dict(zip(names, row, strict=True))) for row in rows]


@dataclass(eq=False)
class Walk:
    """One image in one stage.

    Attributes:
        index: position of the image.
        stage: position of the stage.
        path: (target class, restart) of each trajectory, in order.
        given: trajectories handed out so far.
        spent: what each trajectory took that ended.
        verdicts: what the canonical pass said where a trajectory was decisive: a success, an error, the end.
    """

    index: int
    stage: int
    path: list[tuple[int, int]]
    given: int = 0
    spent: dict[int, End] = field(default_factory=dict)
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
        spent = [self.spent[number] for number in range(cut + 1)]
        return dataclasses.replace(
            self.verdicts[cut],
            forwards=sum(one.forwards for one in spent),
            backwards=sum(one.backwards for one in spent),
            zero_gradients=sum(one.zero_gradients for one in spent),
            progress=max(one.progress for one in spent),
        )

    def lead(self) -> Leg:
        """The next trajectory."""
        self.given += 1
        return Leg(self, self.given - 1)


@dataclass
class Leg:
    """One trajectory of one image, in a row or about to be.

    Attributes:
        held: one row, to go on after a success that the canonical pass did not confirm.
    """

    walk: Walk
    number: int
    held: State | None = None

    @property
    def final(self) -> bool:
        """Whether it is the last of its walk."""
        return self.number == len(self.walk.path) - 1

    @property
    def void(self) -> bool:
        """An earlier trajectory of the same image has decided."""
        return self.number > self.walk.cut


def joined(stages: Sequence[tuple[str, Attack]]) -> Attack:
    """The attack that steps the rows of all stages.

    Raises:
        InputError: they do not join.
    """
    (_, attack), *rest = stages
    for name, other in rest:
        both = attack.join(other)
        if both is None:
            raise InputError(f"stage {name}", "an attack of another table", "stages that join")
        attack = both
    return attack


def tables(stages: Sequence[tuple[str, Attack]]) -> list[list[tuple[str, Attack]]]:
    """The stages of a chain, those that follow each other and join in one group."""
    groups: list[list[tuple[str, Attack]]] = []
    for stage in stages:
        if groups and joined(groups[-1]).join(stage[1]) is not None:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups
