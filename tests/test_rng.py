"""Randomness is a function of names, on every machine and in every version."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustbench_vlm import rng


def test_frozen_numbers():
    """Stored evidence depends on these; a library that changes them must be noticed."""
    assert rng.generator("0/toy/test/s0/apgd-ce").integers(0, 2**32, 3).tolist() == [
        1163771673,
        223463863,
        2953431946,
    ]
    assert rng.uniform("a", (3,)).tolist() == [0.6569777727127075, 0.16441047191619873, 0.6719822287559509]
    assert rng.normal("a", (2,)).tolist() == [1.266661286354065, 0.2625427544116974]
    assert rng.rank(0, "toy/test/s0000000").startswith("ba0868820f51eea2")


def test_same_name_same_numbers_and_no_other_generator_is_touched():
    states = np.random.get_state()[1].copy(), torch.get_rng_state().clone()
    first = rng.uniform("x", (4, 5)), rng.normal("x", (4, 5))
    rng.uniform("y", (1000,))
    again = rng.uniform("x", (4, 5)), rng.normal("x", (4, 5))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], rng.uniform("x ", (4, 5)))
    assert np.array_equal(states[0], np.random.get_state()[1])
    assert torch.equal(states[1], torch.get_rng_state())


def test_shapes_types_and_ranges():
    uniform, normal = rng.uniform("u", (3, 100, 100)), rng.normal("n", (3, 100, 100))
    assert uniform.shape == normal.shape == (3, 100, 100)
    assert uniform.dtype == normal.dtype == np.float32
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.01
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.02


@given(st.text(), st.text())
def test_different_names_differ(a, b):
    same = np.array_equal(rng.generator(a).integers(0, 2**62, 4), rng.generator(b).integers(0, 2**62, 4))
    assert same == (a == b)
    assert (rng.rank(0, a) == rng.rank(0, b)) == (a == b)
    assert rng.rank(0, a) != rng.rank(1, a)
