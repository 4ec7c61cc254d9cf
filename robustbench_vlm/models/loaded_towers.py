"""What the towers of a model have to be once their weights are loaded: finite, and encoders of one width."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from robustbench_vlm.errors import WeightsError


def require_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights with a value that is NaN or infinite.

    Raises:
        WeightsError: the message names the first tensor that has one.
    """
    for name, value in state.items():
        if value.is_floating_point() and value.numel():
            low, high = value.detach().aminmax()  # NaN passes through both
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                found = f"tensor {name!r} has values that are not finite"
                raise WeightsError(where, found, "trained weights")


def scale_of(logarithm: Tensor, where: str) -> float:
    """The factor s of the cosine logits, from its logarithm, of which models store one number.

    Raises:
        WeightsError: s is not finite.
    """
    stored = logarithm.detach().float()
    scale = float(stored.exp())
    if not math.isfinite(scale):
        found = f"logit_scale is {float(stored):.4g}, whose exponential is not finite"
        raise WeightsError(where, found, "trained weights")
    return scale


def require_embeddings(
    image: Callable[[Tensor], Tensor],
    text: Callable[[Tensor], Tensor],
    inputs: tuple[Tensor, Tensor],
    width: int,
    where: str,
) -> None:
    """Call both towers once: a setting that no tower can be run with is found here and not in an attack.

    Args:
        image: (N, 3, H, W) -> (N, D).
        text: token ids (N, L) -> (N, D).
        inputs: one image, and the tokens of one sentence.
        width: D, the `embed_dim` of the configuration.
        where: of messages.

    Raises:
        WeightsError: a tower cannot be called, or gives anything but (1, D).
    """
    for kind, tower, given in zip(("image", "text"), (image, text), inputs, strict=True):
        try:
            with torch.no_grad():
                found = tower(given)
        except Exception as error:  # any setting may be wrong, in towers of several libraries
            reason = [*str(error).strip().splitlines(), type(error).__name__][0]
            raise WeightsError(
                where, f"its {kind} tower fails for one {kind}: {reason}", _SETTINGS
            ) from error
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if shape != (1, width):
            expected = f"(1, {width}), one embedding of embed_dim: see pool_type and proj_type"
            raise WeightsError(where, f"its {kind} tower gives {shape} for one {kind}", expected)


_SETTINGS = "settings that the tower can be run with"
