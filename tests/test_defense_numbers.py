"""The losses of every defense against hand calculations: numpy, from the formulas, in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import Linear, cosines_by_hand, kl_by_hand, softmax, unit_rows

from robustbench_vlm.cards import plugins
from robustbench_vlm.defenses import losses
from robustbench_vlm.defenses.interface import Roles, Step
from robustbench_vlm.defenses.mart import boosted_ce
from robustbench_vlm.errors import CardError, InputError
from robustbench_vlm.types import Batch

B, C = 5, 6
Y = [5, 0, 3, 3, 1]
I = np.arange(B)  # noqa: E741 - index of the images


def build(name, **fields):
    return plugins.build("defenses", name, fields, "a test")


class Scene:
    """Linear encoders with text of their own, a batch and its x'; every number from numpy."""

    def __init__(self, seed, encoder=Linear, pixels=1):
        widths = {"student": 3, "robust": 5, "clean": 2, "anchor": 3, "first": 4, "second": 2}
        models = {
            role: encoder(10 * seed + n, 2.0 + n, width) for n, (role, width) in enumerate(widths.items())
        }
        self.text = {
            role: unit_rows(10 * seed + n, C, width) for n, (role, width) in enumerate(widths.items())
        }
        student = models.pop("student")
        for model in models.values():
            model.requires_grad_(False)
        self.roles = Roles(student, models, self.text)
        make = np.random.default_rng(seed)
        images, self.adv = (torch.tensor(make.random((B, 3, pixels, pixels))) for _ in range(2))
        self.batch = Batch(images, torch.tensor(Y), tuple("abcde"))
        self.x = images

    def cosines(self, role, images):
        return cosines_by_hand(self.roles.encoder(role), self.text[role], images)

    def z(self, role, images):
        return self.roles.encoder(role).logit_scale * self.cosines(role, images)

    def p(self, role, images, t=1.0):
        return softmax(self.z(role, images) / t)

    def embedding(self, role, images):
        return images.numpy().reshape(B, 3) @ self.roles.encoder(role).weight.detach().numpy()

    def outer(self, defense, carry=None, progress=0.0):
        with torch.no_grad():
            targets = defense.targets(self.roles, self.batch)
        return defense.outer(self.roles, Step(self.batch, self.adv, targets, carry or {}, progress))

    def total(self, defense, **more):
        return self.outer(defense, **more).total.item()

    def inner(self, defense):
        with torch.no_grad():
            targets = defense.targets(self.roles, self.batch)
        return defense.inner(self.roles, self.batch, targets)(self.adv).detach().numpy()


def kl(p, q):
    return kl_by_hand(p, q).sum(1)


def close(x):
    return pytest.approx(x, rel=1e-9, abs=1e-12)


# No teacher, or the original


def test_clean_is_the_mean_cross_entropy_on_clean_images():
    s = Scene(2)
    assert s.total(build("clean")) == close(-np.log(s.p("student", s.x)[I, Y]).mean())


def test_tecoa_is_the_mean_cross_entropy_on_adversarial_images():
    s = Scene(1)
    expected = -np.log(s.p("student", s.adv)[I, Y])
    assert s.total(build("tecoa")) == close(expected.mean())
    np.testing.assert_allclose(s.inner(build("tecoa")), expected, atol=1e-12)


@pytest.mark.parametrize("beta", [6.0, 0.5])
def test_trades_adds_the_divergence_of_its_own_clean_from_its_adversarial_prediction(beta):
    s = Scene(25)
    clean, adv = s.p("student", s.x), s.p("student", s.adv)
    penalty = kl(clean, adv)
    defense = build("trades", beta=beta)
    assert s.total(defense) == close(-np.log(clean[I, Y]).mean() + beta * penalty.mean())
    np.testing.assert_allclose(s.inner(defense), penalty, atol=1e-12)
    assert build("trades").beta == 6.0


def test_the_attack_of_trades_moves_away_from_a_fixed_prediction():
    """Gradient of KL(p || softmax(z')) with p constant: (softmax(z') - p) dz'/dx', here by differences."""
    s = Scene(25)
    defense, leaf, h = build("trades"), s.adv.clone().requires_grad_(), 1e-6
    with torch.no_grad():
        targets = defense.targets(s.roles, s.batch)
    (found,) = torch.autograd.grad(defense.inner(s.roles, s.batch, targets)(leaf).sum(), leaf)
    for channel in range(3):
        values = []
        for sign in (1, -1):
            moved = s.adv.clone()
            moved[:, channel] += sign * h
            values.append(kl(s.p("student", s.x), s.p("student", moved)))
        np.testing.assert_allclose(found[:, channel, 0, 0], (values[0] - values[1]) / (2 * h), atol=1e-7)


