"""What can be seen of a model only during an attack and after it.

Before an attack a model may behave and later no longer: its gradient may depend on how often it was asked, or
its answers on what it was shown. So a few of the gradients that the attack is given are kept and asked for
again afterwards; the clean images are classified again; and along the lines from clean images to those with
which attacks failed, the integral of the gradient is compared with the change of the margin.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustbench_vlm.engine import canonical, derivatives, gradient_check
from robustbench_vlm.engine.check_record import Check, check
from robustbench_vlm.engine.check_sample import UNITS
from robustbench_vlm.engine.derivatives import Segments
from robustbench_vlm.engine.job import Cost, Model
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.engine.probe import Probe
from robustbench_vlm.errors import AttackError
from robustbench_vlm.types import Classify, Finding

OUTPUTS_CHANGED = "outputs-changed"
CHECKS = (OUTPUTS_CHANGED, gradient_check.MISMATCH)
"""Names of the checks that are made during attacks and after them."""
GROWTH = 1.5
"""Factor between the numbers of the gradient calls of which some rows are kept."""
ROWS = 4
"""Rows of such a call that are kept."""
AGREEMENT = 0.1
"""Relative difference up to which two gradients at one point are the same."""
SHARE = 0.1
"""Share of kept gradients that may differ."""
PARTS = 8
"""Points at which the gradient is taken along a line to a final image."""
LINES = (2, 8)
"""Least and most such lines; in between, one for every eight findings."""


@dataclass
class _Kept:
    """Rows of one gradient call; the gradients are there once the backward pass was run.

    Attributes:
        images: (k, 3, H, W).
        weights: (k, C) gradient of the objective with respect to the logits.
        gradient: (k, 3, H, W) gradient of the objective with respect to the images.
    """

    images: Tensor
    weights: Tensor | None = None
    gradient: Tensor | None = None


@dataclass
class GradientWatch:
    """A classifier that keeps some rows of some of the gradients that are taken of it."""

    classify: Classify
    kept: list[_Kept] = field(default_factory=list)
    calls: int = 0
    due: int = 1

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C), as the classifier gives it."""
        if not torch.is_grad_enabled() or not images.requires_grad:
            return self.classify(images)
        self.calls += 1
        if self.calls < self.due:
            return self.classify(images)
        self.due = int(GROWTH * self.due) + 1
        logits = self.classify(images.clone())  # a model may write into its input
        if logits.requires_grad:
            self._keep(images, logits)
        return logits

    def _keep(self, images: Tensor, logits: Tensor) -> None:
        rows = torch.linspace(0, len(images) - 1, min(ROWS, len(images))).long().to(images.device)
        kept = _Kept(images.detach()[rows])
        self.kept.append(kept)

        def keep_weights(gradient: Tensor) -> None:
            kept.weights = gradient.detach()[rows]

        def keep_gradient(gradient: Tensor) -> None:
            kept.gradient = gradient.detach()[rows]

        logits.register_hook(keep_weights)  # type: ignore[no-untyped-call]
        images.register_hook(keep_gradient)  # type: ignore[no-untyped-call]


