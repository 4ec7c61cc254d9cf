"""The contract of every defense that is registered."""

import dataclasses

import numpy as np
import pytest
import torch
from worlds import softmax, twin

from robustbench_vlm.cards import plugins
from robustbench_vlm.defenses.interface import Defense, Roles, Step
from robustbench_vlm.errors import TrainingError
from robustbench_vlm.models import zoo
from robustbench_vlm.models.clip import frozen
from robustbench_vlm.models.text_bank import render, text_bank
from robustbench_vlm.types import Batch

NAMES = plugins.names("defenses")
ROLES = tuple(sorted({role for name in NAMES for role in plugins.get("defenses", name).teachers}))
VARIANTS = [
    *((name, {}) for name in NAMES),
    *(("mmt-ard", {"weighting": weighting}) for weighting in ("released", "static", "paper", "full")),
    ("mmt-ard", {"weighting": "paper", "gap": "log", "focus": "confident"}),
    ("mmt-ard", {"weighting": "paper", "focus": "hard"}),
    ("mmt-ard", {"weighting": "paper", "focus": "linear", "hard_target": "label"}),
    ("mmt-ard", {"weighting": "static", "hard_target": "label", "gamma": 2.0}),
    ("mmt-ard", {"weighting": "static", "hard_target": "clean"}),
    ("mmt-ard", {"weighting": "paper", "gap": "robust"}),
    ("mmt-ard", {"clean_weight_end": 50.0}),
    ("mmt-ard", {"weighting": "full", "consistency": 1.0}),
    ("mmt-ard", {"weighting": "paper", "focus": "student", "gap": "softmax"}),
    ("mmt-ard", {"attack_target": "robust"}),
    ("mmt-ard", {"attack_target": "label", "robust_input": "clean"}),
    ("mmt-ard", {"weighting": "static", "clean_weight": 0}),
    ("mmt-ard", {"weighting": "static", "clean_weight": 0, "attack_target": "robust"}),
    ("multi-teacher", {"inputs": {"robust": "privileged", "clean": "adv"}}),
    ("multi-teacher", {"inputs": {"robust": "adv", "clean": "privileged"}, "attack_target": "label"}),
    (
        "multi-teacher",
        {
            "inputs": {"robust": "adv", "clean": "clean", "anchor": "clean"},
            "weights": {"robust": 4.0, "clean": 1.0, "anchor": 1.0},
            "attack_target": "robust",
        },
    ),
    ("pmg-aft", {"form": "released"}),
    ("tga-zsr", {"unit": "channel"}),
    ("sim-clip", {"form": "paper"}),
    ("ard", {"alpha": 0.5, "reduction": "elementmean"}),
    ("rslad", {"reduction": "sum"}),
    ("iad", {"begin": 0.0}),
    ("iad", {"begin": 0.0, "form": "weighted"}),
    ("adaad", {"alpha": 0.5}),
]
B = 4


def build(name, fields=None):
    return plugins.build("defenses", name, fields or {}, "a test")


@pytest.fixture(scope="module")
def models(world):
    loaded = {role: zoo.load(path).model for role, path in world.teachers(*ROLES).items()}
    loaded = {"student": zoo.load(world.student).model} | loaded
    sentences = render(("red", "green", "blue", "grey"), ["a photo of a {c}"])
    text = {role: text_bank(model, sentences) for role, model in loaded.items()}
    text["second"] = text["second"].roll(1, 0)  # two teachers that disagree, so that AMMKD needs them both
    return loaded, text


@pytest.fixture
def scene(models):
    """Roles with every teacher, a batch, an x near it; a student that has left its start, the anchor."""
    loaded, text = models
    own = {role: twin(model) for role, model in loaded.items()}
    for role in ROLES:
        own[role].requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        images = torch.rand(B, 3, 32, 32)
        adv = (images + (torch.rand(B, 3, 32, 32) - 0.5) * 0.06).clamp(0, 1)
        with torch.no_grad():
            for parameter in own["student"].visual.requires_grad_(True).parameters():
                parameter += 0.01 * torch.randn(parameter.shape)
    batch = Batch(images, torch.tensor([0, 1, 2, 3]), tuple(f"toy/train/{i}" for i in range(B)))
    return Roles(own["student"], {role: own[role] for role in ROLES}, text), batch, adv


