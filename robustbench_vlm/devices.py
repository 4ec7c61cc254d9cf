"""The name of a device -> `torch.device`."""

from __future__ import annotations

import re

import torch

from robustbench_vlm.errors import InputError


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU if there is one, else the CPU.

    Raises:
        InputError: not the name of a device, or a GPU that this machine does not have.
    """
    count = torch.cuda.device_count()
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise InputError(f"--device {name}", "not a device", "auto, cpu, cuda or cuda:N")
    device = torch.device(("cuda" if count else "cpu") if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= count:
        found = f"{count} CUDA devices here" if count else "no CUDA device here"
        raise InputError(f"--device {name}", found, do="use cpu, or see vlmrob doctor")
    return device
