"""MMT-ARD against hand calculations: numpy, from the formulas, in float64, without our losses."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from worlds import Linear, cosines_by_hand, kl_by_hand, softmax, unit_rows

from robustbench_vlm.cards import plugins
from robustbench_vlm.defenses import losses
from robustbench_vlm.defenses.interface import Roles, Step
from robustbench_vlm.defenses.mmt_ard import MmtArd
from robustbench_vlm.errors import CardError
from robustbench_vlm.types import Batch

B, C = 6, 5


@dataclass
class Scene:
    """Three linear encoders of different width and scale, their text, and one batch with its x'."""

    roles: Roles
    batch: Batch
    adv: torch.Tensor

    def loss(self, defense, carry=None, progress=0.0):
        targets = defense.targets(self.roles, self.batch)
        return defense.outer(self.roles, Step(self.batch, self.adv, targets, carry or {}, progress))

    def part(self, i):
        """The batch of image i alone."""
        batch = Batch(self.batch.images[i : i + 1], self.batch.labels[i : i + 1], self.batch.keys[i : i + 1])
        return Scene(self.roles, batch, self.adv[i : i + 1])

    def numbers(self):
        """(A_ic, B_ic, c_R, c_K, q_R): summands of both divergences, both confidences, softmax of R."""
        student, robust, clean = (
            self.roles.student,
            self.roles.teachers["robust"],
            self.roles.teachers["clean"],
        )
        text, i, y = self.roles.text, np.arange(len(self.adv)), self.batch.labels.numpy()
        cos_r = cosines_by_hand(robust, text["robust"], self.adv)
        cos_k = cosines_by_hand(clean, text["clean"], self.batch.images)
        p_s_adv = softmax(student.logit_scale * cosines_by_hand(student, text["student"], self.adv))
        p_s = softmax(student.logit_scale * cosines_by_hand(student, text["student"], self.batch.images))
        p_r, p_k = softmax(robust.logit_scale * cos_r), softmax(clean.logit_scale * cos_k)
        return kl_by_hand(p_r, p_s_adv), kl_by_hand(p_k, p_s), cos_r[i, y], cos_k[i, y], p_r[i, y]


def scene(seed=0, positive=False):
    student, robust, clean = Linear(seed + 1, 4.0), Linear(seed + 2, 3.0, 4), Linear(seed + 3, 5.0, 2)
    for teacher in (robust, clean):
        teacher.requires_grad_(False)
    text = {
        role: unit_rows(seed + n, C, width)
        for n, (role, width) in enumerate({"student": 3, "robust": 4, "clean": 2}.items())
    }
    make = np.random.default_rng(seed)
    images = torch.tensor(make.random((B, 3, 1, 1)))
    adv = (images + torch.tensor(make.normal(0, 0.1, (B, 3, 1, 1)))).clamp(0, 1)
    if positive:  # label each image with a class that both teachers like, so no confidence is negative
        both = np.minimum(
            cosines_by_hand(robust, text["robust"], adv), cosines_by_hand(clean, text["clean"], images)
        )
        labels = torch.tensor(both.argmax(1))
    else:
        labels = torch.arange(B) % C
    roles = Roles(student, {"robust": robust, "clean": clean}, text)
    return Scene(roles, Batch(images, labels, tuple(f"toy/train/{i}" for i in range(B))), adv)


def test_released_is_the_element_mean_of_50_and_5_with_raw_cosines():
    found = scene()
    a, b, c_r, c_k, _ = found.numbers()
    assert (c_r < 0).any()
    assert (c_r > 0).any()
    expected = (50 * c_r[:, None] * a + 5 * c_k[:, None] * b).sum() / (B * C)
    terms = found.loss(MmtArd(weighting="released"))
    assert terms.total.item() == pytest.approx(expected, abs=1e-12)
    share = ((c_r < 0) | (c_k < 0)).mean()
    assert 0 < share < 1
    assert terms.parts["negative_cosines"].item() == pytest.approx(share)
    assert terms.parts["kl_adv"].item() == pytest.approx(a.sum() / B)
    assert terms.parts["kl_clean"].item() == pytest.approx(b.sum() / B)


