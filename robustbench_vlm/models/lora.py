"""Low-rank adapters on an image tower, through peft; merged back before anything is saved or evaluated.

peft runs an adapted `MultiheadAttention` by adding the delta to the frozen weights before each forward and
subtracting it afterwards. Two consequences are handled here: adapter dropout has no effect there, so it is
not offered; and the subtraction leaves rounding behind, so `Adapters.restore` puts the frozen weights back
bit for bit after every step.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models.clip import Clip


@dataclass(frozen=True)
class Adapters:
    """Adapters inside the image tower of one `Clip`.

    Attributes:
        tuner: peft's view of the tower.
        frozen: pristine copies of the weights that peft adds to and subtracts from, by name.
    """

    tuner: Any
    frozen: dict[str, Tensor]

    def restore(self) -> None:
        """Put the frozen weights back exactly; call after every step."""
        with torch.no_grad():
            for name, parameter in _adapted(self.tuner.model):
                parameter.copy_(self.frozen[name])

    def merged(self, model: Clip) -> Clip:
        """A plain copy of `model` with the deltas added into the weights."""
        self.restore()
        visual = LoraModel.merge_and_unload(copy.deepcopy(self.tuner))
        plain = copy.copy(model)
        plain._modules = dict(model._modules)  # a shallow copy: the text tower is shared
        plain.visual = visual
        return plain


def attach(model: Clip, r: int, alpha: int, targets: tuple[str, ...]) -> Adapters:
    """Add rank-`r` adapters with scale alpha / r to every module of the image tower named in `targets`.

    Only the adapters require gradients afterwards. Initialised from a fixed seed, so a run is a function of
    its recipe.

    Raises:
        WeightsError: no module of the tower has such a name (a ResNet has no `attn`, for one).
    """
    wanted = [name for name, _ in model.visual.named_modules() if name.split(".")[-1] in targets]
    if not wanted:
        raise WeightsError(
            f"lora.targets = {list(targets)}",
            f"the image tower of {model.facts['arch']} has no such module",
            "names of attention or linear modules",
            "leave [lora] out to train the whole tower",
        )
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=list(targets))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft's remarks on tensors it does not adapt
        torch.default_generator.manual_seed(0)
        tuner = LoraModel(model.visual, config, "default")
    frozen = {name: parameter.detach().clone() for name, parameter in _adapted(tuner.model)}
    return Adapters(tuner, frozen)


def _adapted(visual: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The frozen weights below every adapted layer."""
    for name, parameter in visual.named_parameters():
        if "base_layer" in name and "lora_" not in name and name.endswith("weight"):
            yield name, parameter
