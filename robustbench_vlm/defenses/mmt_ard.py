"""MMT-ARD: multimodal multi-teacher adversarial robust distillation from a clean and a robust teacher.

Source   Li, Dong, Yang, Wen, Koniusz, Huang, Tian, Ong 2025, arXiv:2511.17448. Read: the abstract and the
         released code. Not read: the full text. The two disagree (the code has fixed constants 50 and 5,
         weights that rise with confidence, and no sigmoid), so the weighting has a name:
         `released`  what the code computes, term by term.
         `paper`     our derivation from the abstract: a sigmoid gate between the teachers and a focus on
                     hard samples. It rests on the identity
                     50 c_R KL_adv + 5 c_K KL_cln = h (w KL_adv + (1 - w) KL_cln) with
                     w = sigmoid(ln 10 + ln c_R - ln c_K), h = 50 c_R + 5 c_K,
                     so the released weights already are such a gate.
         `full`      `paper` in both directions, image to text and text to image, with a second gate between
                     them ("sigmoid-based weighting across modalities") and an optional consistency term.
                     All of it is our derivation; no source has its equations.
         `static`    the fixed 10:1 mix that the released weights hover around.
Threat   any norm that `attacks.geometry` knows.
Departs  the released code runs a third teacher that never enters its loss; it is left out.
Symbols  x clean image, x' adversarial image, y label; S student, R robust teacher, K clean teacher;
         c_R = cos(e_R(x'), W_R[y]), c_K = cos(e_K(x), W_K[y]); q_R = P_R(x')[y], the softmax confidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustbench_vlm.defenses.losses import at_once, kl, kl_terms, of_label
from robustbench_vlm.types import Passes, Terms

if TYPE_CHECKING:
    from robustbench_vlm.types import Batch, Objective, Roles, Step

FLOOR = 0.01  # cosines below it count as 0.01 in the `log` gap, which has no logarithm of a negative number
TINY = 1e-6  # keeps a standardised confidence finite when a batch has no spread


@dataclass(frozen=True)
class MmtArd:
    """Two teachers, each on the input it is good at, weighed per sample by their confidence.

    Attributes:
        weighting: `released`, `paper` (gate and focus below), `full` (that in both directions) or `static`.
        robust_weight: factor of the robust teacher's term; 50 in the released code.
        clean_weight: factor of the clean teacher's term; 5 in the released code.
        gap: what the gate compares, for `paper`: `standardised`, each teacher's cosine confidence minus its
            running mean, over its running deviation (removes a teacher's constant bias); `log`, the
            difference of log-cosines, which is the released gate exactly.
        kappa: slope of the gate; 0 leaves the constant mix robust_weight : clean_weight.
        focus: per-sample factor of mean 1, for `paper`: `none`; `hard`, (1 - q_R)^gamma, the "focus on harder
            samples" of the abstract, which on the tiny world costs most of the robustness: the samples that
            the robust teacher gets wrong then lead; `confident`, the released direction.
        gamma: exponent of the `hard` focus.
        momentum: decay of the running mean and deviation of the confidences, and of the losses of `full`.
        text_scale: for `full`: s_t of the logits of one class over the images of the batch.
        kappa_modality: for `full`: slope of the gate between the directions; 0 leaves both at one half.
        consistency: for `full`: weight of KL(sg P_S(x) || P_S(x')).
    """

    weighting: Literal["paper", "full", "released", "static"] = "released"
    robust_weight: Annotated[float, Field(gt=0)] = 50.0
    clean_weight: Annotated[float, Field(gt=0)] = 5.0
    gap: Literal["standardised", "log"] = "standardised"
    kappa: float = 1.0
    focus: Literal["hard", "confident", "none"] = "none"
    gamma: Annotated[float, Field(ge=0)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    text_scale: Annotated[float, Field(gt=0)] = 100.0
    kappa_modality: Annotated[float, Field(ge=0)] = 5.0
    consistency: Annotated[float, Field(ge=0)] = 0.0

    teachers: ClassVar[tuple[str, ...]] = ("robust", "clean")
    needs_text: ClassVar[bool] = True
    adversarial: ClassVar[bool] = True

    def passes(self) -> Passes:
        """The student on x and x', the robust teacher on x', the clean one on x."""
        return Passes(2, {"robust": 1, "clean": 1})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """The clean teacher on x: {"clean": logits Z_K (B, C), "c_clean": cosines c_K (B,)}."""
        cosines = roles.cosines("clean", roles.teachers["clean"](batch.images))
        scale = roles.teachers["clean"].logit_scale
        return {"clean": scale * cosines, "c_clean": of_label(cosines, batch.labels)}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """KL(P_K(x_i) || P_S(x'_i)), (B,), for the adversary to maximise; no label is used."""
        del batch
        return lambda adv: kl(targets["clean"], roles.logits("student", adv))

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The weighted sum of KL(P_R(x') || P_S(x')) and KL(P_K(x) || P_S(x)); see the module's sources."""
        labels = step.batch.labels
        with torch.no_grad():
            cosines = roles.cosines("robust", roles.teachers["robust"](step.adv))
            robust = roles.teachers["robust"].logit_scale * cosines
            c_robust, c_clean = of_label(cosines, labels), step.targets["c_clean"]
            q_robust = of_label(robust.softmax(dim=-1), labels)
        student_adv, student_clean = at_once(
            roles.student, lambda x: roles.logits("student", x), step.adv, step.batch.images
        )
        kl_adv, kl_clean = kl(robust, student_adv), kl(step.targets["clean"], student_clean)
        parts = {
            "kl_adv": kl_adv.mean(),
            "kl_clean": kl_clean.mean(),
            "c_robust": c_robust.mean(),
            "c_clean": c_clean.mean(),
        }
        carry: Mapping[str, Tensor] = {}

        if self.weighting == "released":
            terms = self.robust_weight * c_robust[:, None] * kl_terms(robust, student_adv)
            terms = terms + self.clean_weight * c_clean[:, None] * kl_terms(
                step.targets["clean"], student_clean
            )
            total = terms.mean()  # over batch *and* classes, as released
            # Raw cosines as released: a negative one turns its divergence round, so its share is logged.
            parts["negative_cosines"] = ((c_robust < 0) | (c_clean < 0)).float().mean()
        elif self.weighting == "static":
            w = self.robust_weight / (self.robust_weight + self.clean_weight)
            total = (w * kl_adv + (1 - w) * kl_clean).mean()
        else:
            gap, carry = self._gap(c_robust, c_clean, step.carry)
            w_i = torch.sigmoid(math.log(self.robust_weight / self.clean_weight) + self.kappa * gap)
            h_i = self._focus(c_robust, c_clean, q_robust)
            total = (h_i * (w_i * kl_adv + (1 - w_i) * kl_clean)).mean()
            parts["gate"] = w_i.mean()
            if self.weighting == "full":
                back_adv = self._back(roles, "robust", robust, student_adv, labels)
                back_clean = self._back(roles, "clean", step.targets["clean"], student_clean, labels)
                back = w_i.mean() * back_adv + (1 - w_i.mean()) * back_clean
                beta, losses = self._modality(total, back, step.carry)
                itself = kl(student_clean.detach(), student_adv).mean()
                parts |= {"i2t": total, "t2i": back, "modality": beta, "kl_self": itself}
                total = 2 * (beta * total + (1 - beta) * back) + self.consistency * itself
                carry = {**carry, **losses}
        return Terms(total, {name: value.detach() for name, value in parts.items()}, carry)

    def _back(self, roles: Roles, role: str, teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
        """Text to image: mean over the batch's classes of KL between softmaxes over its images, a scalar.

        Logits (B, C) of `role` and of the student are brought from their own scale to `text_scale`.
        """
        present = torch.unique(labels)
        scores = [
            self.text_scale / roles.encoder(name).logit_scale * logits[:, present].T
            for name, logits in ((role, teacher), ("student", student))
        ]
        return kl(scores[0], scores[1]).mean()

    def _modality(
        self, i2t: Tensor, t2i: Tensor, carry: Mapping[str, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """beta, the share of image to text, in (0, 1): larger while that direction has learned less.

        Each loss's running mean over its first value is what is left of it; carried as (first, mean).
        """
        running, left = {}, []
        for name, loss in (("i2t", i2t.detach()), ("t2i", t2i.detach())):
            first, mean = carry.get(name, torch.stack([loss, loss]))
            running[name] = torch.stack([first, self.momentum * mean + (1 - self.momentum) * loss])
            left.append(running[name][1] / first.clamp(min=TINY))
        return torch.sigmoid(self.kappa_modality * (left[0] - left[1])), running

    def _gap(
        self, c_robust: Tensor, c_clean: Tensor, carry: Mapping[str, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """g_i, (B,): how much more confident the robust teacher is; and the running statistics it used."""
        if self.gap == "log":
            return c_robust.clamp(min=FLOOR).log() - c_clean.clamp(min=FLOOR).log(), {}
        running = {}
        scores = {}
        for role, confidence in (("robust", c_robust), ("clean", c_clean)):
            now = torch.stack([confidence.mean(), confidence.std(correction=0)])
            before = carry.get(role, now)  # the first batch starts the average
            running[role] = self.momentum * before + (1 - self.momentum) * now
            scores[role] = (confidence - running[role][0]) / running[role][1].clamp(min=TINY)
        return scores["robust"] - scores["clean"], running

    def _focus(self, c_robust: Tensor, c_clean: Tensor, q_robust: Tensor) -> Tensor:
        """h_i, (B,), of mean 1 over the batch."""
        if self.focus == "none":
            return torch.ones_like(q_robust)
        if self.focus == "hard":
            raw = (1 - q_robust).clamp(min=TINY).pow(self.gamma)
        else:
            ratio = self.clean_weight / self.robust_weight
            raw = c_robust.clamp(min=FLOOR) + ratio * c_clean.clamp(min=FLOOR)
        return raw / raw.mean()


plugin = MmtArd