def test_released_turns_a_divergence_round_where_the_cosine_is_negative():
    found = scene()
    a, _, c_r, _, _ = found.numbers()
    negative = int(c_r.argmin())
    alone = found.part(negative).loss(MmtArd(weighting="released", clean_weight=1e-9))
    assert c_r[negative] < 0
    assert alone.total.item() == pytest.approx(50 * c_r[negative] * a[negative].sum() / C, abs=1e-7)
    assert alone.total.item() < 0


def test_static_is_the_ten_to_one_mix():
    found = scene()
    a, b, *_ = found.numbers()
    expected = (10 / 11 * a.sum(1) + 1 / 11 * b.sum(1)).mean()
    assert found.loss(MmtArd(weighting="static")).total.item() == pytest.approx(expected, abs=1e-12)
    flat = MmtArd("paper", kappa=0)
    assert found.loss(flat).total.item() == pytest.approx(expected, abs=1e-12)


def test_paper_with_log_gap_is_the_released_loss_sample_by_sample():
    found = scene(positive=True)
    _, _, c_r, c_k, _ = found.numbers()
    assert (c_r > 0.01).all()
    assert (c_k > 0.01).all()
    gate = MmtArd("paper", gap="log")
    single = [found.part(i).loss(gate).total.item() for i in range(B)]
    h = 50 * c_r + 5 * c_k
    released = found.loss(MmtArd(weighting="released")).total.item()
    assert (h * single).sum() / (B * C) == pytest.approx(released, rel=1e-9)


def test_paper_with_log_gap_and_confident_focus_is_released_up_to_one_factor():
    found = scene(positive=True)
    _, _, c_r, c_k, _ = found.numbers()
    factor = C / (50 * (c_r + 0.1 * c_k).mean())
    paper = found.loss(MmtArd("paper", gap="log", focus="confident")).total.item()
    released = found.loss(MmtArd(weighting="released")).total.item()
    assert paper == pytest.approx(factor * released, rel=1e-9)


POSITIVE = st.floats(0.011, 1)


@given(st.lists(st.tuples(POSITIVE, POSITIVE, st.floats(0, 50), st.floats(0, 50)), min_size=1, max_size=8))
def test_the_identity_between_released_weights_and_a_sigmoid_gate(rows):
    c_r, c_k, a, b = torch.tensor(rows, dtype=torch.float64).T
    defense = MmtArd("paper", gap="log")
    gap, carry = defense._gap(c_r, c_k, {})
    w, h = torch.sigmoid(math.log(10) + gap), 50 * c_r + 5 * c_k
    np.testing.assert_allclose(h * (w * a + (1 - w) * b), 50 * c_r * a + 5 * c_k * b, rtol=1e-6, atol=1e-6)
    assert not carry


def by_hand(numbers, running, rate):
    """The default `paper` loss, and the running E[c], E[c^2] of both teachers after this batch."""
    a, b, c_r, c_k, q = numbers
    after, scores = {}, {}
    for role, c in (("robust", c_r), ("clean", c_k)):
        now = np.array([c.mean(), (c**2).mean()])
        after[role] = now if running is None else (1 - rate) * running[role] + rate * now
        scores[role] = (c - after[role][0]) / math.sqrt(after[role][1] - after[role][0] ** 2)
    w = 1 / (1 + np.exp(-(math.log(10) + scores["robust"] - scores["clean"])))
    h = (1 - q) / (1 - q).mean()
    return (h * (w * a.sum(1) + (1 - w) * b.sum(1))).mean(), after