def test_mart_boosts_the_margin_and_weighs_by_the_doubt_in_the_clean_prediction():
    s = Scene(26)
    clean, adv = s.p("student", s.x), s.p("student", s.adv)
    wrong = np.array([np.delete(row, y).max() for row, y in zip(adv, Y, strict=True)])
    boosted = -np.log(adv[I, Y]) - np.log(1 - wrong)
    weighted = kl(clean, adv) * (1 - clean[I, Y])
    assert s.total(build("mart")) == close(boosted.mean() + 5 * weighted.mean())
    assert s.total(build("mart", beta=6.0)) == close(boosted.mean() + 6 * weighted.mean())
    np.testing.assert_allclose(s.inner(build("mart")), -np.log(adv[I, Y]), atol=1e-12)


def test_the_boosted_cross_entropy_of_small_numbers_and_of_a_certain_mistake():
    """Probabilities 1/6, 2/6, 3/6: -log p_0 - log(1 - 1/2) = log 12, and -log p_2 - log(1 - 1/3) = log 3."""
    z = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], dtype=torch.float64).log()
    found = boosted_ce(z, torch.tensor([0, 2]))
    assert found.tolist() == pytest.approx([math.log(12), math.log(3)], rel=1e-12)
    sure = torch.tensor([[0.0, 200.0, 0.0]], requires_grad=True)  # p_1 rounds to 1 in float32
    value = boosted_ce(sure, torch.tensor([0]))
    assert value.item() == pytest.approx(200 + 200 - math.log(2), rel=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), sure)
    assert gradient.tolist()[0] == pytest.approx([-1.5, 2.0, -0.5], rel=1e-5)


def test_fare_is_the_squared_distance_of_raw_embeddings_summed_over_dimensions():
    s = Scene(7)
    expected = ((s.embedding("student", s.adv) - s.embedding("anchor", s.x)) ** 2).sum(1)
    assert s.total(build("fare")) == close(expected.mean())
    np.testing.assert_allclose(s.inner(build("fare")), expected, atol=1e-12)


def test_sim_clip_is_half_the_negative_cosine_and_its_attack_the_squared_distance():
    s = Scene(8)

    def cos(a, b):
        return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))

    z, z_clean, z_0 = s.embedding("student", s.adv), s.embedding("student", s.x), s.embedding("anchor", s.x)
    assert s.total(build("sim-clip")) == close(-cos(z, z_0).mean() / 2)
    assert s.total(build("sim-clip", form="paper")) == close(-cos(z, z_clean).mean())
    np.testing.assert_allclose(s.inner(build("sim-clip")), ((z - z_0) ** 2).sum(1), atol=1e-12)


def test_the_papers_sim_clip_stops_the_gradient_at_the_other_branch():
    """d/dz of -1/2 [cos(z', sg z) + cos(z, sg z')] is half of what it is without the stops: symmetric."""
    s = Scene(9)
    s.total(build("sim-clip", form="paper"))
    weight = s.roles.student.weight
    (found,) = torch.autograd.grad(s.outer(build("sim-clip", form="paper")).total, weight)
    free = -losses.cosine(s.roles.student(s.adv), s.roles.student(s.x)).mean()
    (whole,) = torch.autograd.grad(free, weight)
    torch.testing.assert_close(found, whole / 2)


def test_pmg_aft_in_the_papers_form_takes_scaled_logits_and_means():
    s = Scene(3)
    adv, clean, there = s.p("student", s.adv), s.p("student", s.x), s.p("anchor", s.adv)
    ce = -np.log(adv[I, Y])
    expected = ce.mean() + 0.5 * kl(there, adv).mean() + 2.0 * kl(clean, adv).mean()
    assert s.total(build("pmg-aft", general_weight=0.5, clean_weight=2.0)) == close(expected)
    assert s.total(build("pmg-aft")) == close(ce.mean() + kl(there, adv).mean() + kl(clean, adv).mean())
    np.testing.assert_allclose(s.inner(build("pmg-aft")), ce, atol=1e-12)


