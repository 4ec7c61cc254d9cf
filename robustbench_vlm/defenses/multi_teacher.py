"""Multi-teacher: any number of teachers with a softmax gate over their standardised confidences.

Source   our generalisation of the `paper` gate of `mmt-ard` (arXiv:2511.17448, abstract), whose sigmoid is
         the softmax over two teachers; no source states its equations. That some teachers may see another
         image than the student does is the privileged input of multi-teacher privileged distillation
         (arXiv:2408.09035, abstract), of which nothing else is taken.
Threat   any norm that `engine.geometry` knows.
Departs  privileged inputs of that paper are other modalities; here they are the clean image, while the
         student sees the adversarial one.
Symbols  x clean image, x' adversarial image, y label; S student, T_1 ... T_N teachers; u_t what teacher t
         sees, v_t what the student sees in its term; c_t = cos(e_t(u_t), W_t[y]).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from robustbench_vlm.defenses.interface import Defense, Passes, Roles, Step, Terms
from robustbench_vlm.defenses.losses import ce, kl, of_label, pooled, standardised, student_logits

if TYPE_CHECKING:
    from torch import Tensor

    from robustbench_vlm.types import Batch, Objective

Input = Literal["clean", "adv", "privileged"]
LABEL = "label"


def _two() -> dict[str, Input]:
    return {"robust": "adv", "clean": "clean"}


def _ten_to_one() -> dict[str, Annotated[float, Field(gt=0)]]:
    return {"robust": 10.0, "clean": 1.0}


@dataclass(frozen=True)
class MultiTeacher(Defense):
    """(1/B) sum_i sum_t w_it KL(P_t(u_ti) || P_S(v_ti)), w_i = softmax_t(ln weights_t + kappa z_ti).

    z_t is c_t minus its running mean, divided by its running deviation.

    Attributes:
        inputs: what teacher and student see in the term of each role, which also names the teachers.
            `adv`: both x'. `clean`: both x. `privileged`: the teacher x, the student x'.
        weights: of each role; the mean gate is near their shares.
        kappa: slope of the gate; 0 gives the constant shares.
        momentum: decay of the running means and variances of the confidences.
        attack_target: the prediction on x that the attack drives the student away from: a role of `inputs`,
            or `label` for cross-entropy with y.
    """

    inputs: dict[str, Input] = field(default_factory=_two)
    weights: dict[str, Annotated[float, Field(gt=0)]] = field(default_factory=_ten_to_one)
    kappa: float = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    attack_target: str = "clean"

    teachers: ClassVar[tuple[str, ...]] = ("robust", "clean")

    def __post_init__(self) -> None:
        if self.inputs.keys() != self.weights.keys() or len(self.inputs) < 2:
            found = f"inputs of {sorted(self.inputs)}, weights of {sorted(self.weights)}"
            raise ValueError(f"{found}: expected the same two or more roles")
        if {"student", LABEL} & self.inputs.keys():
            raise ValueError(f"no teacher may be called 'student' or {LABEL!r}")
        if self.attack_target not in (LABEL, *self.inputs):
            raise ValueError(
                f"attack_target = {self.attack_target!r}, expected {LABEL!r} or one of {sorted(self.inputs)}"
            )
        object.__setattr__(self, "teachers", tuple(self.inputs))

    def passes(self) -> Passes:
        """The student on what the terms need; every teacher on its input, and the attack's target on x."""
        seen = dict.fromkeys(self.inputs, 1)
        if self.inputs.get(self.attack_target) == "adv":
            seen[self.attack_target] = 2
        return Passes(len(self._seen()), seen)

    def targets(self, roles: Roles, batch: Batch) -> Mapping[str, Tensor]:
        """Cosines (B, C) on x of the teachers that see x and of the attack's target, by role."""
        on_x = [role for role, input_ in self.inputs.items() if input_ != "adv" or role == self.attack_target]
        return {role: roles.cosines(role, roles.teachers[role](batch.images)) for role in on_x}

    def inner(self, roles: Roles, batch: Batch, targets: Mapping[str, Tensor]) -> Objective:
        """KL(P_t(x_i) || P_S(x'_i)), (B,), of the attack's target; or cross-entropy with the label."""
        if self.attack_target == LABEL:
            return lambda adv: ce(roles.logits("student", adv), batch.labels)
        away = roles.teachers[self.attack_target].logit_scale * targets[self.attack_target]
        return lambda adv: kl(away, roles.logits("student", adv))

    def outer(self, roles: Roles, step: Step) -> Terms:
        """The sum of the class docstring; carries mean, variance and count of each teacher's confidence."""
        images = {"adv": step.adv, "clean": step.batch.images}
        seen = self._seen()
        student = dict(zip(seen, student_logits(roles, *(images[name] for name in seen)), strict=True))
        terms, scores, carry = [], [], {}
        for role, input_ in self.inputs.items():
            with torch.no_grad():
                on_adv = input_ == "adv"
                cosines = (
                    roles.cosines(role, roles.teachers[role](step.adv)) if on_adv else step.targets[role]
                )
                confidence = of_label(cosines, step.batch.labels)
                carry[role] = pooled(confidence, step.carry.get(role), self.momentum)
                score = standardised(confidence, carry[role])
                scores.append(self.kappa * score + score.new_tensor(self.weights[role]).log())
            view = "clean" if input_ == "clean" else "adv"
            terms.append(kl(roles.teachers[role].logit_scale * cosines, student[view]))
        gate = torch.stack(scores).softmax(dim=0)  # (N, B)
        total = (gate * torch.stack(terms)).sum(dim=0).mean()
        parts = {f"kl_{role}": term.mean().detach() for role, term in zip(self.inputs, terms, strict=True)}
        parts |= {f"gate_{role}": w.mean() for role, w in zip(self.inputs, gate, strict=True)}
        return Terms(total, parts, carry)

    def _seen(self) -> tuple[str, ...]:
        """What the student is run on: `adv`, `clean` or both."""
        needed = {"clean" if input_ == "clean" else "adv" for input_ in self.inputs.values()}
        return tuple(sorted(needed))


plugin = MultiTeacher