def test_paper_by_default_over_three_steps_with_its_running_statistics():
    carry, running, seen = {}, None, []
    for step in range(3):
        here = scene(10)
        here.batch = scene(20 + step).batch
        here.adv = scene(20 + step).adv
        terms = here.loss(MmtArd("paper", focus="hard", momentum=0.6), carry)
        expected, running = by_hand(here.numbers(), running, [1, 1 / 2, 0.4][step])  # 1/3 is below 1 - 0.6
        carry = terms.carry
        assert terms.total.item() == pytest.approx(expected, rel=1e-9)
        assert set(carry) == {"robust", "clean"}
        for role in carry:
            mean, square = running[role]
            np.testing.assert_allclose(carry[role], [mean, square - mean**2, step + 1], rtol=1e-10)
            assert not carry[role].requires_grad
        seen.append(expected)
    assert len(set(seen)) == 3
    fresh = here.loss(MmtArd("paper", focus="hard", momentum=0.6), {}).total.item()
    assert fresh != pytest.approx(seen[-1], rel=1e-6)  # the carry matters


def stream(batch_size, images=4096, correlation=0.5):
    """Gates and carries of `paper` on one stream of confidences, cut into batches."""
    make = np.random.default_rng(0)
    noise = make.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]], images)
    c_r, c_k = torch.tensor(0.3 + 0.02 * noise[:, 0]), torch.tensor(0.2 + 0.05 * noise[:, 1])
    defense, carry, gates = MmtArd("paper"), {}, []
    for begin in range(0, images, batch_size):
        gap, carry = defense._gap(c_r[begin : begin + batch_size], c_k[begin : begin + batch_size], carry)
        gates.append(torch.sigmoid(math.log(10) + gap))
    return torch.cat(gates), carry