@dataclass
class AttackWatch:
    """Follows one attack on a model.

    Attributes:
        model: the model that is attacked.
        rows: of the calls of the canonical pass.
        called: rows of the calls in which the checks see the model.
        noted: number of findings so far.
    """

    model: Model
    rows: int
    called: int
    noted: int = field(default=0, init=False)
    _gradients: GradientWatch = field(init=False)
    _survivors: dict[str, tuple[Tensor, Tensor, int]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._gradients = GradientWatch(self.model.attacked)

    @property
    def watched(self) -> Model:
        """The model to be given to the attack."""
        if self.model.plain:
            return dataclasses.replace(self.model, canonical=self._gradients)
        return dataclasses.replace(self.model, view=self._gradients)

    def note(self, finding: Finding, image: Tensor, label: int) -> None:
        """Keep the image of a finding, if it was not broken and there is room.

        Args:
            finding: of one image in one stage.
            image: (3, H, W) the clean image, on the CPU.
            label: its class.
        """
        self.noted += 1
        if finding.broken or finding.error:
            self._survivors.pop(finding.key, None)
        elif finding.key in self._survivors or len(self._survivors) < LINES[1]:
            self._survivors[finding.key] = (image.clone(), finding.adv.clone(), label)

    def checks(self, images: Tensor, clean: Tensor) -> tuple[list[Check], Cost]:
        """What the attack brought to light, and the model calls that it took to see it.

        Args:
            images: (n, 3, H, W) clean images.
            clean: (n, C) their canonical logits before the attack.

        Without a finding there was no attack, and nothing is checked.
        """
        if not self.noted:
            return [], Cost()
        probe, canonically = (Probe.of(self.model.canonical, rows) for rows in (self.called, self.rows))
        again = canonically.logits(images)
        lost = clean.isfinite() & ~again.isfinite()
        change = float((again - clean).abs().nan_to_num(nan=0.0, posinf=0.0).max())
        bound = canonically.rounding(clean, UNITS)
        same = change <= bound and not bool(lost.any())
        sentence = f"after the attack a clean logit differs by up to {change:.2g} from what it was before it"
        if bool(lost.any()):
            sentence = f"after the attack {int(lost.sum())} clean logits are no longer finite"
        found = [check(OUTPUTS_CHANGED, "pass" if same else "fail", change, bound, sentence)]
        oracle = Oracle(self.model.attacked, once=not self.model.plain, fixed=self.model.fixed)
        try:
            found += self._repeated(oracle)
            found += self._along(probe, change, images.device) if same and self._gradients.calls else []
        except AttackError as error:  # no gradient any more, where there was one before
            found.append(check(gradient_check.MISMATCH, "fail", None, AGREEMENT, str(error)))
        calls = [one.calls for one in (oracle, probe.oracle, canonically.oracle)]
        return found, Cost(sum(call.forwards for call in calls), sum(call.gradients for call in calls))

    def _repeated(self, oracle: Oracle) -> list[Check]:
        """Gradients that the attack was given, asked for again."""
        kept = [one for one in self._gradients.kept if one.weights is not None and one.gradient is not None]
        if not kept:
            return []
        images = torch.cat([one.images for one in kept])
        weights = torch.cat([one.weights for one in kept if one.weights is not None]).float()
        given = torch.cat([one.gradient for one in kept if one.gradient is not None])
        again = torch.cat(
            [
                _weighted_gradient(oracle, images[part], weights[part], self.called)
                for part in torch.split(torch.arange(len(images), device=images.device), self.called)
            ]
        )
        given, again = given.double().flatten(1), again.double().flatten(1)
        size = torch.maximum(given.norm(dim=1), again.norm(dim=1)).clamp(min=1e-30)
        apart = ((given - again).norm(dim=1) / size).nan_to_num(nan=0.0, posinf=0.0)
        share = float((apart > AGREEMENT).double().mean())
        bad = share > SHARE
        sentence = (
            f"{share:.0%} of the gradients that the attack was given differ when they are asked for again"
        )
        return [check(gradient_check.MISMATCH, "fail" if bad else "pass", share, SHARE, sentence)]

    def _along(self, probe: Probe, noise: float, device: torch.device) -> list[Check]:
        """Integrals from clean images to those with which attacks failed."""
        if not self._survivors:
            return []
        count = max(LINES[0], self.noted // 8)
        starts, ends, labels = zip(*list(self._survivors.values())[:count], strict=True)
        line = Segments(
            torch.stack(starts).to(device),
            torch.stack(ends).to(device),
            torch.tensor(labels, device=device),
            PARTS,
        )
        errors = derivatives.path_errors(probe, [line], noise, gradient_check.PATH_AGREEMENT)
        if not bool(errors[0].isfinite().any()):
            return []
        return [gradient_check.judged(torch.empty(0), errors)]


def _weighted_gradient(oracle: Oracle, images: Tensor, weights: Tensor, rows: int) -> Tensor:
    """(n, 3, H, W) gradient of the weighted sum of the logits of each image.

    Args:
        oracle: the model.
        images: (n, 3, H, W).
        weights: (n, C).
        rows: of the call, at least n.
    """
    padded = canonical.padded(weights, rows)
    found = oracle.gradient(canonical.padded(images, rows), lambda logits: (logits * padded).sum(1))
    return found.gradient[: len(images)]
