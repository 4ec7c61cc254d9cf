"""The contract of every defense that is registered, and the losses of the single-term ones by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from worlds import Linear, cosines_by_hand, kl_by_hand, softmax, twin, unit_rows

from robustbench_vlm import registry
from robustbench_vlm.errors import TrainingError
from robustbench_vlm.models import zoo
from robustbench_vlm.models.clip import held
from robustbench_vlm.models.zeroshot import render, text_bank
from robustbench_vlm.types import Batch, Roles, Step

NAMES = registry.names("defenses")
ROLES = ("robust", "clean", "anchor")
VARIANTS = [
    *((name, {}) for name in NAMES),
    *(("mmt-ard", {"weighting": weighting}) for weighting in ("released", "static", "paper")),
    ("mmt-ard", {"weighting": "paper", "gap": "log", "focus": "confident"}),
    ("mmt-ard", {"weighting": "paper", "focus": "hard"}),
]
B = 4


def build(name, fields=None):
    return registry.build("defenses", name, fields or {}, "a test")


@pytest.fixture(scope="module")
def models(world):
    loaded = {role: zoo.load(path).model for role, path in world.teachers(*ROLES).items()}
    loaded = {"student": zoo.load(world.student).model} | loaded
    sentences = render(("red", "green", "blue", "grey"), ["a photo of a {c}"])
    return loaded, {role: text_bank(model, sentences) for role, model in loaded.items()}


@pytest.fixture
def scene(models):
    """Roles with all three teachers, a batch, an x near it; a student that has left its start, the anchor."""
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
        assert all(p.grad is None for p in roles.teachers[role].parameters())
    assert all(p.grad is None for p in roles.student.language.parameters())
    for value in (*terms.parts.values(), *terms.carry.values()):
        assert not value.requires_grad
        assert torch.isfinite(value).all()
    assert all(value.shape == () for value in terms.parts.values())


@pytest.mark.parametrize(("name", "fields"), VARIANTS, ids=str)
def test_the_declared_teachers_are_exactly_those_that_change_the_loss(scene, name, fields):
    roles, batch, adv = scene
    defense = build(name, fields)
    before = outer(defense, roles, batch, adv).total.item()
    assert outer(defense, roles, batch, adv).total.item() == before
    for role in ROLES:
        teacher = twin(roles.teachers[role])
        with torch.no_grad():
            for parameter in teacher.visual.parameters():
                parameter *= 1 + 0.3 * torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
        others = Roles(roles.student, {**roles.teachers, role: teacher}, roles.text)
        changed = abs(outer(defense, others, batch, adv).total.item() - before) > 1e-5 * abs(before)
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
def test_targets_carry_no_gradient_and_see_the_frozen_models_alone(scene, name):
    roles, batch, _ = scene
    defense = build(name)
    with torch.no_grad():
        targets = defense.targets(roles, batch)
        again = defense.targets(Roles(twin(roles.student), roles.teachers, roles.text), batch)
        moved = twin(roles.student)
        for parameter in moved.visual.parameters():
            parameter.mul_(0.5)
        other = defense.targets(Roles(moved, roles.teachers, roles.text), batch)
    for key, value in targets.items():
        assert not value.requires_grad
        assert len(value) == B
        assert torch.equal(value, again[key])
        assert torch.equal(value, other[key])


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
    with held(roles.student):
        values = objective(leaf)
        assert values.shape == (B,)
        (gradient,) = torch.autograd.grad(values[1], leaf)
    assert gradient[1].abs().sum() > 0
    assert all(gradient[i].abs().sum() == 0 for i in (0, 2, 3))
    assert all(p.grad is None for p in roles.student.parameters())


@pytest.mark.parametrize(("name", "fields"), VARIANTS, ids=str)
def test_a_student_that_is_its_teacher_has_no_distillation_loss_on_clean_images(scene, name, fields):
    roles, batch, _ = scene
    defense = build(name, fields)
    same = Roles(
        roles.student,
        dict.fromkeys(ROLES, roles.student),
        dict.fromkeys(("student", *ROLES), roles.text["student"]),
    )
    total = outer(defense, same, batch, batch.images).total.item()
    assert (abs(total) < 1e-6) == bool(defense.teachers)


@pytest.mark.parametrize("name", NAMES)
def test_a_defense_is_a_frozen_dataclass_that_declares_its_contract(name):
    defense = build(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        defense.anything = 1
    assert set(defense.teachers) <= set(ROLES)
    assert isinstance(defense.needs_text, bool)
    assert isinstance(defense.adversarial, bool)


def by_hand(seed):
    """Two linear encoders, their text, a batch and x', with all probabilities from numpy."""
    student, teacher = Linear(seed, 4.0), Linear(seed + 1, 3.0, 5)
    text = {"student": unit_rows(seed, 6, 3), "robust": unit_rows(seed + 1, 6, 5)}
    make = np.random.default_rng(seed)
    images, adv = (torch.tensor(make.random((5, 3, 1, 1))) for _ in range(2))
    batch = Batch(images, torch.tensor([5, 0, 3, 3, 1]), tuple("abcde"))
    return Roles(student, {"robust": teacher, "anchor": teacher}, text), batch, adv


