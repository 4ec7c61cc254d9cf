"""What a training waits for: images, which are read ahead, and threads, which wait briefly for each other."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from robustbench_vlm import store, threads
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.data import loader
from robustbench_vlm.errors import InputError
from robustbench_vlm.training import loop
from robustbench_vlm.training.summary import summary
from robustbench_vlm.types import Batch

CPU = torch.device("cpu")


def batch(number):
    return Batch(torch.full((1, 3, 2, 2), float(number)), torch.tensor([number]), (str(number),))


def test_batches_are_made_in_order_while_the_caller_works():
    made, where = [], set()

    def source():
        for number in range(5):
            where.add(threading.get_ident())
            made.append(number)
            yield batch(number)

    seen = []
    for got in loader.ahead(source()):
        seen.append(got.keys[0])
        began = time.monotonic()
        while len(made) < min(len(seen) + 1, 5):  # the next one comes without being asked for
            assert time.monotonic() - began < 30
            time.sleep(0.001)
        assert len(made) <= len(seen) + 1
    assert seen == ["0", "1", "2", "3", "4"]
    assert where
    assert threading.get_ident() not in where


def test_an_image_that_cannot_be_read_is_reported_where_its_batch_is_asked_for():
    def source():
        yield batch(0)
        raise InputError("x.png", "no image")

    batches = loader.ahead(source())
    assert next(batches).keys == ("0",)
    with pytest.raises(InputError, match="no image"):
        next(batches)


def test_who_stops_early_does_not_wait_for_the_next_batch():
    release = threading.Event()

    def source():
        yield batch(0)
        release.wait(60)
        yield batch(1)

    batches = loader.ahead(source())
    next(batches)
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 30
    release.set()


@pytest.mark.gpu
def test_pinned_batches_are_copied_without_holding_up_the_caller():
    (got,) = loader.ahead(iter([batch(3)]), pinned=True)
    assert got.images.is_pinned()
    assert torch.equal(got.to(torch.device("cuda")).images.cpu(), batch(3).images)


def test_pixels_become_floats_as_torch_divides_them():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(4, 8, 8, 3)
    found = loader.as_float(pixels.numpy())
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert torch.equal(found, pixels.permute(0, 3, 1, 2).to(torch.float32).div(255))


# The summary of a run


def test_the_share_of_waiting_by_hand(tmp_path):
    recipe = {"name": "a", "fingerprint": "f", "optim": {"steps": 9, "batch_size": 8}}
    store.write_json(tmp_path / "recipe.json", recipe)
    assert summary(tmp_path) == {
        **{"recipe": "a", "fingerprint": "f", "step": 0, "steps": 9, "finished": False, "last": None},
        **{"probe": None, "images_per_second": None, "data_share": None},
    }
    for step, (rate, waited) in enumerate(((4.0, 100.0), (8.0, 1.0), (16.0, 0.5)), 1):
        line = {"step": step, "loss": 1.0, "images_per_second": rate, "data_seconds": waited}
        store.append(tmp_path / "log.jsonl", line)
    store.append(tmp_path / "log.jsonl", {"step": 3, "probe": {"clean": 0.5}})
    found = summary(tmp_path)
    assert (found["step"], found["images_per_second"]) == (3, 8.0)
    assert found["data_share"] == 0.5  # 1.5 s of waiting beside 1 s and 0.5 s of work; not the first step
    assert found["last"]["step"] == 3
    assert found["probe"]["probe"] == {"clean": 0.5}


def test_logs_of_before_have_no_share(tmp_path):
    store.write_json(
        tmp_path / "recipe.json", {"name": "a", "fingerprint": "f", "optim": {"steps": 2, "batch_size": 8}}
    )
    for step in (1, 2):
        store.append(tmp_path / "log.jsonl", {"step": step, "loss": 1.0, "images_per_second": 4.0})
    assert summary(tmp_path)["data_share"] is None


def test_a_real_run_says_how_long_it_waited(toy, tmp_path):
    recipe = Recipe.model_validate(toy.table("clean", inner=None))
    loop.run(recipe, tmp_path, toy.data, CPU, lambda line: None)
    found = summary(tmp_path)
    assert (found["recipe"], found["step"], found["finished"]) == ("toy-run", 6, True)
    assert 0 <= found["data_share"] < 1


def test_a_folder_of_no_training_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no training is there; expected the checkpoint folder"):
        summary(tmp_path)


# Threads


def test_threads_wait_briefly_unless_the_user_has_decided():
    for before, after in (
        ({}, {"GOMP_SPINCOUNT": threads.TURNS}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ):
        threads.wait_briefly(before)
        assert before == after


def test_the_command_line_decides_before_torch_is_loaded():
    code = (
        "import os, sys\nos.environ.pop('GOMP_SPINCOUNT', None)\nfrom robustbench_vlm.cli import main\n"
        "sys.argv = ['vlmrob', '--version']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules\nprint(os.environ['GOMP_SPINCOUNT'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == threads.TURNS
