"""Adversarial robustness of CLIP-like vision-language models: train, attack, compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustbench_vlm.api import Attacked, attack
    from robustbench_vlm.models.zoo import load as load_model
    from robustbench_vlm.threat import Threat

from robustbench_vlm.version import __version__

__all__ = ["Attacked", "Threat", "__version__", "attack", "load_model"]

_HOMES = {
    "Attacked": ("robustbench_vlm.api", "Attacked"),
    "Threat": ("robustbench_vlm.threat", "Threat"),
    "attack": ("robustbench_vlm.api", "attack"),
    "load_model": ("robustbench_vlm.models.zoo", "load"),
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever is exported
    """Import the public names when first used: `vlmrob --help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
