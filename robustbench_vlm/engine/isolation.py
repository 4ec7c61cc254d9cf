"""Whatever state the caller left torch in, attacks run in the same one, and the caller's comes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from robustbench_vlm.engine.attacked_view import numerics
from robustbench_vlm.types import Classify

AUTOCAST = ("cpu", "cuda", "mps")


@contextmanager
def default_state() -> Iterator[None]:
    """Run with gradients on, autocast off, and float32 on the CPU as the default of new tensors.

    Whatever of it the caller has set otherwise comes back at the end: `torch.no_grad` or `inference_mode`
    around the call, autocast, `torch.set_default_dtype`, `torch.set_default_device`.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        for device in AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":  # this mode costs time in every call of torch
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def isolated(*, tf32: bool = False) -> Iterator[None]:
    """Run in `default_state` and with the kernels of `numerics`, none of them picked by a benchmark.

    Covers what changes numbers without a word. Everything is restored.

    Args:
        tf32: whether fp32 products may be rounded to TF32.
    """
    benchmark = torch.backends.cudnn.benchmark
    with default_state(), numerics(tf32=tf32):
        torch.backends.cudnn.benchmark = False
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = benchmark


@contextmanager
def restored_buffers(classify: Classify) -> Iterator[None]:
    """Give the buffers of a module their values back at the end, such as the statistics of batch norm.

    A model in training mode changes them in every call. Of a callable that is not a torch module the buffers
    are not known, and nothing is restored.
    """
    modules = list(classify.modules()) if isinstance(classify, nn.Module) else []
    before = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
                if getattr(module, name) is not buffer:  # the module put another tensor in its place
                    setattr(module, name, buffer)