def test_pmg_aft_as_released_takes_bare_cosines_and_sums():
    s = Scene(3)
    adv, clean = (softmax(s.cosines("student", images)) for images in (s.adv, s.x))
    there = softmax(s.cosines("anchor", s.adv))
    ce = -np.log(adv[I, Y])
    defense = build("pmg-aft", form="released")
    assert s.total(defense) == close(ce.mean() + kl(there, adv).sum() + kl(clean, adv).sum())
    np.testing.assert_allclose(s.inner(defense), ce, atol=1e-12)


def test_agft_softens_the_target_and_sharpens_the_student():
    s = Scene(4)
    target = softmax(72 * s.cosines("anchor", s.x))
    student = softmax(180 * s.cosines("student", s.adv))
    expected = -(target * np.log(student)).sum(1)
    assert s.total(build("agft")) == pytest.approx(expected.mean(), rel=1e-9)
    np.testing.assert_allclose(s.inner(build("agft")), expected, rtol=1e-9)


class Patches(Linear):
    """Four patches of 2 x 2 pixels each; the class token is their mean. A 4 x 4 image."""

    image_size = 4

    def tokens(self, images):
        patches = torch.nn.functional.avg_pool2d(images, 2).flatten(2).transpose(1, 2) @ self.weight
        return torch.cat([patches.mean(1, keepdim=True), patches], 1)

    def forward(self, images):
        return self.tokens(images)[:, 0]


UP = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])  # bilinear from 2 to 4, corners not aligned


def attention_by_hand(s, role, images, over):
    w = s.roles.encoder(role).weight.detach().numpy()
    blocks = images.numpy().reshape(B, 3, 2, 2, 2, 2).mean((3, 5)).reshape(B, 3, 4)
    patches = np.einsum("bcn,cd->bnd", blocks, w)
    tokens = np.concatenate([patches.mean(1, keepdims=True), patches], 1)
    tokens = tokens / np.sqrt((tokens**2).sum(over, keepdims=True))
    score = np.einsum("bnd,bd->bn", tokens[:, 1:], s.text[role].numpy()[Y])
    score = (score - score.min(1, keepdims=True)) / np.ptp(score, 1)[:, None]
    return np.einsum("ia,bac,jc->bij", UP, score.reshape(B, 2, 2), UP).reshape(B, 16)


@pytest.mark.parametrize(("unit", "over"), [("token", 2), ("channel", 1)])
def test_tga_zsr_adds_both_distances_of_attention_maps_unsquared(unit, over):
    s = Scene(5, Patches, 4)
    there = attention_by_hand(s, "anchor", s.x, over)
    apart = [
        np.sqrt(((attention_by_hand(s, "student", images, over) - there) ** 2).sum(1))
        for images in (s.adv, s.x)
    ]
    z = s.adv.numpy().mean((2, 3)) @ s.roles.student.weight.detach().numpy()
    cosines = (z / np.sqrt((z**2).sum(1, keepdims=True))) @ s.text["student"].numpy().T
    ce = -np.log(softmax(s.roles.student.logit_scale * cosines)[I, Y])
    expected = ce.mean() + 0.08 * apart[0].mean() + 0.05 * apart[1].mean()
    assert s.total(build("tga-zsr", unit=unit)) == close(expected)
    np.testing.assert_allclose(s.inner(build("tga-zsr", unit=unit)), ce, atol=1e-12)


def test_attention_of_an_image_without_contrast_is_finite():
    s = Scene(5, Patches, 4)
    s.x.fill_(0.5)
    terms = s.outer(build("tga-zsr"))
    terms.total.backward()
    assert torch.isfinite(terms.total)
    assert torch.isfinite(s.roles.student.weight.grad).all()


# One robust teacher


def test_single_teacher_is_the_batchmean_divergence_from_the_teacher_on_clean_images():
    s = Scene(3)
    expected = kl(s.p("robust", s.x), s.p("student", s.adv))
    assert s.total(build("single-teacher")) == close(expected.mean())
    np.testing.assert_allclose(s.inner(build("single-teacher")), expected, atol=1e-12)


