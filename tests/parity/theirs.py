"""The installed reference as a black box: driven, fed with our noise, and watched; no code of it is here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pyautoattack
import torch
from pyautoattack import autopgd_base, fab_pt, square
from subjects import ROWS, Subject
from torch import Tensor, nn

from robustbench_vlm import rng
from robustbench_vlm.engine import canonical
from robustbench_vlm.threat import Threat

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


class Watched(nn.Module):
    """A model in our fixed shape, whatever batch comes, that counts what is asked of it.

    Attributes:
        forwards, backwards: calls so far, each of any number of rows.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], rows: int = ROWS) -> None:
        super().__init__()
        self.model, self.rows = model, rows
        self.forwards = self.backwards = 0

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += 1
        chunks = torch.split(images, self.rows)
        logits = torch.cat([self.model(canonical.padded(c, self.rows))[: len(c)] for c in chunks])
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.backwards += 1


def apgd(model: nn.Module, threat: Threat, loss: str, steps: int, targets: int = 0, **more):
    """Its APGD: untargeted with a loss, or over target classes with targeted DLR."""
    common = {"n_iter": steps, **_common(threat), **more}
    if targets:
        return autopgd_base.APGDAttack_targeted(model, n_target_classes=targets, **common)
    return autopgd_base.APGDAttack(model, loss=loss, **common)


def fab(model: nn.Module, threat: Threat, steps: int, targets: int, **more):
    """Its FAB, targeted if there are targets."""
    aim = {"targeted": targets > 0, "n_target_classes": targets}
    return fab_pt.FABAttack_PT(model, n_iter=steps, **aim, **_common(threat), **more)


def squares(model: nn.Module, threat: Threat, queries: int, **more):
    """Its Square with AutoAttack's settings."""
    settings = {"n_queries": queries, "p_init": 0.8, "resc_schedule": False}
    return square.SquareAttack(model, **settings, **_common(threat), **more)


def chain(model: nn.Module, threat: Threat, version: str, seed: int, steps: int, queries: int):
    """Its whole chain; steps of APGD and FAB and queries of Square may be fewer than 100 and 5000."""
    whole = pyautoattack.AutoAttack(model, version=version, seed=seed, device="cpu", **_ball(threat))
    whole.logger.setLevel("ERROR")
    for name in ("apgd", "apgd_targeted"):
        old = getattr(whole, name)
        kept = {key: getattr(old, key) for key in ("n_restarts", "eot_iter", "use_largereps")}
        if name == "apgd_targeted":
            kept["n_target_classes"] = old.n_target_classes
        kind = type(old)
        setattr(whole, name, kind(model, n_iter=steps, **kept, **_common(threat), logger=whole.logger))
    whole.fab.n_iter, whole.square.n_queries = steps, queries
    return whole


def _ball(threat: Threat) -> dict:
    return {"norm": NORMS[threat.norm], "eps": float(threat.eps)}


def _common(threat: Threat) -> dict:
    return {**_ball(threat), "device": "cpu"}


def run(attack, who: Subject) -> Tensor:
    """(n, 3, H, W) what it returns for the images of a subject."""
    adv: Tensor = attack.perturb(who.images.clone(), who.labels.clone())
    return adv.detach()


def fed(attack, who: Subject, stage: str = "s", seed: int = 0):
    """The attack with its draws answered by our noise: of the same image, target and restart."""
    keys = {image.numpy().tobytes(): key for image, key in zip(who.images, who.keys, strict=True)}
    met: Counter[str] = Counter()
    whole = "decr_eps_pgd" if getattr(attack, "use_largereps", False) else "attack_single_run"
    single = getattr(attack, whole)

    def answered(x: Tensor, y: Tensor, *args, **more):
        targets = _targets(attack, x)
        owners = [f"{seed}/{keys[row.numpy().tobytes()]}/{stage}" for row in x.detach()]
        trials = [f"{owner}/{target}" for owner, target in zip(owners, targets, strict=True)]
        names = [f"{trial}/{met[trial]}" for trial in trials]
        met.update(trials)
        with answering(names):
            return single(x, y, *args, **more)

    setattr(attack, whole, answered)
    return attack


def _targets(attack, x: Tensor) -> list[int]:
    """The class that each row aims at, -1 if none."""
    if getattr(attack, "targeted", False):
        return attack.predict(x).sort(dim=-1)[1][:, -attack.target_class].tolist()
    aim = getattr(attack, "y_target", None)
    return [-1] * len(x) if aim is None else aim.tolist()


@contextmanager
def answering(names: list[str]) -> Iterator[None]:
    """Draws of as many rows as there are names are the noise of these names."""

    def answer(draw):
        def drawn(*shape, **_):
            size = tuple(shape[0]) if isinstance(shape[0], (tuple, list)) else shape
            assert size[0] == len(names)
            return torch.from_numpy(np.stack([draw(name, size[1:]) for name in names]))

        return drawn

    with (
        mock.patch.object(torch, "rand", answer(rng.uniform)),
        mock.patch.object(torch, "randn", answer(rng.normal)),
        mock.patch.object(torch, "randn_like", lambda x: answer(rng.normal)(*x.shape)),
    ):
        yield
