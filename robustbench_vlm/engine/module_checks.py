"""Examinations of a torch module itself: is it in eval mode, and do calls change it?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustbench_vlm.engine.check_record import Check, Level, check
from robustbench_vlm.types import Classify

MODAL = (
    nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._NormBase,
    nn.RReLU,
)
"""Layers that compute something else in training mode."""


def training_mode(classify: Classify) -> Check:
    """Fails if a layer is in training mode that computes something else there."""
    modules = list(classify.modules()) if isinstance(classify, nn.Module) else []
    active = [module for module in modules if module.training]
    modal = [module for module in active if isinstance(module, MODAL)]
    level: Level = "pass"
    sentence = "everything is in eval mode" if modules else "not a torch module, so its mode is not known"
    if modal:
        kinds = ", ".join(sorted({type(module).__name__ for module in modal}))
        level = "fail"
        sentence = f"{len(modal)} layers are in training mode ({kinds}): call model.eval()"
    elif active:
        level = "warn"
        sentence = f"{len(active)} modules are in training mode, none of which is known to act otherwise"
    return check("training-mode", level, float(len(modal) or len(active)), 0.0, sentence)


def checksums(classify: Classify) -> dict[str, int]:
    """A checksum of the bits of each parameter and buffer; no tensor is copied off the device."""
    if not isinstance(classify, nn.Module):
        return {}
    return {name: _bits(value) for name, value in classify.state_dict().items()}


def _bits(value: Any) -> int:  # noqa: ANN401 - a state dict may contain things that are no tensors
    if not isinstance(value, Tensor) or not value.numel():
        return 0
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = value.detach().contiguous().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    return int(flat.view(kinds[flat.element_size()]).sum(dtype=torch.int64))


def state_changed(before: dict[str, int], after: dict[str, int]) -> Check:
    """Fails if the checksums of a parameter or buffer before and after some calls differ."""
    names = [name for name in after if before.get(name) != after[name]]
    level: Level = "fail" if names else "pass"
    sentence = f"a call changes {', '.join(names[:3])}" if names else "calls change no parameter or buffer"
    return check("state-changed", level, float(len(names)), 0.0, sentence)
