"""The attacked view of a model: the function that attacks query and differentiate.

It may be the model in bf16, compiled, or replayed as a CUDA graph. It never decides: a success found in it
counts only once the canonical pass, in fp32 and by the plain model, has confirmed it. So lower precision
cannot make a model look weaker than it is. It can miss successes; how many is measured
(`benchmarks/attacks.md`).
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

Format = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Precision:
    """The numerics of the attacked view.

    Attributes:
        format: `fp32`, the model itself; `bf16`, the model under autocast.
        tf32: whether fp32 products may be rounded to TF32 on the device, in the canonical pass too.
        compiled: whether the view goes through `torch.compile`, for the one fixed shape.
        graphs: whether forward and backward are replayed as CUDA graphs: the same kernels without the costs
            of launching them.
    """

    format: Format = "fp32"
    tf32: bool = False
    compiled: bool = False
    graphs: bool = False

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            expected = " or ".join(get_args(Format))
            raise InputError("--precision", repr(self.format), expected, "type --precision fp32")

    def require(self, device: torch.device) -> None:
        """Refuse what this device does not have.

        Raises:
            InputError: CUDA graphs or TF32 without a CUDA device.
        """
        for what, wanted in (("--cuda-graphs", self.graphs), ("--tf32", self.tf32)):
            if wanted and device.type != "cuda":
                raise InputError(
                    what, f"device {device}", "a CUDA device", "leave it out, or type --device cuda"
                )

    @property
    def fixed(self) -> bool:
        """Whether the view takes calls of one shape only."""
        return self.compiled or self.graphs

    @property
    def label(self) -> str:
        """The column `precision` of a result; names everything that may change rounding."""
        words = [self.format if self.format == "fp32" else f"{self.format}-find"]
        return "+".join(words + ["tf32"] * self.tf32 + ["compiled"] * self.compiled)


PLAIN = Precision()


def build(
    classify: Classify, precision: Precision, sample: Tensor, lower: Classify | None = None
) -> Classify | None:
    """The attacked view of a classifier; None if it is the classifier itself.

    Args:
        classify: (B, 3, H, W) -> logits (B, C).
        precision: format and compilation.
        sample: (rows, 3, H, W) images of the one shape in which the view is called.
        lower: the classifier in bf16, where it has a better version of itself than autocast over everything.

    Raises:
        InputError: CUDA graphs or TF32 without a CUDA device.
    """
    precision.require(sample.device)
    view = classify if precision.format == "fp32" else lower or _autocast(classify)
    if precision.compiled:
        view = torch.compile(view, dynamic=False)
    if precision.graphs:
        view = _graphed(view, sample)
    return None if view is classify else view


def _autocast(classify: Classify) -> Classify:
    def view(images: Tensor) -> Tensor:
        # Parameters are frozen, so caching casts of weights saves nothing, and a captured graph must not
        # contain such a cache.
        with torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False):
            return classify(images)

    return view


def _graphed(classify: Classify, sample: Tensor) -> Classify:
    """Forward and backward as replayed graphs; what they return stays valid after the next replay."""
    example = sample.detach().clone().requires_grad_()
    replay: Any = torch.cuda.make_graphed_callables(classify, (example,))

    def view(images: Tensor) -> Tensor:
        # A replay writes logits and image gradient where the last replay wrote them. The product gives the
        # gradient memory of its own, the copy does so for the logits.
        logits: Tensor = replay(images * 1)
        return logits.clone()

    return view


@contextmanager
def numerics(*, tf32: bool = False) -> Iterator[None]:
    """Use kernels that give the same bits twice, and full fp32 products unless `tf32`.

    By default PyTorch lets convolutions use TF32, and attention's backward pass may add in any order.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    memory: Any = torch.utils.deterministic
    before = matmul.fp32_precision, conv.fp32_precision, memory.fill_uninitialized_memory
    strict = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    matmul.fp32_precision = conv.fp32_precision = "tf32" if tf32 else "ieee"
    torch.use_deterministic_algorithms(True, warn_only=not strict or warns)
    memory.fill_uninitialized_memory = False  # a debugging aid; costs a pass over memory
    try:
        yield
    finally:
        matmul.fp32_precision, conv.fp32_precision, memory.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(strict, warn_only=warns)
