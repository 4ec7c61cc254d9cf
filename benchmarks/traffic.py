"""Kernels and bytes of PyTorch operators, counted on tensors without memory, as a GPU would run them.

Tensors on the device `meta` have shapes and no values. Code that asks for the device type takes the branch of
a GPU there, and every operator that reaches a kernel can be seen. Nothing is timed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "lift_fresh"}
"""Operators that launch no kernel and are no views."""
SELECTING = {"index", "index_select", "gather", "index_copy", "index_copy_", "scatter", "scatter_add"}
"""Operators that touch as much of their first argument as of their result or source, not all of it."""
OVERWRITING = {"copy_", "fill_", "zero_"}
"""Operators in place that do not read what they overwrite."""


@dataclass
class Traffic(TorchDispatchMode):
    """Counts operators while it is active.

    Attributes:
        kernels: operators that launch a kernel, by name.
        moved: bytes that they read and write, by name.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an operator
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operator gives
        given = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_KERNEL:
            self.kernels[name] += 1
            self.moved[name] += _moved(func, name, args, kwargs or {}, given)
        return given


def _moved(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> int:  # noqa: ANN401
    """Bytes that an operator reads and writes."""
    written = _bytes(tree_leaves(given))
    arguments = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    reads = []
    for argument in func._schema.arguments:
        if not argument.is_out and argument.name in arguments:
            reads.append(_bytes(tree_leaves(arguments[argument.name])))
    if name in OVERWRITING:
        reads = reads[1:]
    if name in SELECTING:
        least = min(written, max(reads[1:], default=written)) if name.startswith("index_copy") else written
        return min(reads[0], least) + sum(reads[1:]) + least
    return sum(reads) + written


def _bytes(leaves: Iterable[Any]) -> int:
    """Bytes of the tensors among some values; an expanded tensor has those that are in memory."""
    return sum(_own(leaf) for leaf in leaves if isinstance(leaf, Tensor))


def _own(tensor: Tensor) -> int:
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


class _Free(torch.autograd.Function):
    """Images -> logits without memory; its gradient is one, too."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, classes: int) -> Tensor:  # noqa: ANN401
        ctx.shape = images.shape
        return images.new_empty(len(images), classes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return gradients[0].new_empty(ctx.shape), None


def free(images: Tensor, classes: int = 10) -> Tensor:
    """A model that launches no kernel: (S, 3, H, W) -> (S, classes) on the device `meta`."""
    found: Tensor = _Free.apply(images, classes)  # type: ignore[no-untyped-call]
    return found