@pytest.mark.parametrize("batch_size", [1, 2, 8, 32, 128])
def test_the_mean_gate_of_paper_does_not_depend_on_the_batch_size(batch_size):
    """Near 10/11, and nearer to its mean over a normal gap of variance 2 - 2 * 0.5 = 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    exact = (weights / (1 + np.exp(-(math.log(10) + nodes)))).sum() / weights.sum()
    assert exact == pytest.approx(10 / 11, abs=0.04)
    gates, carry = stream(batch_size)
    assert gates.mean().item() == pytest.approx(exact, abs=0.01)
    assert 0.05 < gates.std().item() < 0.15
    assert ((gates < 0.001) | (gates > 0.9999)).float().mean() < 0.01
    mean, variance, count = carry["robust"].tolist()
    assert (mean, variance**0.5) == (pytest.approx(0.3, abs=0.006), pytest.approx(0.02, rel=0.15))
    assert count == 4096 / batch_size


def test_the_gate_of_single_images_by_hand():
    """1, then 3, then 2 at equal weights: means 1, 2, 2 and variances 0, 1, 2/3."""
    carry, seen = None, []
    for value in (1.0, 3.0, 2.0):
        carry = losses.pooled(torch.tensor([value], dtype=torch.float64), carry, 0.5)
        seen.append(carry.tolist())
    carry = losses.pooled(torch.tensor([4.0, 6.0], dtype=torch.float64), torch.tensor([2.0, 1.0, 9.0]), 0.75)
    assert seen[:2] == [[1, 0, 1], [2, 1, 2]]
    assert seen[2] == pytest.approx([2, 0.5, 3])  # 1/3 is below 1 - 0.5: variance 0.5 * 1 + 0 + 0
    assert carry.tolist() == pytest.approx([2 + 0.25 * 3, 0.75 * 1 + 0.25 * 1 + 0.25 * 0.75 * 9, 10])


@given(st.lists(st.lists(st.floats(-1, 1), min_size=3, max_size=3), min_size=1, max_size=9))
def test_the_pooled_moments_of_the_first_batches_are_those_of_all_their_values(rows):
    carry = None
    for row in rows:
        carry = losses.pooled(torch.tensor(row, dtype=torch.float64), carry, 0.9)
    values = np.array(rows).ravel()
    np.testing.assert_allclose(carry, [values.mean(), values.var(), len(rows)], rtol=1e-9, atol=1e-12)


def t2i_by_hand(here, role, images, q_images, scale=None):
    """Mean over the classes present of KL(teacher || student), softmaxes over the images of the batch."""
    columns = []
    for name, x in ((role, images), ("student", q_images)):
        encoder = here.roles.encoder(name)
        scores = (scale or encoder.logit_scale) * cosines_by_hand(encoder, here.roles.text[name], x)
        columns.append(softmax(scores.T[sorted(set(here.batch.labels.tolist()))]))
    return kl_by_hand(*columns).sum(1).mean()


@pytest.mark.parametrize("scale", [None, 100.0])
def test_full_over_three_steps_weighs_the_direction_that_has_learned_less(scale):
    carry, first, mean, betas = {}, None, None, []
    defense = MmtArd("full", consistency=0.5, momentum=0.9, text_scale=scale)
    for step in range(3):
        here = scene(10)
        here.batch, here.adv = scene(20 + step).batch, scene(20 + step).adv
        terms = here.loss(defense, carry)
        w = np.array([terms.parts["gate"].item()])  # of the gate itself speaks the test of `paper` above
        images = here.batch.images
        back = w * t2i_by_hand(here, "robust", here.adv, here.adv, scale)
        back = (back + (1 - w) * t2i_by_hand(here, "clean", images, images, scale)).item()
        paper = here.loss(MmtArd("paper", momentum=0.9), {k: carry[k] for k in ("robust", "clean") if carry})
        now = np.array([paper.total.item(), back])
        first = now if first is None else first
        mean = now if mean is None else 0.9 * mean + 0.1 * now
        left = mean / first
        beta = 1 / (1 + math.exp(-5 * (left[0] - left[1])))
        betas.append(beta)
        student = here.roles.student
        p, q = (
            softmax(student.logit_scale * cosines_by_hand(student, here.roles.text["student"], x))
            for x in (images, here.adv)
        )
        itself = kl_by_hand(p, q).sum(1).mean()
        expected = 2 * (beta * now[0] + (1 - beta) * now[1]) + 0.5 * itself
        assert terms.total.item() == pytest.approx(expected, rel=1e-9)
        assert terms.parts["modality"].item() == pytest.approx(beta, rel=1e-9)
        carry = terms.carry
        assert set(carry) == {"robust", "clean", "i2t", "t2i"}
    assert betas[0] == 0.5
    assert betas[1] != 0.5


def test_full_without_its_gates_is_half_and_half():
    here = scene(30)
    terms = here.loss(MmtArd("full", kappa=0, kappa_modality=0))
    assert terms.parts["modality"].item() == 0.5
    assert terms.parts["gate"].item() == pytest.approx(10 / 11)
    total = terms.parts["i2t"] + terms.parts["t2i"]
    assert terms.total.item() == pytest.approx(total.item(), rel=1e-12)
    assert terms.parts["i2t"].item() == pytest.approx(here.loss(MmtArd("static")).total.item(), rel=1e-12)


def test_the_consistency_of_full_has_no_gradient_at_the_clean_prediction():
    here = scene(31)
    images = here.batch.images.clone().requires_grad_()
    batch = Batch(images, here.batch.labels, here.batch.keys)
    found = []
    for weight in (0.0, 3.0):
        targets = {k: v.detach() for k, v in MmtArd("full").targets(here.roles, batch).items()}
        terms = MmtArd("full", consistency=weight).outer(here.roles, Step(batch, here.adv, targets, {}))
        found.append(torch.autograd.grad(terms.total, images)[0])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("focus", ["hard", "linear", "student", "confident", "none"])
@given(
    data=st.lists(st.tuples(*[st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 1)]), min_size=1, max_size=9)
)
def test_the_focus_has_mean_one_and_is_never_negative(focus, data):
    c_r, c_k, q = torch.tensor(data, dtype=torch.float64).T
    gamma = 2.0 if focus in ("hard", "student") else 1.0
    h = MmtArd("paper", focus=focus, gamma=gamma)._focus(c_r, c_k, q)
    assert h.mean().item() == pytest.approx(1, abs=1e-9)
    assert (h >= 0).all()


def test_the_hard_focus_favours_images_of_which_the_robust_teacher_is_unsure():
    c = torch.full((3,), 0.3)
    h = MmtArd("paper", focus="hard")._focus(c, c, torch.tensor([0.9, 0.5, 0.1]))
    assert h.tolist() == pytest.approx([0.1 / 0.5, 0.5 / 0.5, 0.9 / 0.5], rel=1e-6)


def test_the_linear_focus_keeps_the_weight_of_easy_images():
    """1 + 2 (1 - q) of 0.9, 0.5, 0.1 is 1.2, 2, 2.8, of mean 2."""
    c = torch.full((3,), 0.3)
    h = MmtArd("paper", focus="linear", focus_weight=2.0)._focus(c, c, torch.tensor([0.9, 0.5, 0.1]))
    assert h.tolist() == pytest.approx([0.6, 1.0, 1.4], rel=1e-6)


@pytest.mark.parametrize("weighting", ["static", "paper"])
@pytest.mark.parametrize("target", ["label", "clean"])
def test_hard_images_get_another_target_by_the_doubt_of_the_robust_teacher(weighting, target):
    here = scene(44)
    a, b, c_r, c_k, q = here.numbers()
    student, i, y = student_says(here, here.adv), np.arange(B), here.batch.labels.numpy()
    clean = here.roles.teachers["clean"]
    p_k = softmax(clean.logit_scale * cosines_by_hand(clean, here.roles.text["clean"], here.batch.images))
    other = -np.log(student[i, y]) if target == "label" else kl_by_hand(p_k, student).sum(1)
    doubt = (1 - q) ** 2
    adv = (1 - doubt) * a.sum(1) + doubt * other
    score = [(c - c.mean()) / c.std() for c in (c_r, c_k)]
    gate = 1 / (1 + np.exp(-(math.log(10) + score[0] - score[1])))
    w = gate if weighting == "paper" else 10 / 11
    found = here.loss(MmtArd(weighting, hard_target=target, gamma=2.0)).total.item()
    assert found == pytest.approx((w * adv + (1 - w) * b.sum(1)).mean(), rel=1e-9)


def test_a_gate_that_follows_the_robust_teacher_on_x_prime_alone():
    here = scene(45)
    a, b, c_r, _, _ = here.numbers()
    w = 1 / (1 + np.exp(-(math.log(10) + (c_r - c_r.mean()) / c_r.std())))
    terms = here.loss(MmtArd("paper", gap="robust"))
    assert terms.total.item() == pytest.approx((w * a.sum(1) + (1 - w) * b.sum(1)).mean(), rel=1e-9)
    assert set(terms.carry) == {"robust"}
    assert w[c_r.argmin()] == w.min()  # the clean teacher counts most where the robust one is fooled


def test_the_clean_weight_goes_geometrically_from_its_start_to_its_end():
    """From 5 to 80: 5, 10, 20, 40 at a quarter each, in every weighting."""
    here = scene(46, positive=True)
    for weighting in ("released", "static", "paper", "full"):
        moving = MmtArd(weighting, clean_weight_end=80.0)
        for progress, weight in ((0.0, 5), (0.25, 10), (0.5, 20), (0.75, 40)):
            found = here.loss(moving, progress=progress)
            fixed = here.loss(MmtArd(weighting, clean_weight=float(weight)))
            assert found.total.item() == pytest.approx(fixed.total.item(), rel=1e-9)
            assert found.parts["clean_weight"].item() == pytest.approx(weight)
            assert found.carry.keys() == fixed.carry.keys()
    fields = {"weighting": "static", "clean_weight": 0, "clean_weight_end": 3}
    with pytest.raises(CardError, match="clean_weight_end = 3 needs a clean_weight above 0"):
        plugins.build("defenses", "mmt-ard", fields, "a test")


@pytest.mark.parametrize("fields", [
    {"weighting": "released"}, {"weighting": "full"}, {"weighting": "static", "clean_weight": 0},
])  # fmt: skip
def test_a_target_of_hard_images_that_would_go_unread_is_refused(fields):
    with pytest.raises(CardError, match="hard_target = 'label' goes with weighting 'static' or 'paper'"):
        plugins.build("defenses", "mmt-ard", {"hard_target": "label", **fields}, "a test")


@pytest.mark.parametrize("fields", [
    {"focus": "hard"}, {"gap": "log"}, {"kappa": 2.0}, {"momentum": 0.5}, {"text_scale": 100.0},
    {"weighting": "static", "focus": "confident"}, {"weighting": "static", "gamma": 2.0},
    {"weighting": "paper", "consistency": 1.0}, {"weighting": "paper", "kappa_modality": 1.0},
    {"weighting": "paper", "gap": "log", "momentum": 0.5}, {"weighting": "full", "focus_weight": 2.0},
    {"weighting": "paper", "focus": "linear", "gamma": 2.0},
], ids=str)  # fmt: skip
def test_a_hyper_parameter_that_would_go_unread_is_refused(fields):
    """Else one model would be trained under two names."""
    unread = list(fields)[-1]
    with pytest.raises(CardError, match=rf"recipe x, mmt-ard: {unread} = .* would go unread with weighting"):
        plugins.build("defenses", "mmt-ard", fields, "recipe x")
    explicit = {name: getattr(MmtArd, name) for name in fields} | {"weighting": MmtArd.weighting}
    assert plugins.build("defenses", "mmt-ard", explicit, "recipe x") == MmtArd()


def test_the_gate_turns_to_the_teacher_that_is_surer_than_usual():
    gap, _ = MmtArd()._gap(torch.tensor([0.3, 0.1]), torch.tensor([0.2, 0.2001]), {})
    assert gap[0] > 0 > gap[1]
    biased, _ = MmtArd()._gap(torch.tensor([0.8, 0.6]), torch.tensor([0.2, 0.2001]), {})
    assert biased.tolist() == pytest.approx(gap.tolist(), abs=1e-3)  # a constant offset of a teacher is gone


def test_equal_confidences_leave_a_finite_gate():
    same = torch.full((4,), 0.25)
    gap, carry = MmtArd()._gap(same, same, {})
    assert gap.tolist() == [0, 0, 0, 0]
    assert carry["robust"].tolist() == pytest.approx([0.25, 0.0, 1.0])


@pytest.mark.parametrize("weighting", ["paper", "released", "static"])
def test_the_weights_are_constants_to_the_gradient(weighting):
    """The gradient with respect to x' runs through the student alone, as if the weights were numbers."""
    here = scene(positive=True)
    defense = MmtArd(weighting=weighting)
    adv = here.adv.clone().requires_grad_()
    targets = defense.targets(here.roles, here.batch)
    terms = defense.outer(here.roles, Step(here.batch, adv, targets, {}))
    (found,) = torch.autograd.grad(terms.total, adv)

    _, _, c_r, c_k, _ = here.numbers()
    if weighting == "released":
        factor = 50 * c_r / C
    elif weighting == "static":
        factor = np.full(B, 10 / 11)
    else:
        score = [(c - c.mean()) / c.std() for c in (c_r, c_k)]
        factor = 1 / (1 + np.exp(-(math.log(10) + score[0] - score[1])))
    other = here.adv.clone().requires_grad_()
    robust = here.roles.teachers["robust"]
    p = torch.tensor(
        softmax(robust.logit_scale * cosines_by_hand(robust, here.roles.text["robust"], here.adv))
    )
    cross = -(p * here.roles.logits("student", other).log_softmax(-1)).sum(-1)
    (expected,) = torch.autograd.grad((torch.tensor(factor) * cross).mean(), other)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def student_says(here, images):
    student = here.roles.student
    return softmax(student.logit_scale * cosines_by_hand(student, here.roles.text["student"], images))


