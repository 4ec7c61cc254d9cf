"""A chain of attacks, built from its card."""

from __future__ import annotations

from robustbench_vlm import store
from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.cards.attack import AttackCard, Stage
from robustbench_vlm.engine.interface import Attack
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Norm


def needs(card: AttackCard, n_classes: int) -> dict[str, bool]:
    """What a chain needs a model to be, as `checks.examine` wants to know it."""
    white_box = any(plugin(card, stage).cost(n_classes)[1] for stage in card.stage)
    only_ce = all(plugin(card, stage).cross_entropy_only for stage in card.stage)
    return {"white_box": white_box, "only_ce": only_ce}


def black_box(card: AttackCard, n_classes: int) -> list[str]:
    """Names of the stages without gradients that come after one with gradients."""
    gradients = [plugin(card, stage).cost(n_classes)[1] for stage in card.stage]
    return [stage.name for i, stage in enumerate(card.stage) if not gradients[i] and any(gradients[:i])]


def attack_sha256(card: AttackCard) -> str:
    """Fingerprint of a chain: its stages with every number, the padded shape and the stopping rule."""
    return store.fingerprint(card.model_dump(mode="json", include={"rows", "stop", "stage"}))


def require_norm(card: AttackCard, norm: Norm) -> None:
    """Build every attack of a chain, so that what cannot run stops here, before any time is spent.

    Raises:
        CardError: an unknown attack or field.
        InputError: an attack that does not know the norm; the message names the chains that do.
    """
    for stage in card.stage:
        attack = plugin(card, stage)
        if norm in attack.norms:
            continue
        others = [reader.read("attacks", name, AttackCard) for name in reader.names("attacks")]
        able = [o.name for o in others if all(norm in plugin(o, s).norms for s in o.stage)]
        raise InputError(
            f"attack {card.name}, stage {stage.name}",
            f"norm {norm!r}",
            " or ".join(attack.norms),
            f"chains for {norm}: {', '.join(able) or 'none'}",
        )


def plugin(card: AttackCard, stage: Stage) -> Attack:
    """The attack of one stage, with its fields.

    Raises:
        CardError: an unknown attack or field.
    """
    attack: Attack = plugins.build(
        "attacks", stage.attack, stage.fields, f"attack {card.name}, stage {stage.name}"
    )
    return attack
