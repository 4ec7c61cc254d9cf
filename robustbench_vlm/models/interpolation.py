"""Interpolation between an image tower and the one that it was trained from, weight by weight.

Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT), arXiv:2109.01903, equation 1.
"""

from __future__ import annotations

import copy

import torch

from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models.clip import Clip


def interpolated(start: Clip, trained: Clip, share: float) -> Clip:
    """`trained` with the image tower (1 - share) * start + share * trained.

    Parameters and buffers of real numbers are interpolated, running statistics among them; counters are those
    of `trained`. Neither model is changed.

    Args:
        start: the model that training began from.
        trained: of the same architecture, on the same device.
        share: in [0, 1].

    Raises:
        WeightsError: towers with other tensors.
    """
    if share == 1:
        return trained
    before, visual = start.visual.state_dict(), copy.deepcopy(trained.visual)
    after = visual.state_dict()
    if {n: v.shape for n, v in before.items()} != {n: v.shape for n, v in after.items()}:
        raise WeightsError(
            f"interpolation of {trained.facts.arch}",
            f"its start is {start.facts.arch}, whose image tower has other tensors",
            "the architecture of the trained tower",
        )
    with torch.no_grad():
        for name, value in after.items():
            if value.is_floating_point():
                value.copy_(before[name].to(value) + share * (value - before[name].to(value)))
    return trained.replaced(visual=visual)
