"""The model as attacks see it: in bf16, compiled, or replayed as a CUDA graph. It finds; it never decides.

A success found here counts only once the canonical pass, in fp32 and by the plain model, has confirmed it. So
lower precision cannot make a model look weaker than it is; it can miss successes, and that is measured, not
assumed (`benchmarks/attacks.md`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from robustbench_vlm.errors import InputError
from robustbench_vlm.types import Classify

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Sight:
    """How attacks see the model.

    Attributes:
        precision: `fp32`, the model itself; `bf16`, under autocast.
        tf32: whether fp32 products may be rounded to TF32 on the device, in the canonical pass too.
        compiled: through `torch.compile`, for the one fixed shape.
        graphs: forward and backward replayed as CUDA graphs: the same kernels without launch costs.
    """

    precision: Precision = "fp32"
    tf32: bool = False
    compiled: bool = False
    graphs: bool = False

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise InputError("precision", repr(self.precision), " or ".join(get_args(Precision)))

    def require(self, device: torch.device) -> None:
        """Refuse what this device does not have.

        Raises:
            InputError: CUDA graphs or TF32 without a CUDA device.
        """
        for what, wanted in (("CUDA graphs", self.graphs), ("TF32", self.tf32)):
            if wanted and device.type != "cuda":
                raise InputError(what, f"device {device}", "a CUDA device", "leave it out")

    @property
    def label(self) -> str:
        """What a result says about its precision; everything in it may change rounding."""
        words = [self.precision if self.precision == "fp32" else f"{self.precision}-find"]
        return "+".join(words + ["tf32"] * self.tf32 + ["compiled"] * self.compiled)


PLAIN = Sight()


def finder(classify: Classify, how: Sight, sample: Tensor, lower: Classify | None = None) -> Classify:
    """`classify` as attacks are to see it.

    Args:
        classify: (B, 3, H, W) -> logits (B, C).
        how: precision and compilation.
        sample: (rows, 3, H, W) images of the one shape that will be asked for.
        lower: the model in bf16, where it knows better than autocast over everything.

    Raises:
        InputError: CUDA graphs or TF32 without a CUDA device.
    """
    how.require(sample.device)
    seen = classify if how.precision == "fp32" else lower or _autocast(classify)
    if how.compiled:
        seen = torch.compile(seen, dynamic=False)
    if how.graphs:
        seen = _graphed(seen, sample)
    return seen


def _autocast(classify: Classify) -> Classify:
    def seen(images: Tensor) -> Tensor:
        # parameters are frozen, so there are no casts of weights to cache, and a captured graph must not
        with torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False):
            return classify(images)

    return seen


def _graphed(classify: Classify, sample: Tensor) -> Classify:
    """Forward and backward as replayed graphs; what they return stays valid after the next replay."""
    example = sample.detach().clone().requires_grad_()
    replay: Any = torch.cuda.make_graphed_callables(classify, (example,))

    def seen(images: Tensor) -> Tensor:
        # a replay writes logits and image gradient where the last one did; the product and the copy are ours
        logits: Tensor = replay(images * 1)
        return logits.clone()

    return seen


@contextmanager
def numerics(*, tf32: bool = False) -> Iterator[None]:
    """Kernels that give the same bits twice; products in full fp32 unless TF32 is asked for.

    PyTorch lets convolutions use TF32 by default, and attention's backward pass may add in any order.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    memory: Any = torch.utils.deterministic
    before = matmul.fp32_precision, conv.fp32_precision, memory.fill_uninitialized_memory
    strict = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    matmul.fp32_precision = conv.fp32_precision = "tf32" if tf32 else "ieee"
    torch.use_deterministic_algorithms(True, warn_only=not strict or warns)
    memory.fill_uninitialized_memory = False  # a debugging aid that costs a pass
    try:
        yield
    finally:
        matmul.fp32_precision, conv.fp32_precision, memory.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(strict, warn_only=warns)
