"""The share of a step's batch that one process computes, and the parts that it computes one after the other.

The attack sees one part at a time, since every image is attacked alone. The loss needs the outputs of the
whole batch at once, so the encoders that a defense's `outer` is given do two things more: they compute their
rows part by part, storing no activations and computing each part again in the backward pass (gradient
caching, arXiv:2101.06983, by torch's checkpointing), and they return the rows of all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from robustbench_vlm import rng
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.errors import CardError, TrainingError
from robustbench_vlm.models.clip import Clip, frozen
from robustbench_vlm.training import dropout, exchange
from robustbench_vlm.training.world import ALONE, World, require_divisible
from robustbench_vlm.types import Batch, Wrapped

SAME = 0.01  # share of the outputs by which those of other batch shapes may differ; random layers differ more


@dataclass(frozen=True)
class Share:
    """Which rows of each batch this process computes, and how.

    Attributes:
        world: the processes; process r has the r-th of `world.size` equal slices of the batch.
        parts: how many equal parts of that slice are computed one after the other.
        drops: whether the student has dropout, which is then drawn for the whole batch.
    """

    world: World = ALONE
    parts: int = 1
    drops: bool = False

    @property
    def whole(self) -> bool:
        """Whether this process computes all rows at once."""
        return self.world.size * self.parts == 1

    def rows(self, batch_size: int) -> slice:
        """This process's rows of a batch."""
        own = batch_size // self.world.size
        return slice(self.world.rank * own, (self.world.rank + 1) * own)

    def split(self, batch: Batch) -> list[Batch]:
        """The parts of this process's rows."""
        if self.parts == 1:
            return [batch]
        n = len(batch.images) // self.parts
        return [
            Batch(batch.images[p], batch.labels[p], batch.keys[p], batch.sha256[p])
            for p in (slice(i, i + n) for i in range(0, len(batch.images), n))
        ]

    def gathered(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors with a row per image of this process -> with one per image of the whole batch."""
        return {name: exchange.all_rows(value, 1, self.world) for name, value in rows.items()}

    @contextmanager
    def dropout(self, part: int, rows: int) -> Iterator[None]:
        """Inside, dropout zeroes in one part what it would zero there in the whole batch.

        Args:
            part: number of the part.
            rows: of all parts of this process.
        """
        n = rows // self.parts
        first = self.world.rank * rows + part * n
        with dropout.of_rows(self.world.size * rows, first, n, drawn=self.drops and not self.whole):
            yield


def of(recipe: Recipe, student: Clip, world: World) -> Share:
    """The share of this process.

    Raises:
        CardError: a batch that cannot be cut into equal parts, or a student whose rows depend on each other.
    """
    require_divisible(recipe, world)
    drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in student.visual.modules())
    share = Share(world, recipe.optim.accumulate, drops)
    if share.whole:
        return share
    where, do = f"recipe {recipe.name}", "train it in one process, with optim.accumulate = 1"
    if any(isinstance(m, _BatchNorm) for m in student.visual.modules()):
        found = f"student {recipe.student} has batch norms, whose statistics would be those of a part"
        raise CardError(where, found, "a model without, for several processes or parts", do)
    if drops and recipe.compute.compile:
        found = "compute.compile with dropout, which draws its numbers inside the compiled code"
        raise CardError(where, found, "one of the two, for several processes or parts", do)
    if not _rows_apart(student):
        found = f"student {recipe.student} has random layers whose numbers depend on the other images"
        raise CardError(where, found, "dropout alone, for several processes or parts", do)
    return share


@torch.no_grad()
def _rows_apart(student: Clip) -> bool:
    """Whether the student in train mode computes the same rows at once and in two halves."""
    noise = rng.uniform("rows apart", (4, 3, student.image_size, student.image_size))
    images = torch.from_numpy(noise).to(student.device)
    with frozen(student):
        student.visual.train()
        with dropout.keyed("rows apart", student.device), dropout.of_rows(4, 0, 4, drawn=True):
            whole = student(images)
        with dropout.keyed("rows apart", student.device):
            halves = Parted(student, Share(parts=2, drops=True), 4)(images)
    return bool((whole - halves).norm() < SAME * whole.norm())


@dataclass(frozen=True)
class Parted(Wrapped):
    """An encoder that computes this process's rows part by part.

    Attributes:
        share: how many parts.
        images: n, rows of this process; every call has n rows, or several blocks of n.
    """

    share: Share
    images: int

    def __call__(self, images: Tensor) -> Tensor:
        """(blocks * n, 3, H, W) in [0, 1] -> (blocks * n, D)."""
        return self._in_parts(self.encoder, images)

    def tokens(self, images: Tensor) -> Tensor:
        """(blocks * n, 3, H, W) in [0, 1] -> (blocks * n, 1 + N, D)."""
        return self._in_parts(self.encoder.tokens, images)

    def _in_parts(self, call: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        blocks, parts = blocks_of(images, self.images), self.share.parts
        drawn = torch.get_rng_state(), _device_state(images.device)
        found = []
        n, one = len(images) // (blocks * parts), images.shape[1:]
        for part, rows in enumerate(images.reshape(blocks, parts, n, *one).unbind(1)):
            _set_states(*drawn, images.device)  # every part draws the dropout of the whole batch
            compute = partial(self._part, call, part)
            if parts > 1 and torch.is_grad_enabled():
                computed: Tensor = checkpoint(compute, rows.flatten(0, 1), use_reentrant=False)
            else:
                computed = compute(rows.flatten(0, 1))
            found.append(computed.reshape(blocks, n, *computed.shape[1:]))
        return torch.cat(found, dim=1).flatten(0, 1)

    def _part(self, call: Callable[[Tensor], Tensor], part: int, rows: Tensor) -> Tensor:
        with self.share.dropout(part, self.images):
            return call(rows)


@dataclass(frozen=True)
class Gathered(Wrapped):
    """An encoder that is called with the images of this process and returns the rows of all processes.

    Attributes:
        share: the processes.
        images: n, rows of this process; every call has n rows, or several blocks of n.
    """

    share: Share
    images: int

    def __call__(self, images: Tensor) -> Tensor:
        """(blocks * n, 3, H, W) in [0, 1] -> (blocks * B, D), where B counts the images of all processes."""
        return self._whole(self.encoder(images), images)

    def tokens(self, images: Tensor) -> Tensor:
        """(blocks * n, 3, H, W) in [0, 1] -> (blocks * B, 1 + N, D)."""
        return self._whole(self.encoder.tokens(images), images)

    def _whole(self, rows: Tensor, images: Tensor) -> Tensor:
        return exchange.all_rows(rows, blocks_of(images, self.images), self.share.world)


def blocks_of(images: Tensor, n: int) -> int:
    """How many blocks of `n` images there are.

    Raises:
        TrainingError: the number of images is no multiple of `n`.
    """
    blocks, rest = divmod(len(images), n)
    if rest or not blocks:
        found = f"an encoder got {len(images)} images in `outer`"
        raise TrainingError(
            f"{found}; with several processes or parts it takes the step's {n}, or a multiple"
        )
    return blocks


def _device_state(device: torch.device) -> Tensor | None:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_states(cpu: Tensor, own: Tensor | None, device: torch.device) -> None:
    torch.set_rng_state(cpu)
    if own is not None:
        torch.cuda.set_rng_state(own, device)