def test_ard_divides_logits_by_the_temperature_and_multiplies_by_its_square():
    s = Scene(6)
    soft = kl(s.p("robust", s.x, 30), s.p("student", s.adv, 30)).mean()
    label = -np.log(s.p("student", s.x)[I, Y]).mean()
    assert s.total(build("ard")) == close(900 * soft)
    assert s.total(build("ard", reduction="elementmean")) == close(900 * soft / C)
    mixed = build("ard", alpha=0.3, temperature=2.0)
    soft = kl(s.p("robust", s.x, 2), s.p("student", s.adv, 2)).mean()
    assert s.total(mixed) == close(0.3 * 4 * soft + 0.7 * label)
    np.testing.assert_allclose(s.inner(mixed), -np.log(s.p("student", s.adv)[I, Y]), atol=1e-12)


def test_rslad_is_five_sixths_adversarial_from_the_teachers_clean_prediction():
    s = Scene(11)
    teacher = s.p("robust", s.x)
    adv, clean = kl(teacher, s.p("student", s.adv)), kl(teacher, s.p("student", s.x))
    assert s.total(build("rslad")) == close(5 / 6 * adv.mean() + 1 / 6 * clean.mean())
    cifar100 = build("rslad", factor=10.0, reduction="elementmean")
    assert s.total(cifar100) == close(10 * (5 / 6 * adv.mean() + 1 / 6 * clean.mean()) / C)
    assert s.total(build("rslad", reduction="sum")) == close(5 / 6 * adv.sum() + 1 / 6 * clean.sum())
    np.testing.assert_allclose(s.inner(build("rslad")), adv, atol=1e-12)


def test_iad_trusts_itself_where_the_teacher_is_wrong_and_only_after_its_begin():
    s = Scene(12)
    adv, clean = s.p("student", s.adv), s.p("student", s.x)
    teacher, itself = kl(s.p("robust", s.x), adv), kl(clean, adv)
    trust = s.p("robust", s.adv)[I, Y] ** 0.1
    assert s.total(build("iad"), progress=0.29) == close(teacher.mean())
    assert s.total(build("iad"), progress=0.3) == close(teacher.mean() + ((1 - trust) * itself).mean())
    weighted = build("iad", form="weighted")
    assert s.total(weighted, progress=0.9) == close((trust * teacher + (1 - trust) * itself).mean())
    assert s.total(weighted, progress=0.0) == close(teacher.mean())
    warm = 4 * kl(s.p("robust", s.x, 2), s.p("student", s.adv, 2)).mean()
    assert s.total(build("iad", temperature=2.0)) == close(warm)
    np.testing.assert_allclose(s.inner(build("iad")), -np.log(adv[I, Y]), atol=1e-12)


def test_adaad_compares_both_models_on_the_same_image():
    s = Scene(13)
    adv = kl(s.p("robust", s.adv), s.p("student", s.adv))
    clean = kl(s.p("robust", s.x), s.p("student", s.x))
    assert s.total(build("adaad")) == close(adv.mean())
    assert s.total(build("adaad", alpha=0.25)) == close(0.25 * adv.mean() + 0.75 * clean.mean())
    assert s.total(build("adaad", reduction="elementmean")) == close(adv.mean() / C)
    np.testing.assert_allclose(s.inner(build("adaad")), adv, atol=1e-12)


def test_the_adversary_of_adaad_climbs_through_the_teacher_too():
    s = Scene(13)
    leaf = s.adv.clone().requires_grad_()
    (found,) = torch.autograd.grad(build("adaad").inner(s.roles, s.batch, {})(leaf).sum(), leaf)
    h = 1e-6
    for channel in range(3):
        values = []
        for sign in (1, -1):
            moved = s.adv.clone()
            moved[:, channel] += sign * h
            values.append(kl(s.p("robust", moved), s.p("student", moved)))
        np.testing.assert_allclose(found[:, channel, 0, 0], (values[0] - values[1]) / (2 * h), atol=1e-7)


# Several teachers


