"""Whatever state the caller left torch in, attacks run in the same one, and the caller's comes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from robustbench_vlm.engine.attacked_view import numerics

AUTOCAST = ("cpu", "cuda", "mps")


@contextmanager
def isolated(*, tf32: bool = False) -> Iterator[None]:
    """Run with gradients on, autocast off, float32 by default, and the kernels of `numerics`.

    Covers what changes numbers without a word: `torch.no_grad` or `inference_mode` around the call, autocast,
    `torch.set_default_dtype`, TF32, kernels that cuDNN picks by a benchmark. Everything is restored.

    Args:
        tf32: whether fp32 products may be rounded to TF32.
    """
    dtype, benchmark = torch.get_default_dtype(), torch.backends.cudnn.benchmark
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        for device in AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(numerics(tf32=tf32))
        torch.set_default_dtype(torch.float32)
        torch.backends.cudnn.benchmark = False
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.backends.cudnn.benchmark = benchmark
