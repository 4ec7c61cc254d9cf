"""A chain of attacks, built once from its card: it answers whatever depends on its stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from robustbench_vlm import store
from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.cards.attack import AttackCard, Stage
from robustbench_vlm.engine.interface import Attack, Stop
from robustbench_vlm.engine.job import Job, Stages
from robustbench_vlm.errors import CardError, InputError
from robustbench_vlm.threat import Norm, Threat


@dataclass(frozen=True)
class Chain:
    """Attacks that run one after the other; each is given the images that survived the ones before.

    Attributes:
        card: the record it was built from.
        stages: name and attack of each stage, in the order in which they run.
    """

    card: AttackCard
    stages: Stages

    @classmethod
    def of(cls, card: AttackCard) -> Chain:
        """Build every attack of a card.

        Raises:
            CardError: an unknown attack or field.
        """
        return cls(card, tuple((stage.name, _attack(card, stage)) for stage in card.stage))

    @classmethod
    def named(cls, name: str) -> Chain:
        """The chain of a card of `suites/attacks` or of `--include`, or of a TOML file.

        Raises:
            CardError: no such card, an unknown attack or field in it, or code that it may not name.
        """
        card = reader.read("attacks", name, AttackCard)
        for stage in card.stage:
            where = f"{reader.path('attacks', name)}, stage {stage.name!r:.80}"
            plugins.require_allowed(stage.attack, where)
        return cls.of(card)

    @property
    def name(self) -> str:
        """Name of the card."""
        return self.card.name

    @property
    def rows(self) -> int:
        """Images in every call of the canonical pass."""
        return self.card.rows

    @property
    def stop(self) -> Stop:
        """When a trajectory ends."""
        return self.card.stop

    @property
    def stage_names(self) -> list[str]:
        """Names of the stages, in order."""
        return [name for name, _ in self.stages]

    @cached_property
    def stage_records(self) -> list[dict[str, Any]]:
        """Every number of every stage, as plain values; with the hash of its file if it is code outside."""
        records = []
        for stage, (_, attack) in zip(self.card.stage, self.stages, strict=True):
            code = plugins.code_sha256(type(attack))
            records.append(stage.model_dump(mode="json") | ({"code_sha256": code} if code else {}))
        return records

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the chain: its stages with every number, the rows and the stop rule."""
        return store.fingerprint(self.record)

    @property
    def record(self) -> dict[str, Any]:
        """What decides what the chain finds, as plain values."""
        return {"rows": self.rows, "stop": self.stop, "stage": self.stage_records}

    def cost(self, n_classes: int) -> tuple[int, int]:
        """(forward passes, image gradients) of one image that survives every stage: the worst case."""
        costs = [attack.cost(n_classes) for _, attack in self.stages]
        return sum(forwards for forwards, _ in costs), sum(gradients for _, gradients in costs)

    def needs(self, n_classes: int) -> dict[str, bool]:
        """What the chain needs of a model, in the keywords of `model_checks.examine`."""
        only_ce = all(attack.cross_entropy_only for _, attack in self.stages)
        return {"white_box": self.cost(n_classes)[1] > 0, "only_ce": only_ce}

    def black_box(self, n_classes: int) -> list[str]:
        """Names of the stages without gradients that run after a stage with gradients."""
        gradients = [attack.cost(n_classes)[1] for _, attack in self.stages]
        return [name for i, name in enumerate(self.stage_names) if not gradients[i] and any(gradients[:i])]

    def substitutions(self, n_classes: int) -> list[str]:
        """What runs otherwise than written because there are so few classes; one sentence each."""
        return [f"{name}: {text}" for name, attack in self.stages for text in attack.substitutions(n_classes)]

    def require_norm(self, norm: Norm) -> None:
        """Refuse a norm that an attack of the chain does not support.

        Raises:
            InputError: the message names the chains that do.
        """
        for name, attack in self.stages:
            if norm not in attack.norms:
                able = [other.name for other in _runnable() if other.supports(norm)]
                raise InputError(
                    f"attack {self.name}, stage {name}",
                    f"norm {norm!r}",
                    " or ".join(attack.norms),
                    f"chains for {norm}: {', '.join(able) or 'none'}",
                )

    def supports(self, norm: Norm) -> bool:
        """Whether every attack of the chain knows the norm."""
        return all(norm in attack.norms for _, attack in self.stages)

    def job(self, threat: Threat, n_classes: int, *, seed: int = 0, batch_size: int | None = None) -> Job:
        """The chain as an engine is given it; see `Job`."""
        return Job(self.stages, threat, self.rows, n_classes, batch_size, self.stop, seed)


def _runnable() -> Iterator[Chain]:
    """The chains of all cards that can be built; one that cannot has no say in what others support."""
    for name in reader.names("attacks"):
        with suppress(CardError):
            yield Chain.named(name)


def _attack(card: AttackCard, stage: Stage) -> Attack:
    where = f"attack {card.name}, stage {stage.name}"
    attack: Attack = plugins.build("attacks", stage.attack, stage.fields, where)
    return attack
