"""The engine `torchattacks`: its attacks one by one, each with the numbers of the chain.

By itself its AutoAttack takes 10 steps instead of 100, aims at every class and stretches Square's schedule to
10,000 queries; none of that is so here. What stays different: in L2 its targeted APGD moves all rows by the
step size of the first, and its Square measures a window over all channels together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.attacks.apgd_eot import ApgdEot
from robustbench_vlm.attacks.fab import Fab
from robustbench_vlm.attacks.fgsm import Fgsm
from robustbench_vlm.attacks.mi_fgsm import MiFgsm
from robustbench_vlm.attacks.pgd import Pgd, step_length
from robustbench_vlm.attacks.square import Square
from robustbench_vlm.backends import packages
from robustbench_vlm.backends.autoattack import BALLS, LOSSES, tiled
from robustbench_vlm.backends.packages import Call, Order, Perturb
from robustbench_vlm.errors import InputError

NAMES = ("torchattacks",)
INSTALL = "pip install --no-deps torchattacks (its wheel also carries files of a package named robustbench)"


@dataclass(frozen=True)
class TorchAttacks:
    """The package."""

    name: str

    def translate(self, order: Order) -> Call:
        """FGSM, MI-FGSM, PGD, APGD, FAB and Square.

        Raises:
            InputError: the package has no such attack.
        """
        attack = order.attack
        if isinstance(attack, Fgsm | MiFgsm | Pgd):
            return self._steps(order, attack)
        if isinstance(attack, Apgd):
            order.require("torchattacks", BALLS, "loss", "steps", "rho", "restarts", "targets", "eot")
            draws = attack.eot if isinstance(attack, ApgdEot) else 1
            if attack.loss not in LOSSES:
                raise order.refusal("torchattacks", f"loss = {attack.loss!r}")
            walk = {
                "steps": attack.steps,
                "n_restarts": attack.restarts,
                "rho": attack.rho,
                "eot_iter": draws,
            }
            if attack.targets:
                return Call("APGDT", {**order.common, **walk, "n_classes": order.targets + 1})
            return Call("APGD", {**order.common, **walk, "loss": attack.loss})
        if isinstance(attack, Fab):
            order.require("torchattacks", BALLS, "steps", "targets", "restarts", "alpha_max", "eta", "beta")
            walk = {"steps": attack.steps, "n_restarts": attack.restarts}
            aim = {"multi_targeted": attack.targets > 0, "n_classes": order.targets + 1}
            pull = {"alpha_max": attack.alpha_max, "eta": attack.eta, "beta": attack.beta}
            return Call("FAB", {**order.common, **walk, **aim, **pull})
        if isinstance(attack, Square):
            order.require("torchattacks", BALLS, "queries", "p", "restarts")
            self._require_shape(order)
            search = {"n_queries": attack.queries, "p_init": attack.p, "n_restarts": attack.restarts}
            return Call("Square", {**order.common, **search, "loss": "margin", "resc_schedule": False})
        raise order.refusal("torchattacks")

    def _steps(self, order: Order, attack: Fgsm | MiFgsm | Pgd) -> Call:
        """These raise nothing but cross-entropy, start once, and return the last iterate."""
        norms = BALLS if isinstance(attack, Pgd) else ("linf",)
        own = ("step_size", "decay", "restarts", "random_start")
        order.require("torchattacks", norms, "loss", "steps", *own)
        if attack.loss != "ce":
            raise order.refusal("torchattacks", f"loss = {attack.loss!r}")
        if attack.restarts != 1:
            raise order.refusal("torchattacks", f"restarts = {attack.restarts}")
        eps = {"eps": order.common["eps"]}
        if isinstance(attack, Fgsm):
            return Call("FGSM", eps)
        if order.stop != "last":
            raise order.refusal("torchattacks", f"stop = {order.stop!r}")
        walk = {**eps, "alpha": step_length(attack.step_size, order.threat), "steps": attack.steps}
        if isinstance(attack, MiFgsm):
            return Call("MIFGSM", {**walk, "decay": attack.decay})
        kind = "PGD" if order.threat.norm == "linf" else "PGDL2"
        return Call(kind, {**walk, "random_start": attack.random_start})

    def _require_shape(self, order: Order) -> None:
        """Its windows are not capped, and its L2 start is laid in tiles as that of AutoAttack."""
        if order.shape is None:
            return
        square = order.shape[0] == order.shape[1]
        if not square or (order.threat.norm == "l2" and not tiled(order.shape)):
            raise order.refusal(
                "torchattacks", f"norm {order.threat.norm!r} on images of {order.shape} pixels"
            )

    def build(self, call: Call, model: nn.Module, device: torch.device) -> Perturb:  # noqa: ARG002 - it asks the model
        """That attack, ready for a model."""
        perturb: Perturb = getattr(packages.load(self.name), call.kind)(model, **call.settings)
        return perturb


def package() -> TorchAttacks:
    """The installed package.

    Raises:
        InputError: it is not there; the message says how to get it.
    """
    name = packages.installed(NAMES)
    if name is None:
        raise InputError("--engine torchattacks", "not installed", do=INSTALL)
    return TorchAttacks(name)