def student_probabilities(roles, images):
    return softmax(roles.student.logit_scale * cosines_by_hand(roles.student, roles.text["student"], images))


def test_tecoa_is_the_mean_cross_entropy_on_adversarial_images():
    roles, batch, adv = by_hand(1)
    p = student_probabilities(roles, adv)[np.arange(5), batch.labels.numpy()]
    defense = build("tecoa")
    assert outer(defense, roles, batch, adv).total.item() == pytest.approx(-np.log(p).mean(), abs=1e-12)
    np.testing.assert_allclose(defense.inner(roles, batch, {})(adv).detach(), -np.log(p), atol=1e-12)


def test_clean_is_the_mean_cross_entropy_on_clean_images():
    roles, batch, adv = by_hand(2)
    p = student_probabilities(roles, batch.images)[np.arange(5), batch.labels.numpy()]
    assert outer(build("clean"), roles, batch, adv).total.item() == pytest.approx(
        -np.log(p).mean(), abs=1e-12
    )


def test_single_teacher_is_the_batchmean_divergence_from_the_teacher_on_clean_images():
    roles, batch, adv = by_hand(3)
    teacher = roles.teachers["robust"]
    p = softmax(teacher.logit_scale * cosines_by_hand(teacher, roles.text["robust"], batch.images))
    expected = kl_by_hand(p, student_probabilities(roles, adv)).sum(1)
    defense = build("single-teacher")
    assert outer(defense, roles, batch, adv).total.item() == pytest.approx(expected.mean(), abs=1e-12)
    inner = defense.inner(roles, batch, defense.targets(roles, batch))(adv)
    np.testing.assert_allclose(inner.detach(), expected, atol=1e-12)


def test_mmt_ard_attacks_the_clean_teachers_prediction_without_labels():
    roles, batch, adv = by_hand(4)
    clean = roles.teachers["robust"]
    roles = Roles(roles.student, {"clean": clean}, roles.text | {"clean": roles.text["robust"]})
    p = softmax(clean.logit_scale * cosines_by_hand(clean, roles.text["clean"], batch.images))
    expected = kl_by_hand(p, student_probabilities(roles, adv)).sum(1)
    defense = build("mmt-ard")
    targets = defense.targets(roles, batch)
    np.testing.assert_allclose(defense.inner(roles, batch, targets)(adv).detach(), expected, atol=1e-12)


def test_fare_is_the_squared_distance_of_raw_embeddings_summed_over_dimensions():
    student, anchor = Linear(7, 4.0), Linear(8, 3.0)
    roles = Roles(student, {"anchor": anchor}, {})
    make = np.random.default_rng(7)
    images, adv = (torch.tensor(make.random((5, 3, 1, 1))) for _ in range(2))
    batch = Batch(images, torch.zeros(5, dtype=torch.int64), tuple("abcde"))
    z = adv.numpy().reshape(5, 3) @ student.weight.detach().numpy()
    z0 = images.numpy().reshape(5, 3) @ anchor.weight.detach().numpy()
    expected = ((z - z0) ** 2).sum(1)
    defense = build("fare")
    assert outer(defense, roles, batch, adv).total.item() == pytest.approx(expected.mean(), abs=1e-12)
    inner = defense.inner(roles, batch, defense.targets(roles, batch))(adv)
    np.testing.assert_allclose(inner.detach(), expected, atol=1e-12)
