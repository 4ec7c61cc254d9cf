"""The reference AutoAttack as an optional engine: its verdicts, put into our findings.

For comparisons with published numbers. It is slower, its noise depends on batch composition, and it fails
with fewer classes than targets; the native engine has none of this. Whatever it returns is judged by our
canonical pass, and held to ball and box, like an image of our own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from robustbench_vlm.attacks import canonical, geometry, losses
from robustbench_vlm.errors import AttackError, InputError
from robustbench_vlm.threat import Threat
from robustbench_vlm.types import Classify, Finding

PACKAGES = ("autoattack", "pyautoattack")  # the original, and its fork on the package index
NORMS = {"linf": "Linf", "l2": "L2"}


def package() -> ModuleType:
    """The installed reference package.

    Raises:
        InputError: neither is installed; the message says how to install one.
    """
    for name in PACKAGES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    raise InputError("--engine autoattack", "not installed", do="pip install 'robustbench-vlm[autoattack]'")


class _Model(nn.Module):
    """A classifier in our fixed shape, whatever batch the package makes."""

    def __init__(self, classify: Classify, rows: int) -> None:
        super().__init__()
        self.classify, self.rows = classify, rows

    def forward(self, images: Tensor) -> Tensor:
        chunks = torch.split(images, self.rows)
        return torch.cat([self.classify(canonical.padded(c, self.rows))[: len(c)] for c in chunks])


def run(  # noqa: PLR0913 - as `engine.run`
    classify: Classify,
    images: Tensor,
    labels: Tensor,
    keys: Sequence[str],
    threat: Threat,
    *,
    version: str,
    seed: int,
    rows: int,
    on_finding: Callable[[Finding], None],
) -> None:
    """Attack all images with the reference's chain `version` (`standard`, `plus`, `rand`).

    Args as those of `engine.run`. Findings say neither target nor iteration nor passes: the package keeps
    no record of them.

    Raises:
        InputError: the package is missing.
        AttackError: an image is outside ball or box.
    """
    chain = _chain(package(), _Model(classify, rows), threat, version, seed, str(images.device))
    returned = chain.run_standard_evaluation(images.clone(), labels)
    adv = returned[0] if isinstance(returned, tuple) else returned  # the fork returns more than the images
    found = canonical.logits(classify, adv, rows)
    outside = geometry.excess(adv, images, threat).tolist()
    predictions, margins = found.argmax(1).tolist(), losses.judge(found, labels).tolist()
    for i, (key, label) in enumerate(zip(keys, labels.tolist(), strict=True)):
        if outside[i] > geometry.slack(threat):
            raise AttackError(f"autoattack: {key} is {outside[i]:.3g} outside {threat} or [0, 1]")
        broken = predictions[i] != label
        on_finding(Finding(key, broken, adv[i].cpu().clone(), -1, 0, -1, 0, 0, predictions[i], margins[i]))


def _chain(
    module: ModuleType,
    model: nn.Module,
    threat: Threat,
    version: str,
    seed: int,
    device: str,
) -> Any:  # noqa: ANN401 - a class of an untyped package
    settings = {"norm": NORMS[threat.norm], "eps": geometry.radius(threat), "seed": seed, "version": version}
    quiet = {"verbose": False} if module.__name__ == "autoattack" else {}
    return module.AutoAttack(model, **settings, device=device, **quiet)
