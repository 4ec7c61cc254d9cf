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

from robustbench_vlm.defenses.losses import at_once, ce, kl, kl_terms, of_label
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
        clean_weight: factor of the clean teacher's term; 5 in the released code. 0, with `static`, leaves it
            out: the clean teacher then runs for the attack only, or, with another target, not at all.
        gap: what the gate compares, for `paper`: `standardised`, each teacher's cosine confidence minus its
            running mean, over its running deviation (removes a teacher's constant bias); `softmax`, the same
            with softmax confidences; `log`, the difference of log-cosines: the released gate exactly.
        kappa: slope of the gate; 0 leaves the constant mix robust_weight : clean_weight.
        focus: per-sample factor of mean 1, for `paper`: `none`; `hard`, (1 - q_R)^gamma, the "focus on harder
            samples" of the abstract, which on the tiny world costs most of the robustness: the samples that
            the robust teacher gets wrong then lead; `student`, (1 - q_S)^gamma with the student's own
            confidence on x'; `confident`, the released direction.
        gamma: exponent of the `hard` and `student` focus.
        momentum: decay of the running mean and deviation of the confidences, and of the losses of `full`.
        text_scale: for `full`: s_t of the logits of one class over the images of the batch.
        kappa_modality: for `full`: slope of the gate between the directions; 0 leaves both at one half.
        consistency: for `full`: weight of KL(sg P_S(x) || P_S(x')).
        attack_target: whom the attack drives the student away from: `clean`, P_K(x), as released; `robust`,
            P_R(x); `label`, y, by cross-entropy.
        robust_input: what the robust teacher sees: `adv`, x', as released; `clean`, x.
    """

    weighting: Literal["paper", "full", "released", "static"] = "released"
    robust_weight: Annotated[float, Field(gt=0)] = 50.0
    clean_weight: Annotated[float, Field(ge=0)] = 5.0
    gap: Literal["standardised", "softmax", "log"] = "standardised"
    kappa: float = 1.0
    focus: Literal["hard", "student", "confident", "none"] = "none"
    gamma: Annotated[float, Field(ge=0)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    text_scale: Annotated[float, Field(gt=0)] = 100.0
    kappa_modality: Annotated[float, Field(ge=0)] = 5.0
    consistency: Annotated[float, Field(ge=0)] = 0.0
    attack_target: Literal["clean", "robust", "label"] = "clean"
    robust_input: Literal["adv", "clean"] = "adv"

    teachers: ClassVar[tuple[str, ...]] = ("robust", "clean")
    needs_text: ClassVar[bool] = True
    adversarial: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.clean_weight == 0 and self.weighting != "static":
            raise ValueError(f"clean_weight = 0 goes with weighting 'static' alone, not {self.weighting!r}")
        if self.clean_weight == 0 and self.attack_target != "clean":  # what changes nothing is not asked for
            object.__setattr__(self, "teachers", ("robust",))

    def passes(self) -> Passes:
        """The student on x' and, with a clean term, x; the teachers on what the loss and the attack need."""
        on_x = self.attack_target == "robust" or self.robust_input == "clean"
        robust = on_x + (self.robust_input == "adv")
        clean = {"clean": 1} if "clean" in self.teachers else {}
        return Passes(2 if self.clean_weight else 1, {"robust": robust, **clean})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Teachers on x: logits Z_K and, if it is asked, Z_R (B, C), with their cosines c_K, c_R (B,)."""
        on_x = self.attack_target == "robust" or self.robust_input == "clean"
        said: dict[str, Tensor] = {}
        for role in ("clean", *(("robust",) if on_x else ())):
            if role in self.teachers:
                cosines = roles.cosines(role, roles.teachers[role](batch.images))
                said[role] = roles.teachers[role].logit_scale * cosines
                said[f"c_{role}"] = of_label(cosines, batch.labels)
        return said

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """KL(P_K(x_i) || P_S(x'_i)), (B,), for the adversary to maximise; or another target's."""
        if self.attack_target == "label":
            return lambda adv: ce(roles.logits("student", adv), batch.labels)
        return lambda adv: kl(targets[self.attack_target], roles.logits("student", adv))

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The weighted sum of KL(P_R(x') || P_S(x')) and KL(P_K(x) || P_S(x)); see the module's sources."""
        labels = step.batch.labels
        robust, c_robust = self._robust(roles, step)
        if self.clean_weight == 0:
            loss = kl(robust, roles.logits("student", step.adv)).mean()
            return Terms(loss, {"kl_adv": loss.detach(), "c_robust": c_robust.mean()})
        c_clean = step.targets["c_clean"]
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
            q_robust, q_clean, q_student = (
                of_label(logits.detach().softmax(dim=-1), labels)
                for logits in (robust, step.targets["clean"], student_adv)
            )
            sure = (q_robust, q_clean) if self.gap == "softmax" else (c_robust, c_clean)
            gap, carry = self._gap(*sure, step.carry)
            w_i = torch.sigmoid(math.log(self.robust_weight / self.clean_weight) + self.kappa * gap)
            h_i = self._focus(c_robust, c_clean, q_student if self.focus == "student" else q_robust)
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

    def _robust(self, roles: Roles, step: Step) -> tuple[Tensor, Tensor]:
        """The robust teacher on its input: logits Z_R (B, C) and cosines c_R (B,), without gradient."""
        if self.robust_input == "clean":
            return step.targets["robust"], step.targets["c_robust"]
        with torch.no_grad():
            cosines = roles.cosines("robust", roles.teachers["robust"](step.adv))
            return roles.teachers["robust"].logit_scale * cosines, of_label(cosines, step.batch.labels)

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

    def _focus(self, c_robust: Tensor, c_clean: Tensor, sure: Tensor) -> Tensor:
        """h_i, (B,), of mean 1 over the batch; `sure` is the confidence that `hard` and `student` look at."""
        if self.focus == "none":
            return torch.ones_like(sure)
        if self.focus in ("hard", "student"):
            raw = (1 - sure).clamp(min=TINY).pow(self.gamma)
        else:
            ratio = self.clean_weight / self.robust_weight
            raw = c_robust.clamp(min=FLOOR) + ratio * c_clean.clamp(min=FLOOR)
        return raw / raw.mean()


plugin = MmtArd
