"""The backend `torchattacks`: the package's attacks one by one, each with the numbers of the chain.

Its own AutoAttack takes 10 steps instead of 100, aims at every class and stretches Square's schedule to
10,000 queries; this adapter does not use it. Two differences remain: in L2 its targeted APGD moves all rows
by the step size of the first, and its Square measures a window over all channels together.
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
from robustbench_vlm.backends import installed, packages
from robustbench_vlm.backends.autoattack import BALLS, LOSSES, tiled
from robustbench_vlm.backends.packages import PackageCall, PackageStage, Perturb
from robustbench_vlm.errors import InputError

NAMES, INSTALL = installed.PACKAGES["torchattacks"]


@dataclass(frozen=True)
class TorchAttacks:
    """The adapter of the package.

    Attributes:
        name: of the installed module.
    """

    name: str

    def translate(self, stage: PackageStage) -> PackageCall:
        """FGSM, MI-FGSM, PGD, APGD, FAB or Square of the package.

        Raises:
            InputError: the package has no such attack.
        """
        attack = stage.attack
        if isinstance(attack, Fgsm | MiFgsm | Pgd):
            return self._steps(stage, attack)
        if isinstance(attack, Apgd):
            stage.require("torchattacks", BALLS, "loss", "steps", "rho", "restarts", "targets", "eot")
            draws = attack.eot if isinstance(attack, ApgdEot) else 1
            if attack.loss not in LOSSES:
                raise stage.refusal("torchattacks", f"loss = {attack.loss!r}")
            own = {"steps": attack.steps, "n_restarts": attack.restarts, "rho": attack.rho, "eot_iter": draws}
            if attack.targets:
                return PackageCall("APGDT", {**stage.common, **own, "n_classes": stage.targets + 1})
            return PackageCall("APGD", {**stage.common, **own, "loss": attack.loss})
        if isinstance(attack, Fab):
            stage.require("torchattacks", BALLS, "steps", "targets", "restarts", "alpha_max", "eta", "beta")
            own = {"steps": attack.steps, "n_restarts": attack.restarts}
            aim = {"multi_targeted": attack.targets > 0, "n_classes": stage.targets + 1}
            pull = {"alpha_max": attack.alpha_max, "eta": attack.eta, "beta": attack.beta}
            return PackageCall("FAB", {**stage.common, **own, **aim, **pull})
        if isinstance(attack, Square):
            stage.require("torchattacks", BALLS, "queries", "p", "restarts")
            self._require_shape(stage)
            search = {"n_queries": attack.queries, "p_init": attack.p, "n_restarts": attack.restarts}
            return PackageCall("Square", {**stage.common, **search, "loss": "margin", "resc_schedule": False})
        raise stage.refusal("torchattacks")

    def _steps(self, stage: PackageStage, attack: Fgsm | MiFgsm | Pgd) -> PackageCall:
        """FGSM, MI-FGSM and PGD, which the package has with cross-entropy, one restart, the last iterate."""
        norms = BALLS if isinstance(attack, Pgd) else ("linf",)
        fields = ("loss", "steps", "step_size", "decay", "restarts", "random_start")
        stage.require("torchattacks", norms, *fields)
        if attack.loss != "ce":
            raise stage.refusal("torchattacks", f"loss = {attack.loss!r}")
        if isinstance(attack, Pgd) and attack.restarts != 1:
            raise stage.refusal("torchattacks", f"restarts = {attack.restarts}")
        eps = {"eps": stage.common["eps"]}
        if isinstance(attack, Fgsm):
            return PackageCall("FGSM", eps)
        if stage.job.stop != "last":
            raise stage.refusal("torchattacks", f"stop = {stage.job.stop!r}")
        own = {**eps, "alpha": step_length(attack.step_size, stage.job.threat), "steps": attack.steps}
        if isinstance(attack, MiFgsm):
            return PackageCall("MIFGSM", {**own, "decay": attack.decay})
        kind = "PGD" if stage.job.threat.norm == "linf" else "PGDL2"
        return PackageCall(kind, {**own, "random_start": attack.random_start})

    def _require_shape(self, stage: PackageStage) -> None:
        """Refuse shapes on which its Square fails: windows or tiles of the start would be cut off."""
        if stage.shape is None:
            return
        square = stage.shape[0] == stage.shape[1]
        if not square or (stage.job.threat.norm == "l2" and not tiled(stage.shape)):
            raise stage.refusal(
                "torchattacks", f"norm {stage.job.threat.norm!r} on images of {stage.shape} pixels"
            )

    def build(self, call: PackageCall, model: nn.Module, device: torch.device) -> Perturb:  # noqa: ARG002 - read from the model
        """That attack, constructed for a model; the package reads the device from the model."""
        perturb: Perturb = getattr(packages.load(self.name), call.kind)(model, **call.settings)
        return perturb


def package() -> TorchAttacks:
    """The adapter of the installed package.

    Raises:
        InputError: it is not installed; the message says how to get it.
    """
    name = installed.installed(NAMES)
    if name is None:
        raise InputError("--engine torchattacks", "not installed", do=INSTALL)
    return TorchAttacks(name)
