"""Batches are a pure function of the step."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from folders import card, noise, one_shard, tar_bytes, write_toy

from robustbench_vlm.data import dataset, loader
from robustbench_vlm.data.dataset import open_split
from robustbench_vlm.errors import DataError


@pytest.fixture
def split(tmp_path):
    write_toy(tmp_path)
    return open_split(card(), tmp_path, "test")


def same(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.keys == b.keys


def test_batches_hold_what_their_keys_say(split):
    (batch,) = loader.batches(split, 7, seed=0, start_step=2, stop_step=3, px=8)
    assert batch.images.shape == (7, 3, 8, 8)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous()
    assert batch.labels.dtype == torch.int64
    for image, label, key in zip(batch.images, batch.labels, batch.keys, strict=True):
        number = int(key[-7:])
        wanted = torch.from_numpy(noise(number)).permute(2, 0, 1).to(torch.float32).div(255)
        assert torch.equal(image, wanted)
        assert label == number % 3


@pytest.mark.parametrize("kept", [True, False])
def test_resume_gives_the_same_batches(split, kept, monkeypatch):
    whole = list(loader.batches(split, 7, 0, 0, 12, px=8))
    if not kept:
        monkeypatch.setattr(dataset, "IN_MEMORY", 0)
    for start in (0, 1, 5, 11, 12):
        resumed = list(loader.batches(split, 7, 0, start, 12, px=8))
        assert len(resumed) == 12 - start
        assert all(same(a, b) for a, b in zip(resumed, whole[start:], strict=True))


@pytest.mark.parametrize("batch_size", [1, 5, 24, 100])
def test_every_epoch_holds_every_image_once(split, batch_size):
    steps = -(-3 * len(split) // batch_size)
    order = [key for batch in loader.batches(split, batch_size, 1, 0, steps, px=8) for key in batch.keys]
    epochs = [tuple(order[i * 24 : (i + 1) * 24]) for i in range(3)]
    assert all(Counter(epoch) == Counter(split.keys) for epoch in epochs)
    assert len({*epochs, split.keys}) == 4  # shuffled, each time anew


def test_order_does_not_depend_on_batch_size_and_does_on_the_seed(split):
    def order(size, seed):
        steps = range(48 // size)
        return np.concatenate([loader.positions(split, size, seed, step) for step in steps]).tolist()

    assert order(1, 0) == order(6, 0) == order(24, 0) == order(48, 0)
    assert order(6, 0) != order(6, 1)


def test_a_bad_image_is_named_and_stops_at_its_batch(tmp_path, monkeypatch):
    place = write_toy(tmp_path, n=1)
    one_shard(place, tar_bytes([("s0.png", b"<html>"), ("s0.cls", b"0")]))
    split = open_split(card(size={}), tmp_path, "test")
    for limit in (dataset.IN_MEMORY, 0):
        monkeypatch.setattr(dataset, "IN_MEMORY", limit)
        with pytest.raises(DataError, match=r"0\.tar, toy/test/s0: not a whole image \(a web page\)"):
            next(loader.batches(split, 2, 0, 0, 5, px=8))


def test_stopping_early_leaves_no_threads(split, monkeypatch):
    monkeypatch.setattr(dataset, "IN_MEMORY", 0)
    stream = loader.batches(split, 4, 0, 0, 10**6, px=8)
    assert len(list(islice(stream, 3))) == 3
    stream.close()


def test_misuse(split):
    for size, start in ((0, 0), (4, -1)):
        with pytest.raises(ValueError, match="batch size"):
            next(loader.batches(split, size, 0, start, 2, px=8))
