"""Accuracy of the student on a few validation images while it is trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from robustbench_vlm.defenses.losses import ce
from robustbench_vlm.engine.geometry import uniform_start
from robustbench_vlm.engine.noise import Keyed
from robustbench_vlm.models.clip import frozen
from robustbench_vlm.training import fsdp
from robustbench_vlm.training.inner import ascend
from robustbench_vlm.training.setup import Setup


def probe(setup: Setup) -> dict[str, float]:
    """Accuracy on the probe images, clean and under PGD in the ball of the recipe, as fractions in [0, 1].

    Where the student's weights are sharded, all processes call it, on the same images.
    It shows the progress of a run and is no result: results come from `vlmrob eval`.
    """
    assert setup.probe_batch is not None
    assert setup.recipe.probe is not None
    batch = setup.probe_batch
    with fsdp.gathered_once(setup.model.visual), frozen(setup.model):
        with torch.no_grad():
            adv, roles = batch.images, setup.current_roles()
        inner = setup.recipe.inner
        if inner is not None:
            names = [f"{setup.recipe.seed}/probe/{key}" for key in batch.keys]
            start = uniform_start(adv, inner.threat, Keyed(tuple(names)))
            adv = ascend(
                lambda images: ce(roles.logits("student", images), batch.labels),
                batch.images,
                inner.threat,
                steps=setup.recipe.probe.steps,
                step_size=float(inner.step),
                start=start,
            )
        with torch.no_grad():
            clean, robust = (roles.logits("student", images).argmax(1) for images in (batch.images, adv))
    correct = {"clean": clean == batch.labels} | ({"robust": robust == batch.labels} if inner else {})
    return {name: round(float(hits.float().mean()), 4) for name, hits in correct.items()}


def probe_text(found: Mapping[str, float]) -> str:
    """What a probe found, in percent as tables have it: `clean 93.75 %, robust 1.25 %`."""
    return ", ".join(f"{name} {100 * share:.2f} %" for name, share in found.items())