def test_multi_teacher_gates_each_image_by_a_softmax_over_standardised_confidences():
    """Three teachers, one of them on x while the student sees x', over two steps with equal weight."""
    s, carry = Scene(17), {}
    inputs = {"robust": "adv", "clean": "clean", "anchor": "privileged"}
    weights = {"robust": 3.0, "clean": 1.0, "anchor": 2.0}
    defense = build("multi-teacher", inputs=inputs, weights=weights, kappa=0.5)
    moments = dict.fromkeys(inputs, np.zeros(2))
    for step in range(2):
        s.adv = s.adv.flip(0) if step else s.adv
        terms, scores = [], []
        for role, how in inputs.items():
            teacher_sees, student_sees = s.adv if how == "adv" else s.x, s.x if how == "clean" else s.adv
            terms.append(kl(s.p(role, teacher_sees), s.p("student", student_sees)))
            c = s.cosines(role, teacher_sees)[I, Y]
            moments[role] = moments[role] + np.array([c.mean(), (c**2).mean()])
            mean, square = moments[role] / (step + 1)
            scores.append(math.log(weights[role]) + 0.5 * (c - mean) / math.sqrt(square - mean**2))
        gate = softmax(np.array(scores).T).T
        found = s.outer(defense, carry)
        carry = found.carry
        assert found.total.item() == close((gate * np.array(terms)).sum(0).mean())
        assert found.parts["gate_anchor"].item() == close(gate[2].mean())
    np.testing.assert_allclose(s.inner(defense), kl(s.p("clean", s.x), s.p("student", s.adv)), atol=1e-12)
    label = build("multi-teacher", inputs=inputs, weights=weights, attack_target="label")
    np.testing.assert_allclose(s.inner(label), -np.log(s.p("student", s.adv)[I, Y]), atol=1e-12)


def test_two_teachers_at_ten_to_one_are_the_gate_of_mmt_ard():
    s, carries = Scene(18), ({}, {})
    pair = build("multi-teacher"), build("mmt-ard", weighting="paper")
    for _ in range(3):
        found = [s.outer(defense, carry) for defense, carry in zip(pair, carries, strict=True)]
        carries = tuple(terms.carry for terms in found)
        assert found[0].total.item() == close(found[1].total.item())
        assert found[0].parts["gate_robust"].item() == close(found[1].parts["gate"].item())
        s.adv = s.adv.flip(0)


@pytest.mark.parametrize(("fields", "message"), [
    ({"weights": {"robust": 1.0, "other": 1.0}}, "expected the same two or more roles"),
    ({"attack_target": "anchor"}, r"'anchor', expected 'label' or one of \['clean', 'robust'\]"),
    ({"inputs": {"robust": "full-resolution", "clean": "clean"}}, "expected 'clean', 'adv' or 'privileged'"),
    ({"inputs": {"label": "adv", "clean": "clean"}, "weights": {"label": 1.0, "clean": 1.0}}, "may be"),
])  # fmt: skip
def test_teachers_that_do_not_fit_each_other_are_refused(fields, message):
    with pytest.raises(CardError, match=message):
        build("multi-teacher", **fields)


def test_mmt_ard_attacks_the_clean_teachers_prediction_without_labels():
    s = Scene(4)
    np.testing.assert_allclose(
        s.inner(build("mmt-ard")), kl(s.p("clean", s.x), s.p("student", s.adv)), atol=1e-12
    )


def moved(seed, step):
    """The scene of `seed` with the images of another: a later batch of the same run."""
    s, other = Scene(seed), Scene(100 * seed + step)
    s.batch, s.adv, s.x = other.batch, other.adv, other.x
    return s


def test_mtard_balances_by_what_is_left_of_each_loss_and_slows_down():
    weight_clean, first, carry = 0.5, None, {}
    for step, (progress, rate) in enumerate([(0.0, 0.025), (0.5, 0.025), (0.72, 0.0025), (0.96, 0.000025)]):
        s = moved(14, step)
        now = np.array([
            kl(s.p("robust", s.adv), s.p("student", s.adv)).mean(),
            kl(s.p("clean", s.x), s.p("student", s.x)).mean(),
        ])  # fmt: skip
        first = now if first is None else first
        left = now / first
        weight_clean -= rate * (weight_clean - left[1] / left.sum())
        terms = s.outer(build("mtard"), carry=carry, progress=progress)
        assert terms.total.item() == close((1 - weight_clean) * now[0] + weight_clean * now[1])
        assert terms.parts["w_clean"].item() == close(weight_clean)
        carry = terms.carry
    assert weight_clean != 0.5
    ce = -np.log(s.p("student", s.adv)[I, Y])
    np.testing.assert_allclose(s.inner(build("mtard")), ce, atol=1e-12)


