"""Adversarial robustness of CLIP-like vision-language models: train, attack, compare.

The public interface is what `dir(robustbench_vlm)` lists. Names are imported when they are first used, so
that `import robustbench_vlm` and `vlmrob --help` do not wait for torch.

Example:
    >>> import robustbench_vlm
    >>> robustbench_vlm.list_models()[:2]
    ['tiny', 'tiny-clean-teacher']
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustbench_vlm.api.attack import Attacked, attack
    from robustbench_vlm.api.commands import compare, evaluate, leaderboard, load_model, train
    from robustbench_vlm.cards.plugins import allow_code
    from robustbench_vlm.catalogue import (
        list_attacks,
        list_datasets,
        list_defenses,
        list_models,
        list_recipes,
        list_suites,
    )
    from robustbench_vlm.models.clip import Classifier
    from robustbench_vlm.threat import Threat
    from robustbench_vlm.types import Encoder

from robustbench_vlm.version import __version__

__all__ = [
    "Attacked",
    "Classifier",
    "Encoder",
    "Threat",
    "__version__",
    "allow_code",
    "attack",
    "compare",
    "evaluate",
    "leaderboard",
    "list_attacks",
    "list_datasets",
    "list_defenses",
    "list_models",
    "list_recipes",
    "list_suites",
    "load_model",
    "train",
]

_MODULES = {
    "Attacked": "api.attack",
    "allow_code": "cards.plugins",
    "attack": "api.attack",
    "Classifier": "models.clip",
    "Encoder": "types",
    "Threat": "threat",
    **{name: "catalogue" for name in __all__ if name.startswith("list_")},
}
"""Module of each public name; `api.commands` where none is given."""


def __dir__() -> list[str]:
    """The public names."""
    return __all__


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever is exported
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'api.commands')}"), name)
