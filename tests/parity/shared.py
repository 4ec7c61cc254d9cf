"""Square with the same proposals on both sides.

The reference draws one window for all images of a batch (and for Linf one sign a channel), where every image
of ours has a stream of its own. So our rows are given what the reference shares: windows and turns are those
of one stream, starts and L2's signs each row's own. For one image alone that is what the attack draws by
itself, and nothing is replaced on our side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import theirs
import torch
from subjects import Subject
from torch import Tensor

from robustbench_vlm import rng
from robustbench_vlm.attacks.square import Square, square
from robustbench_vlm.engine.noise import Keyed
from robustbench_vlm.threat import Threat

P = 0.8


class Stream:
    """What one row draws: part of it a common stream's, part its own; all of it is written down.

    Attributes:
        drawn: arrays in the order of the draws.
    """

    def __init__(self, common: str, own: str, norm: str) -> None:
        self.common, self.own, self.norm = rng.generator(common), rng.generator(own), norm
        self.drawn: list[np.ndarray] = []

    def random(self, shape: tuple[int, ...]) -> np.ndarray:
        """Places of windows: common."""
        self.own.random(shape)  # both streams go on, so that of one image alone is its own
        return self._say(self.common.random(shape))

    def integers(self, low: int, high: int, shape: Any = None, dtype: Any = np.int64) -> Any:
        """Turns: common. Signs: common for Linf but for the start's, own for L2."""
        common, own = (s.integers(low, high, shape, dtype=dtype) for s in (self.common, self.own))
        starts = isinstance(shape, tuple) and len(shape) == 3
        turns = shape is None or (isinstance(shape, tuple) and shape[-1] == 1)
        return self._say(common if turns or (self.norm == "linf" and not starts) else own)

    def _say(self, said: Any) -> Any:
        self.drawn.append(np.asarray(said))
        return said


@dataclass(frozen=True)
class Streams(Keyed):
    """Noise of rows that share the proposals of `common`."""

    common: str
    norm: str

    def streams(self) -> list[Any]:
        """One a row."""
        return [Stream(self.common, name, self.norm) for name in self.names]


@dataclass(frozen=True)
class Shared(Square):
    """Square whose rows share the proposals of the stream named `common`."""

    common: str

    def start(self, rows, threat: Threat):
        noise = Streams(rows.noise.names, self.common, threat.norm)
        return super().start(dataclasses.replace(rows, noise=noise), threat)


@dataclass
class Search:
    """The reference's search over all images of a subject, watched.

    Attributes:
        best: (n, 3, H, W) the point of smallest margin of every image at the end, by plain bookkeeping.
        margin: (n,) its margin.
        queries: (n,) that each image took, the start included, as the reference counts them.
        idle: (n,) of them, proposals that changed nothing.
        ends: (n, 3, H, W) the points that it ended with.
    """

    best: Tensor
    margin: Tensor
    queries: Tensor
    idle: Tensor
    alive: list[int] = field(default_factory=list)
    ends: Tensor | None = None

    def look(self, x: Tensor, margin: Tensor) -> None:
        """Keep the books of one query of the images that are alive."""
        rows = torch.tensor(self.alive)
        self.queries[rows] += 1
        self.idle[rows] += (x == self.best[rows]).flatten(1).all(1)
        better = (margin < self.margin[rows]) | (margin <= 0)
        self.best[rows[better]], self.margin[rows[better]] = x[better], margin[better]
        self.alive = [row for row, left in zip(self.alive, (margin > 0).tolist(), strict=True) if left]


def names(who: Subject, stage: str = "s", seed: int = 0) -> list[str]:
    """Of the noise of every image."""
    return [f"{seed}/{key}/{stage}/-1/0" for key in who.keys]


def ours(who: Subject, queries: int, stage: str = "s") -> Square:
    """The shipped attack for one image; for more, the same with shared proposals."""
    settings = {"queries": queries, "p": P, "restarts": 1}
    return Square(**settings) if len(who.images) == 1 else Shared(**settings, common=names(who, stage)[0])


def search(who: Subject, threat: Threat, queries: int, stage: str = "s") -> Search:
    """The reference's search with our proposals."""
    attack = theirs.squares(theirs.Watched(who.model, who.rows), threat, queries, seed=0)
    n = len(who.images)
    found = Search(
        torch.full_like(who.images, torch.nan), torch.full((n,), torch.inf), torch.zeros(n), torch.zeros(n)
    )
    found.alive = list(range(n))
    margins, single = attack.margin_and_loss, attack.attack_single_run
    answers = _answers(who, threat, queries, found, names(who, stage))

    def watched(x: Tensor, y: Tensor):
        margin, loss = margins(x, y)
        found.look(x, margin)
        return margin, loss

    def answered(x: Tensor, y: Tensor):
        assert len(x) == n, "every image is right when clean"
        with mock.patch.object(torch, "rand", lambda *size, **_: answers(size)):
            counted, found.ends = single(x, y)
        assert torch.equal(counted, found.queries)
        return counted, found.ends

    attack.margin_and_loss, attack.attack_single_run = watched, answered
    theirs.run(attack, who)
    return found


def _answers(
    who: Subject, threat: Threat, queries: int, found: Search, named: list[str]
) -> Callable[[Any], Tensor]:
    """What to answer to the reference's draws, one after the other."""
    shape = tuple(who.images.shape[1:])
    sides = square.window_sides(queries, P, shape[1], shape[2], threat.norm)
    streams = [Stream(named[0], name, threat.norm) for name in named]
    for stream in streams:
        square._draw(stream, np.array(sides), shape, threat.norm)
    drawn = [stream.drawn for stream in streams]
    extent = [shape[1 + axis] for axis in (0, 1)]
    numbers = (_linf if threat.norm == "linf" else _l2)(drawn, sides, extent, found)

    def answer(size: Any) -> Tensor:
        wanted = tuple(size[0]) if isinstance(size[0], (list, tuple, torch.Size)) else tuple(size)
        return torch.as_tensor(next(numbers), dtype=torch.float32).reshape(wanted)

    return answer


def _places(corners: np.ndarray, side: int, extent: list[int]) -> Iterator[list[float]]:
    """Numbers on [0, 1) that the reference turns into the offsets that ours has drawn."""
    for axis, number in enumerate(corners.reshape(-1)):
        free = extent[axis % 2] - side
        yield [(np.floor(number * free) + 0.5) / max(free, 1)]


def _coin(side: np.ndarray) -> np.ndarray:
    """0 or 1 as a number that the reference takes for -1 or 1 (and for unturned or turned)."""
    return np.asarray(side) * 0.5 + 0.25


def _linf(drawn: list[list[np.ndarray]], sides, extent: list[int], found: Search) -> Iterator[Any]:
    corners, signs, _ = drawn[0]
    yield _coin(np.stack([stripes for _, _, stripes in drawn]))
    for query, side in enumerate(sides):
        yield from _places(corners[query], side, extent)
        yield _coin(signs[query])


def _l2(drawn: list[list[np.ndarray]], sides, extent: list[int], found: Search) -> Iterator[Any]:
    corners, _, turns, *tiles = drawn[0]
    for tile in range(0, len(tiles), 2):
        yield _coin(tiles[tile])
        yield _coin(np.stack([row[3 + tile + 1] for row in drawn]))
    for query, side in enumerate(sides):
        yield from _places(corners[query], side, extent)
        yield _coin(turns[query])
        yield _coin(np.stack([drawn[row][1][query] for row in found.alive]))
