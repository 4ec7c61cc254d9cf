"""The engine `autoattack`: the reference implementation of AutoAttack, or its fork on the package index.

Each stage is the package's own attack with the numbers of the chain. Its APGD always walks to its end and
returns the last misclassified iterate, its Square runs with the schedule as AutoAttack sets it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from robustbench_vlm.attacks import packages
from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.attacks.fab import Fab
from robustbench_vlm.attacks.packages import Call, Order, Perturb
from robustbench_vlm.attacks.square import Square
from robustbench_vlm.errors import InputError

NAMES = ("autoattack", "pyautoattack")  # the original, and the fork
INSTALL = "pip install 'robustbench-vlm[autoattack]'"
LOSSES = ("ce", "dlr", "targeted-dlr")
HOMES = {
    "APGDAttack": "autopgd_base",
    "APGDAttack_targeted": "autopgd_base",
    "FABAttack_PT": "fab_pt",
    "SquareAttack": "square",
}
TILES = 5  # along a side, of Square's start in L2


@dataclass(frozen=True)
class AutoAttack:
    """The package under one of its names."""

    name: str

    def translate(self, order: Order) -> Call:
        """APGD, FAB and Square.

        Raises:
            InputError: the package has no such attack.
        """
        attack = order.attack
        if isinstance(attack, Apgd):
            order.require("autoattack", "loss", "steps", "rho", "restarts", "targets")
            if attack.loss not in LOSSES:
                raise order.refusal("autoattack", f"loss = {attack.loss!r}")
            settings = {"n_iter": attack.steps, "n_restarts": attack.restarts, "rho": attack.rho}
            if attack.targets:
                return _call(order, "APGDAttack_targeted", **settings, n_target_classes=order.targets)
            return _call(order, "APGDAttack", **settings, loss=attack.loss)
        if isinstance(attack, Fab):
            order.require("autoattack", "steps", "targets", "restarts", "alpha_max", "eta", "beta")
            aim = {"targeted": attack.targets > 0, "n_target_classes": order.targets}
            pull = {"alpha_max": attack.alpha_max, "eta": attack.eta, "beta": attack.beta}
            return _call(
                order, "FABAttack_PT", n_iter=attack.steps, n_restarts=attack.restarts, **aim, **pull
            )
        if isinstance(attack, Square):
            order.require("autoattack", "queries", "p", "restarts")
            if order.threat.norm == "l2" and order.shape is not None and not tiled(order.shape):
                raise order.refusal("autoattack", f"norm 'l2' on images of {order.shape} pixels")
            settings = {"n_queries": attack.queries, "p_init": attack.p, "n_restarts": attack.restarts}
            return _call(order, "SquareAttack", **settings, resc_schedule=False)
        raise order.refusal("autoattack")

    def build(self, call: Call, model: nn.Module, device: torch.device) -> Perturb:
        """That attack, ready for a model."""
        module = packages.load(f"{self.name}.{HOMES[call.kind]}")
        perturb: Perturb = getattr(module, call.kind)(model, **call.settings, device=str(device)).perturb
        return perturb


def tiled(shape: tuple[int, int]) -> bool:
    """Whether the package can begin Square in L2 on such images: elsewhere a tile sticks out."""
    side = shape[0] // TILES
    return side > 0 and all(length // side <= TILES for length in shape)


def _call(order: Order, kind: str, **settings: object) -> Call:
    return Call(kind, {**order.common, **settings})


def package() -> AutoAttack:
    """The installed package.

    Raises:
        InputError: there is none; the message says how to get one.
    """
    name = packages.installed(NAMES)
    if name is None:
        raise InputError("--engine autoattack", "not installed", do=INSTALL)
    return AutoAttack(name)