def test_mtards_reduction_and_factor_leave_its_balance_alone():
    plain, cifar = build("mtard"), build("mtard", reduction="elementmean", factor=10.0)
    carries = [s.outer(d).carry for s, d in ((moved(15, 0), plain), (moved(15, 0), cifar))]
    later = [moved(15, 1).outer(d, carry=c) for d, c in zip((plain, cifar), carries, strict=True)]
    torch.testing.assert_close(later[0].carry["weight"], later[1].carry["weight"])
    assert later[1].total.item() == close(10 / C * later[0].total.item())


def test_the_balance_of_a_student_that_started_as_its_teacher_stays_finite():
    half = torch.tensor([0.5, 0.5])
    none = losses.balanced(half, torch.zeros(2), torch.zeros(2), 0.025, 1.0)
    assert none.tolist() == [0.5, 0.5]
    one = losses.balanced(half, torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1e-9]), 0.025, 1.0)
    assert one.tolist() == pytest.approx([0.4875, 0.5125], abs=1e-6)  # all of the share is the other's


def test_b_mtard_brings_the_teachers_to_one_entropy():
    t, weight, first, carry = np.array([1.0, 1.0]), np.array([0.5, 0.5]), None, {}
    defense = build("b-mtard", temperature_rate=0.4, rate=0.3)
    warmed = False
    for step, (progress, slow) in enumerate([(0.0, 1), (0.1, 1), (0.2, 1), (0.8, 0.1)]):
        s = moved(16, step)
        teachers = [s.p("robust", s.adv, t[0]), s.p("clean", s.x, t[1])]
        now = np.array([
            kl(teachers[0], s.p("student", s.adv)).mean(), kl(teachers[1], s.p("student", s.x)).mean()
        ])  # fmt: skip
        first = now if first is None else first
        left = now / first
        weight = weight - 0.3 * slow * (weight - left / left.sum())
        weight = np.maximum(weight, 0) / np.maximum(weight, 0).sum()
        terms = s.outer(defense, carry=carry, progress=progress)
        assert terms.total.item() == close((weight * now).sum())
        assert terms.parts["t_robust"].item() == close(t[0])
        h = [-(p * np.log(p)).sum(1).mean() for p in teachers]
        t = t - 0.4 * slow * np.sign([h[0] / h[1] - 1, h[1] / h[0] - 1])
        t = np.clip(t, 1, 10)
        carry = terms.carry
        np.testing.assert_allclose(carry["temperature"], t, rtol=1e-12)
        warmed |= bool((t > 1).any())
    assert warmed


def test_b_mtard_refuses_a_range_of_temperatures_upside_down():
    with pytest.raises(CardError, match=r"hottest = 0\.5 is below coldest = 1\.0") as error:
        build("b-mtard", hottest=0.5)
    assert "\n" not in str(error.value)


def embedding_gradient(s, role, t):
    """d mean_i T^2 KL(P_T || P_S) / d z_S(x), by central differences over the embedding of the batch."""
    z, scale = s.embedding("student", s.x), s.roles.student.logit_scale
    teacher, bank, h = s.p(role, s.x, t), s.text["student"].numpy(), 1e-6

    def loss(z):
        unit = z / np.sqrt((z**2).sum(1, keepdims=True))
        return t**2 * kl(teacher, softmax(scale * unit @ bank.T / t)).mean()

    gradient = np.zeros_like(z)
    for index in np.ndindex(z.shape):
        up, down = z.copy(), z.copy()
        up[index] += h
        down[index] -= h
        gradient[index] = (loss(up) - loss(down)) / (2 * h)
    return loss(z), gradient


@pytest.mark.parametrize("seed", [17, 18, 19, 20])
def test_ammkd_takes_the_shortest_vector_between_two_gradients(seed):
    s = Scene(seed)
    (l1, g1), (l2, g2) = (embedding_gradient(s, role, 2.0) for role in ("first", "second"))
    shares = np.linspace(0, 1, 100_001)
    lengths = [
        ((w * g1 + (1 - w) * g2) ** 2).sum() for w in shares[::1000]
    ]  # a look at the whole range, then the parabola's own minimum
    best = shares[::1000][int(np.argmin(lengths))]
    exact = float(np.clip((g2 * (g2 - g1)).sum() / ((g1 - g2) ** 2).sum(), 0, 1))
    assert abs(exact - best) <= 0.01
    terms = s.outer(build("ammkd", temperature=2.0))
    assert terms.parts["lambda"].item() == pytest.approx(exact, abs=1e-5)
    assert terms.total.item() == pytest.approx(exact * l1 + (1 - exact) * l2, rel=1e-5)


