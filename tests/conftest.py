"""Numerics in tests are stricter than in use: one thread, deterministic kernels. Nothing is timed long."""

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
def _short_trials():
    """Whether larger calls cost less, which no result depends on, is found out by two calls and not 0.1 s."""
    from robustbench_vlm.engine import batch_shapes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_shapes, "TRIAL", 0.0)
        yield


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


@pytest.fixture(scope="module")
def study_cards(world, tmp_path_factory):
    """What studies are made of: two recipes of four steps, a chain, the toy data as seen and unseen set."""
    root = tmp_path_factory.mktemp("study")
    for folder in ("datasets", "attacks", "recipes", "studies"):
        (root / "cards" / folder).mkdir(parents=True)
    own = (world.cards / "datasets" / "toy.toml").read_text()
    (root / "cards" / "datasets" / "toy.toml").write_text(own)
    (root / "cards" / "datasets" / "far.toml").write_text(own.replace('name = "toy"', 'name = "far"'))
    (root / "cards" / "short.toml").write_text(
        'name = "short"\ntitle = "short"\ndatasets = ["toy", "far"]\neps = ["4/255"]\n'
    )
    (root / "cards" / "attacks" / "step.toml").write_text(
        'name = "step"\ntitle = "step"\nrows = 8\nstop = "last"\n[[stage]]\nname = "pgd"\nattack = "pgd"\n'
        'loss = "ce"\nsteps = 2\nstep_size = "eps/2"\nrestarts = 1\nrandom_start = true\n'
    )
    for name, defense, roles in (
        ("one", "single-teacher", ["robust"]),
        ("two", "mmt-ard", ["robust", "clean"]),
    ):
        teachers = "\n".join(f'{role} = "{path}"' for role, path in world.teachers(*roles).items())
        (root / "cards" / "recipes" / f"{name}.toml").write_text(
            f'name = "{name}"\ntitle = "{name}"\nstudent = "{world.student}"\n'
            f'[teachers]\n{teachers}\n[defense]\nname = "{defense}"\n'
            '[data]\ndataset = "toy"\ntemplate = "a photo of a {c}"\n'
            '[inner]\neps = "4/255"\nsteps = 2\nstep_size = "2/255"\n'
            "[optim]\nlr = 1e-3\nsteps = 4\nwarmup = 1\nbatch_size = 8\n"
        )
    return root, world.data
