"""TGA-ZSR: TeCoA with the text-guided attention of clean and adversarial images held to the original's.

Source   Yu et al. 2024, arXiv:2410.21802, and its released code (TGA-ZSR.py, attention_map.py).
Threat   any norm that `attacks.geometry` knows; the released attack is cross-entropy, K = 2, student in train
         mode (`[inner] mode = "train"`).
Departs  the released code runs x' twice, once for the logits and once for the map; here the class token of
         the map's forward gives the logits.
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

from robustbench_vlm.defenses.losses import TINY, at_once, ce, grey
from robustbench_vlm.types import Passes, Terms

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective, Roles, Step


@dataclass(frozen=True)
class TgaZsr:
    """CE(x') + alpha mean_i |A_S(x'_i) - A_0(x_i)| + beta mean_i |A_S(x_i) - A_0(x_i)|, L2 norms.

    Attributes:
        alpha: weight of the adversarial map; 0.08 in the released code.
        beta: weight of the clean map; 0.05 in the released code.
        unit: what is normalised before the map is taken. `token`, every patch to unit length, so the map is
            a cosine, as is meant; `channel`, every dimension over the class token and all patches, which is
            what the released code does.
    """

    alpha: Annotated[float, Field(ge=0)] = 0.08
    beta: Annotated[float, Field(ge=0)] = 0.05
    unit: Literal["token", "channel"] = "token"

    teachers: ClassVar[tuple[str, ...]] = ("anchor",)
    needs_text: ClassVar[bool] = True
    adversarial: ClassVar[bool] = True

    def require(self, roles: Roles) -> None:
        """Both towers have patch tokens."""
        with torch.no_grad():
            for role in ("student", "anchor"):
                roles.encoder(role).tokens(grey(roles.encoder(role), roles.text[role]))

    def passes(self) -> Passes:
        """The student on x and x', the original on x."""
        return Passes(2, {"anchor": 1})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """The original's attention on the clean images: {"attention": (B, H W) in [0, 1]}."""
        tokens = roles.teachers["anchor"].tokens(batch.images)
        return {"attention": self._attention(roles, "anchor", tokens, batch.labels)}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """CE(Z_S(x'_i), y_i), (B,), for the adversary to maximise."""
        del targets
        return lambda adv: ce(roles.logits("student", adv), batch.labels)

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The three terms of the class."""
        student, labels = roles.student, step.batch.labels
        adv, clean = at_once(student, student.tokens, step.adv, step.batch.images)
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

    def _attention(self, roles: Roles, role: str, tokens: Tensor, labels: Tensor) -> Tensor:
        """A_M, (B, H W): patch by text of the own class, to [0, 1] per image, bilinear to the pixels."""
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
