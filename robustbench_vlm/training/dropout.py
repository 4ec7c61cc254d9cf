"""Dropout as a function of the seed, the step and the row of the batch, whoever computes the row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the customary name
from torch.overrides import TorchFunctionMode

from robustbench_vlm import rng
from robustbench_vlm.errors import TrainingError


@contextmanager
def keyed(name: str, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators of CPU and `device` are seeded by `name`; outside, they are untouched."""
    cuda = device.type == "cuda"
    index = torch.cuda.current_device() if cuda and device.index is None else device.index
    seed = int(rng.generator(name).integers(2**62))
    with torch.random.fork_rng(devices=[index] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


class _OfRows(TorchFunctionMode):
    """Draws every dropout for the whole batch, and applies the rows that are computed here.

    On the CPU these are the very numbers that torch draws where the whole batch is computed at once. CUDA's
    own dropout draws others in one process, so there only runs of several processes or parts are equal.
    """

    def __init__(self, whole: int, first: int, count: int) -> None:
        super().__init__()
        self._whole, self._rows, self._count = whole, slice(first, first + count), count

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401 - any function of torch
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever it returns
        del types
        return self._dropout(*args, **(kwargs or {})) if func is F.dropout else func(*args, **(kwargs or {}))

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        del inplace
        if not training or p == 0:
            return input
        blocks, rest = divmod(len(input), self._count)
        if rest:
            found = f"dropout of {len(input)} rows where {self._count} images are computed"
            raise TrainingError(
                f"{found}: several processes or parts need layers whose first axis is the image"
            )
        drawn = input.new_empty((blocks, self._whole, *input.shape[1:])).bernoulli_(1 - p)
        return input * drawn[:, self._rows].flatten(0, 1).div_(1 - p)


@contextmanager
def of_rows(whole: int, first: int, count: int, *, drawn: bool) -> Iterator[None]:
    """Inside, dropout of `count` rows zeroes what it would zero in these rows of the whole batch.

    Args:
        whole: rows of the batch.
        first: position of the first of these rows in it.
        count: how many rows there are; a call may have several blocks of as many.
        drawn: whether this is needed; else torch's own dropout is left alone.
    """
    if not drawn:
        yield
        return
    with _OfRows(whole, first, count):
        yield
