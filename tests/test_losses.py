"""The losses per sample, against numbers computed by hand from the formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from robustbench_vlm.defenses.losses import ce, kl, kl_terms, of_label, squared_distance

LOGITS = arrays(np.float64, (3, 4), elements=st.floats(-30, 30))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_ce_of_two_classes_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(3)]])
    found = ce(logits, torch.tensor([0, 0, 0]))
    assert found.tolist() == pytest.approx([math.log(2), -math.log(3 / 4), -math.log(1 / 4)], abs=1e-6)


def test_kl_is_of_the_teacher_from_the_student_by_hand():
    teacher = torch.tensor([[math.log(3), 0.0]])  # P = (3/4, 1/4)
    student = torch.tensor([[0.0, 0.0]])  # Q = (1/2, 1/2)
    assert kl(teacher, student).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-7)
    assert kl(student, teacher).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-7)


@given(LOGITS, LOGITS)
def test_kl_sums_its_terms_and_equals_p_log_p_over_q(teacher, student):
    p, q = softmax(teacher), softmax(student)
    expected = p * (np.log(p + 1e-300) - np.log(q + 1e-300))
    terms = kl_terms(torch.tensor(teacher), torch.tensor(student)).numpy()
    np.testing.assert_allclose(terms, expected, atol=1e-9)
    np.testing.assert_allclose(kl(torch.tensor(teacher), torch.tensor(student)), expected.sum(-1), atol=1e-9)
    assert (expected.sum(-1) > -1e-12).all()


def test_kl_of_certain_predictions_is_finite():
    sure = torch.tensor([[1000.0, -1000.0]])
    assert kl(sure, sure).item() == 0
    assert kl(sure, -sure).item() == pytest.approx(2000)


def test_l2_sums_over_dimensions_and_keeps_the_batch():
    found = squared_distance(
        torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 1.0]]), torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, 1.0]])
    )
    assert found.tolist() == [9.0, 9.0]


def test_of_label_takes_each_rows_own_entry():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert of_label(values, torch.tensor([2, 0])).tolist() == [3.0, 4.0]
