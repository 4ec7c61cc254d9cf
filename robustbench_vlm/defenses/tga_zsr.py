"""TGA-ZSR: TeCoA with a penalty for text-guided attention that differs from that of the original model.

Source   Yu et al. 2024, arXiv:2410.21802, and its released code (TGA-ZSR.py, attention_map.py).
Threat   any norm that `engine.geometry` knows; the released attack is cross-entropy, 2 steps, student in
         train mode (`[inner] mode = "train"`).
Departs  the released code runs the student on x' twice, for the logits and for the map; here one forward
         gives both, since its class token gives the logits.
Symbols  x clean image, x' adversarial image, y label; S student, 0 frozen original (`anchor`);
         A_M(x) attention map of model M on x for the text of class y.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch.nn import functional as F  # noqa: N812 - the customary name

from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import TINY, ce, grey_image, in_one_forward

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective


@dataclass(frozen=True)
class TgaZsr(Defense):
    """CE(x') + alpha mean_i |A_S(x'_i) - A_0(x_i)| + beta mean_i |A_S(x_i) - A_0(x_i)|, L2 norms.

    Attributes:
        alpha: weight of the adversarial map; 0.08 in the released code.
        beta: weight of the clean map; 0.05 in the released code.
        unit: what is normalised before the map is computed. `token`: every patch to unit length, so that the
            map is a cosine, as in the paper. `channel`: every dimension over the class token and all
            patches, as the released code does.
    """

    alpha: Annotated[float, Field(ge=0)] = 0.08
    beta: Annotated[float, Field(ge=0)] = 0.05
    unit: Literal["token", "channel"] = "token"

    teachers: ClassVar[tuple[str, ...]] = ("anchor",)

    def require(self, roles: Roles) -> None:
        """Student and original must have patch tokens."""
        with torch.no_grad():
            for role in ("student", "anchor"):
                roles.encoder(role).tokens(grey_image(roles.encoder(role), roles.text[role]))

    def passes(self) -> Passes:
        """The student on x and x', the original on x."""
        return Passes(2, {"anchor": 1})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Attention maps (B, H W) in [0, 1] of the original on the clean images, under `attention`."""
        tokens = roles.teachers["anchor"].tokens(batch.images)
        return {"attention": self._attention(roles, "anchor", tokens, batch.labels)}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """CE(Z_S(x'_i), y_i), (B,)."""
        del targets
        return lambda adv: ce(roles.logits("student", adv), batch.labels)

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The sum of the class docstring."""
        student, labels = roles.student, step.batch.labels
        adv, clean = in_one_forward(student, student.tokens, step.adv, step.batch.images)
        logits = student.logit_scale * roles.cosines("student", adv[:, 0])
        robust = ce(logits, labels).mean()
        there = step.targets["attention"]
        apart = [
            torch.linalg.vector_norm(self._attention(roles, "student", t, labels) - there, dim=1).mean()
            for t in (adv, clean)
        ]
        total = robust + self.alpha * apart[0] + self.beta * apart[1]
        parts = {"ce_adv": robust, "attention_adv": apart[0], "attention_clean": apart[1]}
        return Terms(total, {name: value.detach() for name, value in parts.items()})

    def loss_at_agreement(self, roles: Roles, batch: Batch) -> Tensor | float:
        """The cross-entropy: the attention maps are equal."""
        return ce(roles.logits("student", batch.images), batch.labels).mean()

    def _attention(self, roles: Roles, role: str, tokens: Tensor, labels: Tensor) -> Tensor:
        """A_M, (B, H W): products of patches and class text, scaled to [0, 1] per image, then resized."""
        over = 1 if self.unit == "channel" else 2
        unit = tokens / tokens.norm(dim=over, keepdim=True).clamp(min=TINY)
        score = (unit[:, 1:] @ roles.text[role][labels][:, :, None])[:, :, 0]
        low, high = score.amin(1, keepdim=True), score.amax(1, keepdim=True)
        score = (score - low) / (high - low).clamp(min=TINY)
        side = round(score.shape[1] ** 0.5)
        square = score.view(-1, 1, side, side)
        pixels = roles.student.image_size
        whole = F.interpolate(square, size=(pixels, pixels), mode="bilinear", align_corners=False)
        return whole.flatten(1)


plugin = TgaZsr
