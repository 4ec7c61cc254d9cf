"""Pixels that are read when they are needed: the same bits, and never more of them than fit."""

import json
import multiprocessing
import random
import threading

import numpy as np
import pandas as pd
import pytest
import torch
import toys
from folders import card, encode, noise, one_shard, tar_bytes, write_toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from killed_evaluations import forks, killed, outcome

from robustbench_vlm.data import canvas_images, dataset
from robustbench_vlm.data.dataset import open_split
from robustbench_vlm.data.parallel import in_order
from robustbench_vlm.engine import model_checks
from robustbench_vlm.errors import DataError

N = 14
WAYS = [{}, {"mode": "reference"}, {"engine": "autoattack"}]


# --- pixels ------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(positions=st.lists(st.integers(0, 23), max_size=30), kept=st.booleans())
def test_floats_are_those_of_the_files_kept_or_not(tmp_path, positions, kept):
    if not (tmp_path / "wds_toy").exists():
        write_toy(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "IN_MEMORY", 24 * 8 * 8 * 3 - (not kept))
        images = canvas_images.decodable_images(open_split(card(), tmp_path, "test"), 8)
    assert (images.pixels is not None) == kept
    found = images.floats(positions)
    assert (found.shape, found.dtype) == ((len(positions), 3, 8, 8), torch.float32)
    wanted = [torch.from_numpy(noise(i)).permute(2, 0, 1).to(torch.float32).div(255) for i in positions]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_parts_are_whole_calls_that_fit(tmp_path, monkeypatch):
    write_toy(tmp_path)
    images = canvas_images.decodable_images(open_split(card(), tmp_path, "test"), 8)
    image = 3 * 8 * 8 * 4  # bytes
    for bound, size in ((0, 5), (image * 10 - 1, 5), (image * 10, 10), (image * 14, 10)):
        monkeypatch.setattr(canvas_images, "AT_ONCE", bound)
        parts = [list(part) for part in images.parts(list(range(1, 24)), 5)]
        assert [i for part in parts for i in part] == list(range(1, 24))
        assert {len(part) for part in parts[:-1]} == {size}
        assert len(parts[-1]) <= size
    assert list(images.parts([], 5)) == []


def test_a_file_that_was_replaced_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "IN_MEMORY", 0)
    place = write_toy(tmp_path, n=1)
    images = [encode(noise(seed)) for seed in (0, 1)]
    for image in images:
        one_shard(place, tar_bytes([("s0.png", image), ("s0.cls", b"0")]))
        if image == images[0]:
            found = canvas_images.decodable_images(open_split(card(size={}), tmp_path, "test"), 8)
            assert len(found.floats([0])) == 1
    assert len(images[0]) == len(images[1])
    with pytest.raises(DataError, match=r"toy/test/s0: its file has changed since the first reading"):
        found.floats([0])


def test_threads_run_ahead_a_little_and_keep_the_order():
    begun, lock = [], threading.Lock()

    def call(i):
        with lock:
            begun.append(i)
        return i * i

    stream = in_order(call, range(1000), 5)
    assert [next(stream) for _ in range(10)] == [i * i for i in range(10)]
    assert max(begun) <= 10 + 5
    stream.close()
    assert list(in_order(call, [7, 3, 3])) == [49, 9, 9]


# --- evaluation --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return toys.write(toys.dataset_card(), tmp_path_factory.mktemp("data"), n=N)


def evaluated(root, results, way, stages=("ce", "t", "square")):
    """Cells, verdicts, images and ledgers of an evaluation at two radii."""
    chain = toys.chain("aa", *stages, rows=4)
    request = toys.request(results, chain, eps=("2/255", "4/255"), **way)
    toys.run(toys.subject(toys.dataset_card(), root), request)
    return outcome(results)


def streamed(patch, calls):
    """Nothing is kept in memory, and parts have so many calls; returns the sizes of what is read."""
    read, floats = [], canvas_images.CanvasImages.floats
    patch.setattr(dataset, "IN_MEMORY", 0)
    patch.setattr(canvas_images, "AT_ONCE", calls * 4 * 3 * toys.PX**2 * 4)
    patch.setattr(
        canvas_images.CanvasImages,
        "floats",
        lambda self, where: read.append(len(where)) or floats(self, where),
    )
    return read


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_parts_of_any_size_find_the_same_to_the_last_byte(root, way, tmp_path, monkeypatch):
    whole = evaluated(root, tmp_path / "whole", way)
    tables = [name for name in whole if name.endswith(".parquet")]
    assert len(tables) == 2
    (path,) = (tmp_path / "whole" / name for name in tables if "-linf-4_255-" in name)
    verdicts = pd.read_parquet(path)
    assert 0 < (verdicts.broken_at_eps != "").sum() < N - 4  # survivors fill more than one part
    for calls in (1, 2):
        with monkeypatch.context() as patch:
            read = streamed(patch, calls)
            assert evaluated(root, tmp_path / f"parts{calls}", way) == whole
        read.remove(min(N, model_checks.SAMPLE))  # once, for the checks of the model
        assert max(read) == 4 * calls
        assert sum(read) > 3 * N  # read again for every stage


def test_logits_that_went_to_disk_come_back_the_same(root, tmp_path, monkeypatch):
    from robustbench_vlm.evaluation import measure

    whole = evaluated(root, tmp_path / "whole", {}, ("ce", "square"))
    monkeypatch.setattr(measure, "SPOOLED", 1)
    assert evaluated(root, tmp_path / "disk", {}, ("ce", "square")) == whole


@forks
@pytest.mark.parametrize("way", WAYS[:2], ids=str)
def test_kills_between_and_inside_parts_leave_no_trace(root, way, tmp_path, monkeypatch):
    chain = toys.chain("aa", "ce", "square", rows=4)
    what = toys.subject(toys.dataset_card(), root)
    orders = {
        name: toys.request(tmp_path / name, chain, save_images=True, **way) for name in ("whole", "torn")
    }
    toys.run(what, orders["whole"])
    streamed(monkeypatch, 1)
    what = toys.subject(toys.dataset_card(), root)
    assert what.images.pixels is None
    counted = multiprocessing.get_context("fork").Value("i", 0)
    assert not killed(what, toys.request(tmp_path / "counted", chain, **way), 0, counted)
    draw = random.Random(0)
    kills = [killed(what, orders["torn"], draw.randint(20, counted.value // 2)) for _ in range(5)]
    assert sum(kills) >= 3
    toys.run(what, orders["torn"])
    assert outcome(tmp_path / "torn") == outcome(tmp_path / "whole")


def test_bad_images_are_left_out_wherever_pixels_lie(tmp_path, monkeypatch):
    """Positions among the good images are not positions on disk."""
    monkeypatch.setattr(canvas_images, "TOLERATED", 0.1)
    shard = [("s0.png", b"<html>"), ("s0.cls", b"0")]
    for i in range(1, 20):
        shard += [(f"s{i}.png", encode(noise(i))), (f"s{i}.cls", b"0")]
    one_shard(write_toy(tmp_path, n=1), tar_bytes(shard))
    split = open_split(card(size={}), tmp_path, "test")
    found = []
    for bound in (0, 10**6):
        monkeypatch.setattr(dataset, "IN_MEMORY", bound)
        images = canvas_images.decodable_images(split, 8, 0.1)
        assert (len(images), len(images.split.bad)) == (19, 1)
        found.append(images.floats(range(19)))
        i = images.split.keys.index("toy/test/s7")
        assert np.array_equal((found[-1][i] * 255).round().numpy().transpose(1, 2, 0), noise(7))
    assert torch.equal(*found)
    assert json.dumps(images.sha256)
