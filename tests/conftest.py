"""Numerics in tests are stricter than in use: one thread, deterministic kernels."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _strict_numerics():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
