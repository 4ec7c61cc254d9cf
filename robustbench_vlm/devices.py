"""The name of a device -> `torch.device`; what its bits depend on; and work in one thread."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from robustbench_vlm.errors import InputError


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device of that name; `auto` is a CUDA GPU if there is one, else the CPU.

    `mps`, the GPU of Apple's processors, is taken where torch has it. Nothing was tested on it, so `auto`
    never chooses it.

    Args:
        name: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        local_rank: of a process that shares its work with others on this machine, its number among them;
            `auto` and `cuda` then mean the GPU of that number.

    Raises:
        InputError: not the name of a device, or a GPU that this machine does not have.
    """
    count = torch.cuda.device_count()
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name):
        raise InputError(f"--device {name}", "not a device", "auto, cpu, cuda, cuda:N or mps")
    if local_rank is not None and (":" in name or name == "mps"):
        expected = "auto, cpu or cuda: every process takes the GPU of its number"
        raise InputError(f"--device {name}", "several processes cannot share it", expected)
    if name == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps", "torch has no MPS here", do="use cpu, or see vlmrob doctor")
    device = torch.device(("cuda" if count else "cpu") if name == "auto" else name)
    if local_rank is not None and device.type == "cuda":
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"{count} CUDA devices here" if count else "no CUDA device here"
        raise InputError(f"--device {name}", found, do="use cpu, or see vlmrob doctor")
    return device


def kernels(device: torch.device) -> dict[str, str]:
    """What the bits of a computation depend on beside its inputs: kernels and version of torch."""
    threads = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    return {"kernels": machine, "torch": torch.__version__}


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch works with one thread: bits depend on their number, which is another on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