def test_the_softmax_gap_compares_softmax_confidences_and_the_student_focus_its_own():
    here = scene(40)
    a, b, _, _, q_r = here.numbers()
    i, y = np.arange(B), here.batch.labels.numpy()
    clean = here.roles.teachers["clean"]
    q_k = softmax(clean.logit_scale * cosines_by_hand(clean, here.roles.text["clean"], here.batch.images))[
        i, y
    ]
    q_s = student_says(here, here.adv)[i, y]
    score = [(q - q.mean()) / q.std() for q in (q_r, q_k)]
    w = 1 / (1 + np.exp(-(math.log(10) + score[0] - score[1])))
    h = (1 - q_s) ** 2 / ((1 - q_s) ** 2).mean()
    expected = (h * (w * a.sum(1) + (1 - w) * b.sum(1))).mean()
    terms = here.loss(MmtArd("paper", gap="softmax", focus="student", gamma=2.0))
    assert terms.total.item() == pytest.approx(expected, rel=1e-9)


def test_the_robust_teacher_on_x_teaches_the_student_on_x_prime():
    here = scene(41)
    robust, text, y = here.roles.teachers["robust"], here.roles.text["robust"], here.batch.labels.numpy()
    _, b, _, c_k, _ = here.numbers()
    cosines = cosines_by_hand(robust, text, here.batch.images)
    p = softmax(robust.logit_scale * cosines)
    kl = kl_by_hand(p, student_says(here, here.adv)).sum(1)
    expected = (50 * cosines[np.arange(B), y] * kl + 5 * c_k * b.sum(1)).sum() / (B * C)
    terms = here.loss(MmtArd("released", robust_input="clean"))
    assert terms.total.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("target", ["clean", "robust", "label"])