def outer(defense, roles, batch, adv):
    with torch.no_grad():
        targets = defense.targets(roles, batch)
    return defense.outer(roles, Step(batch, adv, targets, {}))


def both(defense, roles, batch, adv):
    """What the student minimises, and the sum of what the adversary maximises at `adv`."""
    total = outer(defense, roles, batch, adv).total.item()
    if not defense.adversarial:
        return total, 0.0
    with torch.no_grad():
        return total, defense.inner(roles, batch, defense.targets(roles, batch))(adv).sum().item()


@pytest.mark.parametrize(("name", "fields"), VARIANTS, ids=str)
def test_the_loss_is_finite_and_only_the_student_gets_a_gradient(scene, name, fields):
    roles, batch, adv = scene
    for role in ROLES:
        roles.teachers[role].visual.requires_grad_(True)  # even if the loop had forgotten to freeze them
    defense = build(name, fields)
    terms = outer(defense, roles, batch, adv)
    assert terms.total.shape == ()
    assert torch.isfinite(terms.total)
    terms.total.backward()
    trained = list(roles.student.visual.parameters())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    assert sum(float(p.grad.abs().sum()) for p in trained) > 0
    for role in ROLES:
        learns = role in defense.learners
        assert all((p.grad is not None) == learns for p in roles.teachers[role].visual.parameters())
    assert all(p.grad is None for p in roles.student.language.parameters())
    for value in (*terms.parts.values(), *terms.carry.values()):
        assert not value.requires_grad
        assert torch.isfinite(value).all()
    assert all(value.shape == () for value in terms.parts.values())


@pytest.mark.parametrize(("name", "fields"), VARIANTS, ids=str)
def test_the_declared_teachers_are_exactly_those_that_change_loss_or_adversary(scene, name, fields):
    roles, batch, adv = scene
    defense = build(name, fields)
    before = both(defense, roles, batch, adv)
    assert both(defense, roles, batch, adv) == before
    for role in ROLES:
        teacher = twin(roles.teachers[role])
        with torch.no_grad():
            for parameter in teacher.visual.parameters():
                parameter *= 1 + 0.3 * torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
        others = Roles(roles.student, {**roles.teachers, role: teacher}, roles.text)
        after = both(defense, others, batch, adv)
        changed = any(abs(x - y) > 1e-5 * abs(y) for x, y in zip(after, before, strict=True))
        assert changed == (role in defense.teachers), role


@pytest.mark.parametrize("name", NAMES)
def test_text_is_needed_exactly_when_the_loss_changes_with_it(scene, name):
    roles, batch, adv = scene
    defense = build(name)
    before = outer(defense, roles, batch, adv).total.item()
    turned = Roles(roles.student, roles.teachers, {r: t.roll(1, 1) for r, t in roles.text.items()})
    assert (outer(defense, turned, batch, adv).total.item() != before) == defense.needs_text
    if not defense.needs_text:
        outer(defense, Roles(roles.student, roles.teachers, {}), batch, adv)


@pytest.mark.parametrize("name", NAMES)
def test_targets_have_a_row_per_image_no_gradient_and_no_student_unless_it_is_counted(scene, name):
    roles, batch, _ = scene
    defense = build(name)
    with torch.no_grad():
        targets = defense.targets(roles, batch)
        again = defense.targets(Roles(twin(roles.student), roles.teachers, roles.text), batch)
        moved = twin(roles.student)
        for parameter in moved.visual.parameters():
            parameter.mul_(0.5)
        other = defense.targets(Roles(moved, roles.teachers, roles.text), batch)
    passes = defense.passes()
    for key, value in targets.items():
        assert not value.requires_grad
        assert len(value) == B
        assert torch.equal(value, again[key])
        if passes is not None and not passes.student_no_grad:
            assert torch.equal(value, other[key])
    if passes is not None and passes.student_no_grad:
        assert any(not torch.equal(value, other[key]) for key, value in targets.items())


