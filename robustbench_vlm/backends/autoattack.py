"""The backend `autoattack`: the reference implementation of AutoAttack, or its fork on the package index.

Each stage is run by the package's own attack with the numbers of the chain. Its APGD always runs to its end
and returns the last misclassified iterate; its Square has the schedule that AutoAttack gives it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.attacks.apgd_eot import ApgdEot
from robustbench_vlm.attacks.apgd_l1 import ApgdL1
from robustbench_vlm.attacks.fab import Fab
from robustbench_vlm.attacks.square import Square
from robustbench_vlm.backends import installed, packages
from robustbench_vlm.backends.packages import NORMS, PackageCall, PackageStage, Perturb
from robustbench_vlm.errors import InputError

NAMES, INSTALL = installed.PACKAGES["autoattack"]
LOSSES = ("ce", "dlr", "targeted-dlr")
MODULES = {
    "APGDAttack": "autopgd_base",
    "APGDAttack_targeted": "autopgd_base",
    "FABAttack_PT": "fab_pt",
    "SquareAttack": "square",
}
TILES = 5  # tiles along a side, of Square's start in L2 and L1
BALLS = ("linf", "l2")
RADII = (3.0, 2.0, 1.0)  # radii of the runs of its L1 APGD
SHARES = (0.3, 0.3)  # shares of all steps that the first two runs take


@dataclass(frozen=True)
class AutoAttack:
    """The adapter of the package.

    Attributes:
        name: of the installed module, one of `NAMES`.
    """

    name: str

    def translate(self, stage: PackageStage) -> PackageCall:
        """APGD, FAB or Square of the package.

        Raises:
            InputError: the package has no such attack.
        """
        attack = stage.attack
        if isinstance(attack, Apgd):
            stage.require("autoattack", BALLS, "loss", "steps", "rho", "restarts", "targets", "eot")
            draws = attack.eot if isinstance(attack, ApgdEot) else 1
            return _apgd(stage, attack, n_iter=attack.steps, rho=attack.rho, eot_iter=draws)
        if isinstance(attack, ApgdL1):
            stage.require("autoattack", ("l1",), "loss", "steps", "radii", "restarts", "targets")
            steps = sum(attack.steps)
            larger = len(attack.steps) > 1
            if larger and (attack.radii, attack.steps) != (RADII, runs(steps)):
                raise stage.refusal("autoattack", f"steps = {attack.steps} at radii = {attack.radii}")
            return _apgd(stage, attack, n_iter=steps, use_largereps=larger)
        if isinstance(attack, Fab):
            stage.require(
                "autoattack", tuple(NORMS), "steps", "targets", "restarts", "alpha_max", "eta", "beta"
            )
            aim = {"targeted": attack.targets > 0, "n_target_classes": stage.targets}
            pull = {"alpha_max": attack.alpha_max, "eta": attack.eta, "beta": attack.beta}
            return _call(
                stage, "FABAttack_PT", n_iter=attack.steps, n_restarts=attack.restarts, **aim, **pull
            )
        if isinstance(attack, Square):
            stage.require("autoattack", tuple(NORMS), "queries", "p", "restarts")
            if stage.job.threat.norm != "linf" and stage.shape is not None and not tiled(stage.shape):
                what = f"norm {stage.job.threat.norm!r} on images of {stage.shape} pixels"
                raise stage.refusal("autoattack", what)
            settings = {"n_queries": attack.queries, "p_init": attack.p, "n_restarts": attack.restarts}
            return _call(stage, "SquareAttack", **settings, resc_schedule=False)
        raise stage.refusal("autoattack")

    def build(self, call: PackageCall, model: nn.Module, device: torch.device) -> Perturb:
        """That attack, constructed for a model."""
        module = packages.load(f"{self.name}.{MODULES[call.kind]}")
        perturb: Perturb = getattr(module, call.kind)(model, **call.settings, device=str(device)).perturb
        return perturb


def runs(steps: int) -> tuple[int, ...]:
    """Steps of each run of its L1 APGD, the last of them at the radius itself."""
    first = [math.ceil(share * steps) for share in SHARES]
    return (*first, steps - sum(first))


def tiled(shape: tuple[int, int]) -> bool:
    """Whether Square of the package can start in L2 or L1 on images of this shape; else a tile is cut off."""
    side = shape[0] // TILES
    return side > 0 and all(length // side <= TILES for length in shape)


def _apgd(stage: PackageStage, attack: Apgd | ApgdL1, **settings: object) -> PackageCall:
    """APGD of the package, with targets or without."""
    if attack.loss not in LOSSES:
        raise stage.refusal("autoattack", f"loss = {attack.loss!r}")
    settings["n_restarts"] = attack.restarts
    if attack.targets:
        return _call(stage, "APGDAttack_targeted", **settings, n_target_classes=stage.targets)
    return _call(stage, "APGDAttack", **settings, loss=attack.loss)


def _call(stage: PackageStage, kind: str, **settings: object) -> PackageCall:
    return PackageCall(kind, {**stage.common, **settings})


def package() -> AutoAttack:
    """The adapter of the installed package.

    Raises:
        InputError: neither module is installed; the message says how to get it.
    """
    name = installed.installed(NAMES)
    if name is None:
        raise InputError("--engine autoattack", "not installed", do=INSTALL)
    return AutoAttack(name)
