"""TODO: one line that says what this attack does; `vlmrob list attacks` prints the title of its chain.

TODO: paper, algorithm and equation. This template is gradient ascent with heavy-ball momentum from the image.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustbench_vlm.attacks.pgd import PgdState, advanced, begin, evaluate, step_length
from robustbench_vlm.engine import geometry, losses
from robustbench_vlm.engine.interface import Attack, Rows
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.threat import Threat


@dataclass(frozen=True)
class MyAttackState(PgdState):
    """The rows of the attack: what `PgdState` holds, and what this attack adds.

    Attributes:
        velocity: (S, 3, H, W) decayed sum of the gradients so far. S is the number of rows, one image a row.
    """

    velocity: Tensor


@dataclass(frozen=True)
class MyAttack(Attack):
    """Gradient ascent with momentum, without a target class; the last iterate is judged.

    Attributes:
        loss: what is maximised, a name of `engine.losses.LOSSES` that aims at no class, such as `ce`.
        steps: gradient steps, at least 1.
        step_size: length of a step: `eps/N` for a share of the radius, or a length such as `1/255`.
        decay: factor of the velocity at each step; 0 gives plain gradient ascent.
    """

    loss: losses.Name = "ce"
    steps: int = 10
    step_size: str = "eps/4"
    decay: float = 0.9

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    @property
    def passes(self) -> tuple[int, int]:
        """Forward passes and image gradients of an image that is never broken."""
        return self.steps, self.steps

    def start(self, rows: Rows, threat: Threat) -> MyAttackState:
        """The image itself, at rest. No model call is made here."""
        images = rows.images
        return MyAttackState(**vars(begin(rows, threat, images.clone())), velocity=torch.zeros_like(images))

    def step(self, state: MyAttackState, oracle: Oracle) -> MyAttackState:
        """One iteration of every row: evaluate the iterate, then move it inside ball and box."""
        evaluation = evaluate(self.loss, state, oracle)
        velocity = self.decay * state.velocity + geometry.direction(evaluation.gradient, state.threat)
        move = geometry.direction(velocity, state.threat).mul_(step_length(self.step_size, state.threat))
        return dataclasses.replace(advanced(state, evaluation, move, self.steps), velocity=velocity)


plugin = MyAttack