@pytest.mark.parametrize("name", NAMES)
def test_the_inner_objective_is_per_sample_and_depends_on_its_own_image_only(scene, name):
    roles, batch, adv = scene
    defense = build(name)
    with torch.no_grad():
        targets = defense.targets(roles, batch)
    if not defense.adversarial:
        with pytest.raises(TrainingError, match="inner objective"):
            defense.inner(roles, batch, targets)
        return
    objective = defense.inner(roles, batch, targets)
    leaf = adv.clone().requires_grad_()
    with frozen(roles.student):
        values = objective(leaf)
        assert values.shape == (B,)
        (gradient,) = torch.autograd.grad(values[1], leaf)
    assert gradient[1].abs().sum() > 0
    assert all(gradient[i].abs().sum() == 0 for i in (0, 2, 3))
    assert all(p.grad is None for p in roles.student.parameters())


@pytest.mark.parametrize(("name", "fields"), VARIANTS, ids=str)
def test_where_student_and_teachers_agree_the_loss_is_what_the_defense_states(scene, name, fields):
    roles, batch, _ = scene
    defense = build(name, fields)
    same = Roles(
        roles.student,
        dict.fromkeys(ROLES, roles.student),
        dict.fromkeys(("student", *ROLES), roles.text["student"]),
    )
    total = outer(defense, same, batch, batch.images).total.item()
    with torch.no_grad():
        stated = float(defense.loss_at_agreement(same, batch))
    message = f"{name}: on clean images and with itself as teacher outer gives {total:g}, "
    message += f"{type(defense).__name__}.loss_at_agreement {stated:g}"
    # A loss that is multiplied by T^2 (900 in ARD) has T^2 times the rounding of a float32 sum.
    rounding = getattr(defense, "temperature", 1.0) ** 2 * torch.finfo(torch.float32).eps
    assert total == pytest.approx(stated, abs=max(1e-5, rounding)), message


AT_AGREEMENT = {  # what is stated, in numbers worked out from the logits by hand
    "fare": lambda z, cos, y: 0.0,
    "mmt-ard": lambda z, cos, y: 0.0,
    "sim-clip": lambda z, cos, y: -0.5,
    "tecoa": lambda z, cos, y: ce_by_hand(z, y),
    "trades": lambda z, cos, y: ce_by_hand(z, y),
    "pmg-aft": lambda z, cos, y: ce_by_hand(z, y),
    "apd": lambda z, cos, y: 2 * ce_by_hand(z, y),
    "agft": lambda z, cos, y: -(softmax(72 * cos) * np.log(softmax(180 * cos))).sum(1).mean(),
    "mart": lambda z, cos, y: ce_by_hand(z, y) - np.log(1 - others(softmax(z), y).max(1)).mean(),
}


def ce_by_hand(z, y):
    return -np.log(softmax(z)[np.arange(B), y]).mean()


def others(p, y):
    return np.stack([np.delete(row, label) for row, label in zip(p, y, strict=True)])


@pytest.mark.parametrize("name", AT_AGREEMENT)
def test_what_a_defense_states_of_agreement_is_right(scene, name):
    """So that loss and statement are not wrong together."""
    roles, batch, _ = scene
    with torch.no_grad():
        cosines = roles.cosines("student", roles.student(batch.images)).double().numpy()
        stated = float(build(name).loss_at_agreement(roles, batch))
    expected = AT_AGREEMENT[name](roles.student.logit_scale * cosines, cosines, batch.labels.numpy())
    assert stated == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_defense_is_a_frozen_dataclass_that_declares_its_contract(name):
    defense = build(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        defense.anything = 1
    assert isinstance(defense, Defense)
    assert set(defense.learners) <= set(defense.teachers)
    assert isinstance(defense.needs_text, bool)
    assert isinstance(defense.adversarial, bool)


def test_a_defense_of_nothing_but_a_loss_meets_the_contract(scene):
    """Defaults: no teachers, no targets, no demands, unknown passes; what is missing is one line."""

    @dataclasses.dataclass(frozen=True)
    class Bare(Defense):
        pass

    roles, batch, adv = scene
    bare = Bare()
    bare.require(roles)
    assert (bare.teachers, bare.learners, bare.passes(), bare.targets(roles, batch)) == ((), (), None, {})
    with pytest.raises(TrainingError, match="defense Bare: it has no inner objective"):
        bare.inner(roles, batch, {})
    with pytest.raises(TrainingError, match="defense Bare: it has no outer loss"):
        bare.outer(roles, Step(batch, adv, {}, {}))
