"""A chain answers for its stages: what it costs, needs and supports, and what it substitutes."""

import pytest
import toys

from robustbench_vlm.attacks.fgsm import Fgsm
from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.engine.job import Job
from robustbench_vlm.errors import CardError, InputError
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.threat import Threat, parse_eps

EVERY = reader.names("attacks")


@pytest.mark.parametrize("name", EVERY)
def test_every_packaged_chain_is_built_once_and_answers(name):
    chain = Chain.named(name)
    assert chain.stage_names == [stage.name for stage in chain.card.stage]
    costs = [attack.cost(10) for _, attack in chain.stages]
    assert chain.cost(10) == (sum(f for f, _ in costs), sum(g for _, g in costs))
    assert chain.needs(10)["white_box"] == any(gradients for _, gradients in costs)
    assert any(chain.supports(norm) for norm in ("linf", "l2", "l1"))
    job = chain.job(Threat("linf", parse_eps("4")), 10, seed=3, batch_size=2)
    assert (job.stages, job.rows, job.stop) == (chain.stages, chain.rows, chain.stop)
    assert (job.n_classes, job.seed, job.batch_size) == (10, 3, 2)


def test_what_autoattack_needs_and_where_it_is_blind():
    chain = Chain.named("autoattack")
    assert chain.black_box(10) == ["square"]
    assert chain.needs(10) == {"white_box": True, "only_ce": False}
    assert Chain.named("pgd20").needs(10) == {"white_box": True, "only_ce": True}
    assert Chain.named("pgd20").black_box(10) == []
    assert chain.substitutions(10) == []
    assert any(text.startswith("apgd-t: ") for text in chain.substitutions(2))


def test_square_alone_needs_no_gradient_and_is_no_second_opinion():
    chain = Chain.of(toys.chain("blind", "square"))
    assert chain.needs(6) == {"white_box": False, "only_ce": False}
    assert chain.black_box(6) == []  # nothing with gradients came before it


def test_a_norm_that_a_stage_does_not_know_names_the_chains_that_do():
    with pytest.raises(InputError, match=r"norm 'l1'; expected .*; chains for l1: .*autoattack-l1") as caught:
        Chain.named("autoattack").require_norm("l1")
    assert "attack autoattack, stage " in str(caught.value)
    Chain.named("autoattack").require_norm("l2")


def test_a_mistyped_field_names_chain_and_stage():
    card = toys.chain("mine", "ce")
    wrong = card.stage[0].model_copy(update={"stepz": 3})
    with pytest.raises(CardError, match=r"attack mine, stage ce: unknown key 'stepz' .*did you mean 'steps'"):
        Chain.of(card.model_copy(update={"stage": (wrong,)}))


OUTSIDE = """
from dataclasses import dataclass
from robustbench_vlm.attacks.fgsm import Fgsm

@dataclass(frozen=True)
class Mine(Fgsm):
    def step(self, state, oracle):
        return super().step(state, oracle)
"""
CARD = """
name = "outside"
title = "an attack of another package"
[[stage]]
name = "mine"
attack = "outside_attack:Mine"
loss = "ce"
"""


def test_code_outside_the_package_is_part_of_what_a_chain_is(tmp_path, monkeypatch):
    """A packaged attack has the version of the engine; a file outside has only its content."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "_code_allowed", True)
    (tmp_path / "outside.toml").write_text(CARD)
    code = tmp_path / "outside_attack.py"
    code.write_text(OUTSIDE)
    first = Chain.named(str(tmp_path / "outside.toml"))
    assert list(first.stage_records[0]) == ["name", "attack", "loss", "code_sha256"]
    code.write_text(OUTSIDE + "# changed\n")
    second = Chain.named(str(tmp_path / "outside.toml"))
    assert first.sha256 != second.sha256
    assert all("code_sha256" not in record for record in Chain.named("autoattack").stage_records)


class Unchecked(Fgsm):
    """An attack of one's own, which does not look at its loss."""

    def __post_init__(self):
        pass


def test_a_targeted_loss_needs_targets():
    stages = [("aimless", Unchecked("targeted-margin"))]
    with pytest.raises(InputError, match="the attack has no target classes; expected an untargeted loss"):
        Job(stages, Threat("linf", parse_eps("4")), 16, 10).check()