def test_the_attack_drives_the_student_from_the_target_that_is_named(target):
    here = scene(42)
    defense = MmtArd(attack_target=target)
    found = defense.inner(here.roles, here.batch, defense.targets(here.roles, here.batch))(here.adv)
    said = student_says(here, here.adv)
    if target == "label":
        expected = -np.log(said[np.arange(B), here.batch.labels.numpy()])
    else:
        teacher = here.roles.teachers[target]
        cosines = cosines_by_hand(teacher, here.roles.text[target], here.batch.images)
        expected = kl_by_hand(softmax(teacher.logit_scale * cosines), said).sum(1)
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-9)


def test_without_a_clean_term_the_loss_is_the_robust_teachers_alone_and_the_other_does_not_run():
    here = scene(43)
    a, *_ = here.numbers()
    alone = MmtArd("static", clean_weight=0.0, attack_target="robust")
    assert alone.teachers == ("robust",)
    del here.roles.teachers["clean"]
    assert here.loss(alone).total.item() == pytest.approx(a.sum(1).mean(), rel=1e-9)
    assert MmtArd("static", clean_weight=0.0).teachers == ("robust", "clean")  # the attack still asks it
    assert MmtArd.teachers == ("robust", "clean")
    with pytest.raises(CardError, match="clean_weight = 0 goes with weighting 'static' alone, not 'paper'"):
        plugins.build("defenses", "mmt-ard", {"weighting": "paper", "clean_weight": 0}, "recipe x")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weighting", "relased"), ("gap", "g1"), ("kappa", "steep"), ("robust_weight", 0.0),
        ("clean_weight", -5.0), ("momentum", 1.5), ("gamma", -1.0),
    ],
)  # fmt: skip
def test_a_hyper_parameter_that_makes_no_sense_is_one_line(field, value):
    with pytest.raises(CardError, match=rf"recipe x, mmt-ard: {field} = ") as caught:
        plugins.build("defenses", "mmt-ard", {field: value}, "recipe x")
    assert "\n" not in str(caught.value)


def test_a_mistyped_hyper_parameter_is_given_its_near_name():
    with pytest.raises(CardError, match="unknown key 'weightning' for mmt-ard; did you mean 'weighting'"):
        plugins.build("defenses", "mmt-ard", {"weightning": "paper"}, "recipe x")
