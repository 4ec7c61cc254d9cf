"""The device that is meant by a name."""

from __future__ import annotations

import re

import torch

from robustbench_vlm.errors import InputError


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU when there is one.

    Raises:
        InputError: not the name of a device, or none of that name here.
    """
    here = torch.cuda.device_count()
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise InputError(f"--device {name}", "not a device", "auto, cpu, cuda or cuda:N")
    place = torch.device(("cuda" if here else "cpu") if name == "auto" else name)
    if place.type == "cuda" and (place.index or 0) >= here:
        found = f"{here} CUDA devices here" if here else "no CUDA device here"
        raise InputError(f"--device {name}", found, do="use cpu, or see vlmrob doctor")
    return place
