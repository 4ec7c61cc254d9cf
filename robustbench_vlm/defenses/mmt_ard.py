"""MMT-ARD: multimodal multi-teacher adversarial robust distillation from a clean and a robust teacher.

Source   Li, Dong, Yang, Wen, Koniusz, Huang, Tian, Ong 2025, arXiv:2511.17448. Read: the abstract and the
         released code. Not read: the full text. Abstract and code disagree: the code has fixed constants 50
         and 5, weights that rise with confidence, and no sigmoid. So `weighting` names a version:
         `released`  the loss of the code, term by term.
         `paper`     our derivation from the abstract: a sigmoid gate between the teachers and a focus on
                     hard samples. It starts from the identity
                     50 c_R KL_adv + 5 c_K KL_cln = h (w KL_adv + (1 - w) KL_cln) with
                     w = sigmoid(ln 10 + ln c_R - ln c_K), h = 50 c_R + 5 c_K,
                     by which the released weights already are such a gate.
         `full`      `paper` in both directions, image to text and text to image, with a second gate between
                     them ("sigmoid-based weighting across modalities") and an optional consistency term.
                     All of it is our derivation; no source states its equations.
         `static`    the fixed 10:1 mix, about which the released weights vary.
Threat   any norm that `engine.geometry` knows.
Departs  the released code runs a third teacher that does not enter its loss; it is left out. It fixes s = 100
         for every model, and here each model has its own logit scale; OpenAI's weights have 100. The student
         runs on x and x' in one forward, or, where batch norms make rows depend on each other, on x and then
         on x', as released.
Symbols  x clean image, x' adversarial image, y label; S student, R robust teacher, K clean teacher (C counts
         classes); c_R = cos(e_R(x'), W_R[y]), c_K = cos(e_K(x), W_K[y]);
         q_R = P_R(x')[y], the softmax confidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustbench_vlm.defenses import losses
from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import ce, kl, kl_terms, of_label, pooled, student_logits

if TYPE_CHECKING:
    from robustbench_vlm.types import Batch, Objective

FLOOR = 0.01  # the `log` gap raises cosines to this value, since negative numbers have no logarithm


@dataclass(frozen=True)
class _Outputs:
    """Model outputs of one step: logits (B, C) and cosines with the own class (B,), by the symbols above.

    Attributes:
        labels: (B,) int64, y.
        robust, c_robust: of the robust teacher, without gradient.
        clean, c_clean: of the clean teacher on x, without gradient.
        student_adv, student_clean: logits of the student on x' and x.
        kl_adv, kl_clean: (B,) divergence of the student from each teacher.
    """

    labels: Tensor
    robust: Tensor
    c_robust: Tensor
    clean: Tensor
    c_clean: Tensor
    student_adv: Tensor
    student_clean: Tensor
    kl_adv: Tensor = field(init=False)
    kl_clean: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kl_adv", kl(self.robust, self.student_adv))
        object.__setattr__(self, "kl_clean", kl(self.clean, self.student_clean))


@dataclass(frozen=True)
class MmtArd(Defense):
    """Divergences from two teachers, each run on the input it is good at, weighted per sample by confidence.

    Attributes:
        weighting: `released`, `paper` (gate and focus below), `full` (that in both directions) or `static`.
        robust_weight: factor of the term of the robust teacher; 50 in the released code.
        clean_weight: factor of the term of the clean teacher; 5 in the released code. 0, with `static`,
            removes the term: the clean teacher is then run for the attack only, or not at all with another
            `attack_target`.
        clean_weight_end: `clean_weight` at the end of the training, to which it goes geometrically, step by
            step; without it, the weight is constant.
        gap: what the gate of `paper` compares. `standardised`: the cosine confidence of each teacher minus
            its running mean, divided by its running deviation, which removes a constant bias of a teacher.
            `softmax`: the same with softmax confidences. `log`: the difference of log-cosines, which is
            exactly the released gate. `robust`: the standardised cosine confidence of the robust teacher
            alone, on x' unless `robust_input` says otherwise: the gate turns to the clean teacher where the
            attack misleads the robust one.
        kappa: slope of the gate; 0 gives the constant mix robust_weight : clean_weight.
        focus: factor of each sample in `paper`, of mean 1. `none`: 1. `hard`: (1 - q_R)^gamma, one form of
            the abstract's "focus on harder samples"; on the tiny world it costs most of the robustness, since
            samples that the robust teacher gets wrong then weigh most. `linear`: 1 + focus_weight (1 - q_R),
            a form in which easy samples keep their weight. `student`: (1 - q_S)^gamma with the confidence of
            the student on x'. `confident`: growing with confidence, as released.
        gamma: exponent of the `hard` and `student` focus, and of the share of `hard_target`.
        focus_weight: slope of the `linear` focus.
        hard_target: what replaces the target P_R(x') by the share (1 - q_R)^gamma, large where the robust
            teacher is fooled; for `static` and `paper`. `none`: nothing. `label`: the label y. `clean`:
            P_K(x).
        momentum: decay of the running means: of confidences and their variances, and of the losses of
            `full`. The first 1 / (1 - momentum) batches weigh equally in the confidences.
        text_scale: for `full`: logit scale in the direction text to image, one class over the batch's images;
            without it, each model's own.
        kappa_modality: for `full`: slope of the gate between the directions; 0 gives each one half.
        consistency: for `full`: weight of KL(sg P_S(x) || P_S(x')).
        attack_target: the prediction that the attack drives the student away from: `clean`, P_K(x), as
            released; `robust`, P_R(x); `label`, y, by cross-entropy.
        robust_input: the images that the robust teacher of the loss is run on: `adv`, x', as released;
            `clean`, x.
    """

    weighting: Literal["paper", "full", "released", "static"] = "released"
    robust_weight: Annotated[float, Field(gt=0)] = 50.0
    clean_weight: Annotated[float, Field(ge=0)] = 5.0
    clean_weight_end: Annotated[float, Field(gt=0)] | None = None
    gap: Literal["standardised", "softmax", "log", "robust"] = "standardised"
    kappa: float = 1.0
    focus: Literal["hard", "linear", "student", "confident", "none"] = "none"
    gamma: Annotated[float, Field(ge=0)] = 1.0
    focus_weight: Annotated[float, Field(ge=0)] = 1.0
    hard_target: Literal["none", "label", "clean"] = "none"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    text_scale: Annotated[float, Field(gt=0)] | None = None
    kappa_modality: Annotated[float, Field(ge=0)] = 5.0
    consistency: Annotated[float, Field(ge=0)] = 0.0
    attack_target: Literal["clean", "robust", "label"] = "clean"
    robust_input: Literal["adv", "clean"] = "adv"

    teachers: ClassVar[tuple[str, ...]] = ("robust", "clean")

    def __post_init__(self) -> None:
        if self.clean_weight == 0 and self.weighting != "static":
            raise ValueError(f"clean_weight = 0 goes with weighting 'static' alone, not {self.weighting!r}")
        if self.clean_weight == 0 and self.clean_weight_end is not None:
            raise ValueError(f"clean_weight_end = {self.clean_weight_end:g} needs a clean_weight above 0")
        if self.hard_target != "none" and (self.weighting in ("released", "full") or not self.clean_weight):
            found = f"weighting {self.weighting!r} and clean_weight = {self.clean_weight:g}"
            raise ValueError(
                f"hard_target = {self.hard_target!r} goes with weighting 'static' or 'paper' and a "
                f"clean_weight above 0, not {found}"
            )
        if unread := self._unread():
            found = f"weighting {self.weighting!r}, gap {self.gap!r}, focus {self.focus!r}"
            raise ValueError(f"{unread[0]} = {getattr(self, unread[0])!r} would go unread with {found}")
        if self.clean_weight == 0 and self.attack_target != "clean":  # the clean teacher has no use
            object.__setattr__(self, "teachers", ("robust",))

    def _unread(self) -> list[str]:
        """Fields that differ from their defaults and that nothing reads, with the choices of the others."""
        full, gated = self.weighting == "full", self.weighting in ("full", "paper")
        reads = (
            (gated, ("gap", "kappa", "focus")),
            (full, ("text_scale", "kappa_modality", "consistency")),
            (full or (gated and self.gap != "log"), ("momentum",)),
            (self.hard_target != "none" or self.focus in ("hard", "student"), ("gamma",)),
            (self.focus == "linear", ("focus_weight",)),
        )
        unread = [name for is_read, names in reads if not is_read for name in names]
        return [name for name in unread if getattr(self, name) != getattr(type(self), name)]

    def passes(self) -> Passes:
        """The student on x', and on x with a clean term; the teachers as loss and attack need them."""
        on_x = self.attack_target == "robust" or self.robust_input == "clean"
        robust = on_x + (self.robust_input == "adv")
        clean = {"clean": 1} if "clean" in self.teachers else {}
        return Passes(2 if self.clean_weight else 1, {"robust": robust, **clean})

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Teachers on x: logits Z_K and, where it is used, Z_R (B, C), with cosines c_K, c_R (B,)."""
        on_x = self.attack_target == "robust" or self.robust_input == "clean"
        found: dict[str, Tensor] = {}
        for role in ("clean", *(("robust",) if on_x else ())):
            if role in self.teachers:
                cosines = roles.cosines(role, roles.teachers[role](batch.images))
                found[role] = roles.teachers[role].logit_scale * cosines
                found[f"c_{role}"] = of_label(cosines, batch.labels)
        return found

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """KL(P_K(x_i) || P_S(x'_i)), (B,); or the same of another `attack_target`."""
        if self.attack_target == "label":
            return lambda adv: ce(roles.logits("student", adv), batch.labels)
        return lambda adv: kl(targets[self.attack_target], roles.logits("student", adv))

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The weighted sum of KL(P_R(x') || P_S(x')) and KL(P_K(x) || P_S(x)), by `weighting`."""
        if self.clean_weight_end is not None:
            weight = self.clean_weight * (self.clean_weight_end / self.clean_weight) ** step.progress
            terms = replace(self, clean_weight=weight, clean_weight_end=None).outer(roles, step)
            return replace(terms, parts={**terms.parts, "clean_weight": terms.total.new_tensor(weight)})
        robust, c_robust = self._robust(roles, step)
        if self.clean_weight == 0:
            loss = kl(robust, roles.logits("student", step.adv)).mean()
            return Terms(loss, {"kl_adv": loss.detach(), "c_robust": c_robust.mean()})
        adv, clean = self._student(roles, step)
        found = _Outputs(
            step.batch.labels, robust, c_robust, step.targets["clean"], step.targets["c_clean"], adv, clean
        )
        parts = {name: getattr(found, name).mean() for name in ("kl_adv", "kl_clean", "c_robust", "c_clean")}
        carry: Mapping[str, Tensor] = {}
        if self.weighting == "released":
            total, more = self._released(found)
        elif self.weighting == "static":
            w = self.robust_weight / (self.robust_weight + self.clean_weight)
            total, more = (w * self._adversarial(found) + (1 - w) * found.kl_clean).mean(), {}
        else:
            total, more, carry = self._gated(found, step.carry)
            if self.weighting == "full":
                total, both, means = self._full(roles, found, total, more["gate"], step.carry)
                more, carry = more | both, {**carry, **means}
        return Terms(total, {name: value.detach() for name, value in (parts | more).items()}, carry)

    def _student(self, roles: Roles, step: Step) -> tuple[Tensor, Tensor]:
        """Logits (B, C) of the student on x' and on x; batch norms in train mode see x first."""
        if roles.student.rows_apart:
            adv, clean = student_logits(roles, step.adv, step.batch.images)
        else:
            clean, adv = student_logits(roles, step.batch.images, step.adv)
        return adv, clean

    def _adversarial(self, found: _Outputs) -> Tensor:
        """(B,) the term on x': KL(P_R(x') || P_S(x')), or a mixture with the term of `hard_target`."""
        if self.hard_target == "none":
            return found.kl_adv
        doubt = (1 - of_label(found.robust.softmax(dim=-1), found.labels)).clamp(min=0).pow(self.gamma)
        to_label = self.hard_target == "label"
        other = ce(found.student_adv, found.labels) if to_label else kl(found.clean, found.student_adv)
        return (1 - doubt) * found.kl_adv + doubt * other

    def loss_at_agreement(self, roles: Roles, batch: Batch) -> Tensor | float:
        """0, or with the target `label` its share of the cross-entropy."""
        if self.hard_target != "label":
            return 0.0
        logits = roles.logits("student", batch.images)
        q = of_label(logits.softmax(dim=-1), batch.labels)
        cosines = of_label(logits, batch.labels) / roles.student.logit_scale
        h_i = self._focus(cosines, cosines, q) if self.weighting == "paper" else torch.ones_like(q)
        w = self.robust_weight / (self.robust_weight + self.clean_weight)
        return (h_i * w * (1 - q).pow(self.gamma) * ce(logits, batch.labels)).mean()

    def _released(self, found: _Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the released code, and the share of samples with a negative cosine."""
        terms = self.robust_weight * found.c_robust[:, None] * kl_terms(found.robust, found.student_adv)
        terms = terms + self.clean_weight * found.c_clean[:, None] * kl_terms(
            found.clean, found.student_clean
        )
        # Cosines enter unclamped, as released. A negative one reverses the sign of its divergence.
        negative = ((found.c_robust < 0) | (found.c_clean < 0)).float().mean()
        return terms.mean(), {"negative_cosines": negative}  # over batch *and* classes, as released

    def _gated(
        self, found: _Outputs, carry: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], Mapping[str, Tensor]]:
        """The loss of `paper`, the mean gate, and the running statistics of the confidences."""
        q_robust, q_clean, q_student = (
            of_label(logits.detach().softmax(dim=-1), found.labels)
            for logits in (found.robust, found.clean, found.student_adv)
        )
        pair = (q_robust, q_clean) if self.gap == "softmax" else (found.c_robust, found.c_clean)
        gap, running = self._gap(*pair, carry)
        w_i = torch.sigmoid(math.log(self.robust_weight / self.clean_weight) + self.kappa * gap)
        focused = q_student if self.focus == "student" else q_robust
        h_i = self._focus(found.c_robust, found.c_clean, focused)
        loss = (h_i * (w_i * self._adversarial(found) + (1 - w_i) * found.kl_clean)).mean()
        return loss, {"gate": w_i.mean()}, running

    def _full(
        self, roles: Roles, found: _Outputs, i2t: Tensor, gate: Tensor, carry: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], Mapping[str, Tensor]]:
        """The loss of `full` from the image-to-text loss of `paper`, its parts, and the running losses."""
        t2i_adv = self._text_to_image(roles, "robust", found.robust, found.student_adv, found.labels)
        t2i_clean = self._text_to_image(roles, "clean", found.clean, found.student_clean, found.labels)
        t2i = gate * t2i_adv + (1 - gate) * t2i_clean
        beta, means = self._modality(i2t, t2i, carry)
        consistency = kl(found.student_clean.detach(), found.student_adv).mean()
        parts = {"i2t": i2t, "t2i": t2i, "modality": beta, "kl_self": consistency}
        return 2 * (beta * i2t + (1 - beta) * t2i) + self.consistency * consistency, parts, means

    def _robust(self, roles: Roles, step: Step) -> tuple[Tensor, Tensor]:
        """The robust teacher on its input: logits Z_R (B, C) and cosines c_R (B,), without gradient."""
        if self.robust_input == "clean":
            return step.targets["robust"], step.targets["c_robust"]
        with torch.no_grad():
            cosines = roles.cosines("robust", roles.teachers["robust"](step.adv))
            return roles.teachers["robust"].logit_scale * cosines, of_label(cosines, step.batch.labels)

    def _text_to_image(
        self, roles: Roles, role: str, teacher: Tensor, student: Tensor, labels: Tensor
    ) -> Tensor:
        """KL between softmaxes over the images of the batch, a scalar: the mean over the batch's classes.

        Logits (B, C) of `role` and of the student are rescaled from their own logit scale to `text_scale`,
        if there is one.
        """
        present = torch.unique(labels)
        scores = []
        for name, logits in ((role, teacher), ("student", student)):
            own = roles.encoder(name).logit_scale
            scores.append((self.text_scale or own) / own * logits[:, present].T)
        return kl(scores[0], scores[1]).mean()

    def _modality(
        self, i2t: Tensor, t2i: Tensor, carry: Mapping[str, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Beta in (0, 1), the share of image to text, and the running losses, each as (first, mean).

        A direction gets the larger share while its running mean, divided by its first value, is larger.
        """
        running, left = {}, []
        for name, loss in (("i2t", i2t.detach()), ("t2i", t2i.detach())):
            first, mean = carry.get(name, torch.stack([loss, loss]))
            running[name] = torch.stack([first, self.momentum * mean + (1 - self.momentum) * loss])
            left.append(running[name][1] / first.clamp(min=losses.LEAST))
        return torch.sigmoid(self.kappa_modality * (left[0] - left[1])), running

    def _gap(
        self, c_robust: Tensor, c_clean: Tensor, carry: Mapping[str, Tensor]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """g_i, (B,): by how much the robust teacher is more confident; and the running statistics used."""
        if self.gap == "log":
            return c_robust.clamp(min=FLOOR).log() - c_clean.clamp(min=FLOOR).log(), {}
        running = {}
        scores = {}
        compared = {"robust": c_robust} if self.gap == "robust" else {"robust": c_robust, "clean": c_clean}
        for role, confidence in compared.items():
            running[role] = pooled(confidence, carry.get(role), self.momentum)
            scores[role] = losses.standardised(confidence, running[role])
        return scores["robust"] - scores.get("clean", torch.zeros_like(c_clean)), running

    def _focus(self, c_robust: Tensor, c_clean: Tensor, confidence: Tensor) -> Tensor:
        """h_i, (B,), of mean 1 over the batch; all but `confident` use `confidence`, (B,) in [0, 1]."""
        if self.focus == "none":
            return torch.ones_like(confidence)
        if self.focus in ("hard", "student"):
            raw = (1 - confidence).clamp(min=losses.LEAST).pow(self.gamma)
        elif self.focus == "linear":
            raw = 1 + self.focus_weight * (1 - confidence)
        else:
            ratio = self.clean_weight / self.robust_weight
            raw = c_robust.clamp(min=FLOOR) + ratio * c_clean.clamp(min=FLOOR)
        return raw / raw.mean()


plugin = MmtArd
