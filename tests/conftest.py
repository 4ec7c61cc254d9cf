"""Numerics in tests are stricter than in use: one thread, deterministic kernels."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from robustbench_vlm.cards import reader


@pytest.fixture(autouse=True, scope="session")
def _strict_numerics():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Text banks of tests are kept with the tests, not with the user's."""
    os.environ["VLMROB_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Data, cards and tiny random checkpoints below one folder; see `worlds.World`."""
    import worlds  # only where it is needed: open_clip takes seconds to import

    return worlds.make(tmp_path_factory.mktemp("world"))


@pytest.fixture
def toy(world):
    """The same, with its cards included for the time of the test."""
    reader.include([world.cards])
    yield world
    reader.include([])
