"""The processes that train one model together, as PyTorch's launcher names them; torch is not imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from robustbench_vlm import launcher
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.errors import CardError, InputError


@dataclass(frozen=True)
class World:
    """This process among those that train one model.

    Attributes:
        rank: number of this process, 0 to `size` - 1; process 0 alone writes files and prints.
        size: how many processes there are, on all machines together.
        local_rank: number of this process on its machine, which is the number of its GPU.
        local_size: how many of the processes are on this machine.
        attempt: how often the launcher has started the processes again, after one of them ended.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    attempt: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0


ALONE = World()
"""The only process of a training."""


def launched(environment: Mapping[str, str] = os.environ) -> World:
    """What the launcher says about this process; `ALONE` for one that no launcher started.

    Args:
        environment: variables of the process.

    Raises:
        InputError: a variable that is no such number.
    """
    if not launcher.launched(environment):
        return ALONE
    rank, size = _number("RANK", environment), _number("WORLD_SIZE", environment)
    local = _number("LOCAL_RANK", environment, rank)
    attempt = _number("TORCHELASTIC_RESTART_COUNT", environment)
    world = World(rank, size, local, _number("LOCAL_WORLD_SIZE", environment, size), attempt)
    if not (world.rank < world.size and world.local_rank < world.local_size):
        found = (
            f"process {world.rank} of {world.size}, on this machine {world.local_rank} of {world.local_size}"
        )
        raise InputError("RANK and WORLD_SIZE", found, "numbers as torchrun sets them")
    return world


def require_divisible(recipe: Recipe, world: World) -> None:
    """Refuse a batch that cannot be cut into equal parts.

    Raises:
        CardError: its size is no multiple of processes times parts.
    """
    optim = recipe.optim
    if optim.batch_size % (world.size * optim.accumulate):
        found = (
            f"batch_size = {optim.batch_size} for {world.size} processes with accumulate = {optim.accumulate}"
        )
        do = "set optim.batch_size, optim.accumulate or the number of processes"
        expected = f"a multiple of {world.size * optim.accumulate}"
        raise CardError(f"recipe {recipe.name}, optim", found, expected, do)


def _number(name: str, environment: Mapping[str, str], otherwise: int = 0) -> int:
    text = environment.get(name) or str(otherwise)
    if not text.isdecimal():
        raise InputError(
            name, repr(text), "a number, as torchrun sets it", "unset it to train in one process"
        )
    return int(text)