def test_ammkd_of_two_equal_teachers_is_one_of_them():
    s = Scene(17)
    first = s.roles.teachers["first"]
    roles = Roles(s.roles.student, {"first": first, "second": first}, s.text | {"second": s.text["first"]})
    s.roles = roles
    terms = s.outer(build("ammkd"))
    assert terms.parts["lambda"].item() == 0.5
    assert terms.total.item() == close(kl(s.p("first", s.x), s.p("student", s.x)).mean())


def test_apd_distils_the_clean_teacher_while_it_learns():
    s = Scene(24)
    student, teacher = s.p("student", s.adv), s.p("clean", s.x)
    ce = -np.log(student[I, Y])
    tuned = -np.log(teacher[I, Y]).mean()
    expected = kl(teacher, student).mean() + 0.5 * ce.mean() + tuned
    assert s.total(build("apd", label_weight=0.5)) == close(expected)
    np.testing.assert_allclose(s.inner(build("apd")), ce, atol=1e-12)


def test_the_teacher_of_apd_learns_from_its_own_labels_alone():
    s = Scene(24)
    weight = s.roles.teachers["clean"].weight.requires_grad_()
    (found,) = torch.autograd.grad(s.outer(build("apd")).total, weight)
    alone = losses.ce(s.roles.logits("clean", s.x), s.batch.labels).mean()
    (expected,) = torch.autograd.grad(alone, weight)
    torch.testing.assert_close(found, expected)


# All of them


def test_reductions_differ_by_batch_and_classes():
    values = torch.tensor([1.0, 2.0, 6.0])
    found = [losses.reduced(values, 4, how).item() for how in ("batchmean", "elementmean", "sum")]
    assert found == [3.0, 0.75, 9.0]


def test_small_losses_by_hand():
    z = torch.tensor([[0.0, math.log(3.0)]])  # probabilities 1/4, 3/4
    assert losses.entropy(z).item() == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert losses.soft_ce(torch.tensor([[0.5, 0.5]]), z).item() == pytest.approx(-0.5 * math.log(3 / 16))
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    assert losses.cosine(a, b).item() == pytest.approx(24 / 25)
    assert losses.squared_distance(a, b).item() == 2.0
    assert losses.rate_at(0.5, 0.7, (0.5, 0.7, 0.9)) == pytest.approx(0.005)


SMOOTH = [  # no stop-gradient on the student's side: the gradient is that of the number itself
    ("clean", {}), ("tecoa", {}), ("fare", {}), ("pmg-aft", {}), ("pmg-aft", {"form": "released"}),
    ("agft", {}), ("sim-clip", {}), ("single-teacher", {}), ("ard", {"alpha": 0.5}), ("rslad", {}),
    ("iad", {"begin": 0.0}), ("apd", {}), ("adaad", {"alpha": 0.5}), ("mmt-ard", {}),
    ("mmt-ard", {"weighting": "paper"}), ("trades", {}), ("mart", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields"), SMOOTH, ids=str)
def test_the_students_gradient_is_the_slope_of_the_loss(name, fields):
    s, defense, h = Scene(21), build(name, **fields), 1e-6
    weight = s.roles.student.weight
    (found,) = torch.autograd.grad(s.outer(defense).total, weight)
    for index in np.ndindex(*weight.shape):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] += sign * h
                values.append(s.total(defense))
                weight[index] -= sign * h
        assert found[index].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["fare", "sim-clip"])
def test_embeddings_of_another_width_are_refused_in_one_line(name):
    s = Scene(22)
    build(name).require(s.roles)
    other = Roles(s.roles.student, {"anchor": s.roles.teachers["robust"]}, {})
    with pytest.raises(InputError, match="teacher anchor: embeddings of 5 dimensions, the student's have 3"):
        build(name).require(other)


def test_text_banks_of_different_class_lists_are_refused_in_one_line():
    s = Scene(23)
    with pytest.raises(InputError, match="different numbers of classes: robust 5, student 6") as error:
        replace(s.roles, text={"student": s.text["student"], "robust": s.text["robust"][:5]})
    assert "\n" not in str(error.value)
