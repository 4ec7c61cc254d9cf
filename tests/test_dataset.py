"""Opening, subsets and identities of splits."""

import hashlib
import os
import shutil

import numpy as np
import pytest
import torch
from folders import (
    NAMES,
    TEMPLATES,
    card,
    encode,
    folder_sha,
    noise,
    one_shard,
    samples,
    tar_bytes,
    write_toy,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robustbench_vlm import rng
from robustbench_vlm.data import canvas_images, layout
from robustbench_vlm.data.dataset import Entry, Split, majority, missing, open_split
from robustbench_vlm.data.shards import Sample
from robustbench_vlm.errors import DataError


def named(keys):
    """A split of these keys without files."""
    entries = tuple(Entry(key, 0, Sample(key, 0, None)) for key in sorted(keys))
    return Split(card(), "test", None, entries)


def test_open_and_read(tmp_path):
    write_toy(tmp_path)
    split = open_split(card(), tmp_path, "test")
    assert len(split) == 24
    assert split.notes == ()
    assert split.keys[7] == "toy/test/s0000007"
    example = split.read(7, px=224)  # the canvas is native: the model's size changes nothing
    assert example.key == split.keys[7]
    assert example.label == 1
    assert example.sha256 == hashlib.sha256(samples(24)[7][1]).hexdigest()
    assert np.array_equal(example.pixels, noise(7))


def test_images_are_in_entry_order(tmp_path):
    write_toy(tmp_path)
    split = open_split(card(), tmp_path, "test").subset(9, seed=3)
    images = split.images(px=8)
    assert images.pixels.dtype == np.uint8
    assert images.pixels.shape == (9, 8, 8, 3)
    assert images.labels.dtype == np.int64
    assert images.keys == split.keys
    for i in range(9):
        example = split.read(i, px=8)
        assert np.array_equal(images.pixels[i], example.pixels)
        assert (images.labels[i], images.sha256[i]) == (example.label, example.sha256)


def test_opening_decodes_nothing(tmp_path):
    one_shard(write_toy(tmp_path), tar_bytes([("s0.png", b"no image"), ("s0.cls", b"0")]))
    for extra in ("1.tar", "2.tar"):
        (tmp_path / "wds_toy/test" / extra).unlink()
    split = open_split(card(size={}), tmp_path, "test")
    with pytest.raises(DataError, match=r"0\.tar, toy/test/s0: not a whole image"):
        split.read(0, 8)
    with pytest.raises(DataError, match="toy/test/s0"):
        split.images(8)


def test_a_few_bad_images_are_left_out_and_named_and_more_fail(tmp_path):
    rows = samples(2000)
    rows[7] = ("s0000007", b"<html>sign in", "png", 1)
    rows[1999] = ("s0001999", encode(noise(1))[:60], "png", 0)
    layout.write_texts(tmp_path / "wds_toy", NAMES, TEMPLATES)
    layout.write_split(tmp_path / "wds_toy", "test", rows, 500)
    split = open_split(card(size={}), tmp_path, "test")
    images = canvas_images.decodable_images(split, 8)
    whole, floats = images.split, images.floats(range(1998))
    assert len(whole) == len(images) == len(images.pixels) == len(images.sha256) == 1998
    assert len(whole.bad) == 2
    assert "toy/test/s0000007: not a whole image (a web page)" in whole.bad[0]
    assert "s0001999" in whole.bad[1]
    assert whole.sha256 != split.sha256  # such a row is not mistaken for one on all images
    i = whole.keys.index("toy/test/s0000100")
    assert np.array_equal(images.pixels[i], noise(100))
    assert torch.equal(floats[i], torch.from_numpy(noise(100)).permute(2, 0, 1).to(torch.float32).div(255))
    assert whole.labels[i] == 100 % 3
    with pytest.raises(
        DataError, match=r"more than 1 undecodable images of 2000: .*s0000007.* \| .*s0001999"
    ):
        canvas_images.decodable_images(split, 8, 0.0005)
    with pytest.raises(DataError, match="s0000007"):
        split.images(8)
    clean = split.subset(5)
    assert canvas_images.decodable_images(clean, 8).split is clean


def test_model_canvas_takes_the_models_size(tmp_path):
    write_toy(tmp_path, px=20)
    split = open_split(card(canvas="model", native_px=0), tmp_path, "test")
    assert split.read(0, 12).pixels.shape == (12, 12, 3)
    assert split.images(16).pixels.shape == (24, 16, 16, 3)


def test_identity_does_not_depend_on_shards(tmp_path):
    write_toy(tmp_path / "a", per_shard=24)
    order = np.random.default_rng(0).permutation(24)
    write_toy(tmp_path / "b", per_shard=5, order=order)
    a, b = (open_split(card(), tmp_path / side, "test") for side in "ab")
    assert a.keys == b.keys
    assert a.sha256 == b.sha256
    assert a.subset(10).sha256 == b.subset(10).sha256 != a.sha256
    assert a.subset(10, 1).sha256 != a.subset(10, 0).sha256
    images = [side.subset(10).images(8) for side in (a, b)]
    shas = [folder_sha(i.keys, i.labels, i.sha256) for i in images]
    assert shas[0] == shas[1]
    assert folder_sha(images[0].keys, images[0].labels, images[0].sha256[::-1]) != shas[0]


keys = st.sets(st.text("abc0123/", min_size=1, max_size=8), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(keys=keys, seed=st.integers(0, 3), n=st.integers(0, 50), m=st.integers(0, 50), mix=st.randoms())
def test_subsets_nest_and_ignore_order(keys, seed, n, m, mix):
    split = named(keys)
    small, large = (split.subset(size or len(keys), seed) for size in sorted((n or 99, m or 99)))
    assert set(small.keys) <= set(large.keys)
    assert list(small.keys) == sorted(small.keys)
    assert len(small) == min(len(keys), min(n or 99, m or 99))
    shuffled = list(split.entries)
    mix.shuffle(shuffled)
    other = Split(split.card, "test", None, tuple(shuffled)).subset(n or 1, seed)
    if (n or 1) < len(keys):
        assert other.keys == split.subset(n or 1, seed).keys
        worst = max(rng.rank(seed, key) for key in other.keys)
        assert all(rng.rank(seed, key) > worst for key in set(split.keys) - set(other.keys))


@given(n=st.integers(1, 40), seed=st.integers(0, 3))
def test_stratified_subsets_nest_and_hold_every_class_as_equally_as_they_can(n, seed):
    entries = tuple(Entry(f"toy/test/{i:03d}", i % 3, Sample(str(i), i % 3, None)) for i in range(40))
    split = Split(card(), "test", None, entries)
    drawn = split.subset(n, seed, stratified=True)
    counts = np.bincount(drawn.labels, minlength=3)
    assert len(drawn) == n
    assert counts.max() - counts.min() <= 1
    assert set(split.subset(n - 1, seed, stratified=True).keys if n > 1 else ()) <= set(drawn.keys)


def test_subset_edges():
    split = named({"a", "b", "c"})
    assert split.subset(0) is split
    assert split.subset(3) is split
    assert split.subset(7) is split
    with pytest.raises(ValueError, match="-1"):
        split.subset(-1)


def test_frozen_subset():
    """Published subsets must never change: these were computed once and written down."""
    split = named({f"toy/test/s{i:07d}" for i in range(24)})
    assert [key[-2:] for key in split.subset(5, seed=0).keys] == ["01", "04", "06", "15", "23"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["red", "lime", "blue"], r"classnames\.txt, line 2: 'lime'; expected 'green' by the card"),
        (["red", "green"], "line 3: no line; expected 'blue'"),
        (["red", "green", "blue", "grey"], "line 4: 'grey'; expected no line"),
        (["red", "", "blue"], "line 2: ''; expected 'green'"),
        ([], "line 1: no line; expected 'red'"),
    ],
)
def test_class_names_must_be_the_cards(tmp_path, lines, message):
    write_toy(tmp_path)
    (tmp_path / "wds_toy/classnames.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        open_split(card(), tmp_path, "test")


def test_other_spellings_of_the_same_names_are_noted(tmp_path):
    write_toy(tmp_path)
    (tmp_path / "wds_toy/classnames.txt").write_text("apple_pie\nT-shirt\nblue\n")
    notes = open_split(card(names=("apple pie", "t shirt", "blue")), tmp_path, "test").notes
    assert notes == ("class names in the folder are spelt differently from the card's; the card's are used",)


def test_blank_class_names_and_trailing_blank_lines(tmp_path):
    write_toy(tmp_path)
    (tmp_path / "wds_toy/classnames.txt").write_text("red\n\nblue\n\n\n")
    assert len(open_split(card(names=("red", "", "blue")), tmp_path, "test")) == 24


def test_text_files(tmp_path):
    folder = write_toy(tmp_path).parent
    templates = folder / "zeroshot_classification_templates.txt"
    templates.write_text("a drawing of a {c}.\n")
    assert "templates differ" in open_split(card(), tmp_path, "test").notes[0]
    templates.unlink()
    assert "no templates file" in open_split(card(), tmp_path, "test").notes[0]
    (folder / "dataset_type.txt").write_text("multilabel\n")
    with pytest.raises(DataError, match="'multilabel'; expected classification"):
        open_split(card(), tmp_path, "test")
    (folder / "dataset_type.txt").unlink()
    (folder / "classnames.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="expected UTF-8 text"):
        open_split(card(), tmp_path, "test")
    (folder / "classnames.txt").unlink()
    with pytest.raises(DataError, match="no such file; expected the 3 class names"):
        open_split(card(), tmp_path, "test")


def test_notes_on_size_and_ignored_files(tmp_path):
    place = write_toy(tmp_path, n=1)
    one_shard(place, tar_bytes([("s0.png", encode(noise(0))), ("s0.cls", b"0"), ("s0.json", b"{}")]))
    notes = open_split(card(), tmp_path, "test").notes
    assert notes == (
        "1 files that are neither images nor labels were ignored",
        "2 of 3 classes have no image: green, blue",
        "1 images, where the card says 24",
    )


def test_class_folders(tmp_path):
    for i, name in enumerate(NAMES):
        (tmp_path / "wds_toy/val" / name).mkdir(parents=True)
        (tmp_path / "wds_toy/val" / name / "x.png").write_bytes(encode(noise(i)))
    split = open_split(card(), tmp_path, "val")
    assert split.keys == ("toy/val/blue/x.png", "toy/val/green/x.png", "toy/val/red/x.png")
    assert split.labels.tolist() == [2, 1, 0]
    assert np.array_equal(split.read(2, 8).pixels, noise(0))
    assert not split.notes
    (tmp_path / "wds_toy/val/red").rename(tmp_path / "wds_toy/val/Red")
    split = open_split(card(), tmp_path, "val")
    assert dict(zip(split.keys, split.labels, strict=True))["toy/val/Red/x.png"] == 0
    assert split.notes == ("class folders are matched to class names by spelling",)
    (tmp_path / "wds_toy/val/Red").rename(tmp_path / "wds_toy/val/n01")
    with pytest.raises(DataError, match="1 of 3 classes are none of the 3 class names: n01"):
        open_split(card(), tmp_path, "val")


def test_what_looks_like_an_image_is_one_by_its_bytes(tmp_path):
    for i, name in enumerate(NAMES):
        (tmp_path / "wds_toy/val" / name).mkdir(parents=True)
        (tmp_path / "wds_toy/val" / name / "x.png").write_bytes(encode(noise(i)))
    red = tmp_path / "wds_toy/val/red"
    (red / "cars.txt").write_text("BMW and other makers")
    (red / "a.wav").write_bytes(b"RIFF\0\0\0\0WAVEfmt \0\0\0")
    split = open_split(card(), tmp_path, "val")
    assert split.flags == ()
    assert split.notes == ("2 files that are neither images nor labels were ignored",)
    for kind in ("bmp", "webp", "tiff", "gif"):
        (red / f"no ending {kind}").write_bytes(encode(noise(3), kind))
    for ending in ("jpx", "jpf", "qoi", "sgi", "icns", "xbm", "eps"):
        (red / f"y.{ending}").write_bytes(b"x")
    (red / "more").symlink_to(tmp_path / "nowhere")
    split = open_split(card(), tmp_path, "val")
    assert split.flags == ("images-left-out",)
    assert "12 images were left out, hidden, dead links or of a format" in split.notes[1]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    for name in NAMES:
        (tmp_path / "wds_toy/val" / name / "deep").mkdir(parents=True)
        (tmp_path / "wds_toy/val" / name / "x.png").write_bytes(encode(noise(1)))
    scan = os.scandir

    def scandir(path):  # as for another user than root
        if str(path).endswith("red/deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"red/deep: cannot be read \(Permission denied\)"):
        open_split(card(), tmp_path, "val")


def test_missing_datasets_say_how_to_get_them(tmp_path):
    write_toy(tmp_path)
    hub = card(name="cars", folder="wds_cars", source={"hub": "clip-benchmark/wds_cars", "revision": "abc"})
    tiny = card(name="tiny-seen", folder="wds_tiny-seen", made_by="tiny")
    lines = missing([card(), hub, tiny], tmp_path, "test")
    assert len(lines) == 2
    assert f"vlmrob data fetch cars --root {tmp_path}" in lines[0]
    assert lines[0].startswith("cars: no ")
    assert "vlmrob data make tiny" in lines[1]
    with pytest.raises(
        DataError, match=r"dataset tiny-seen: no folder .*; make it with: vlmrob data make tiny"
    ):
        open_split(tiny, tmp_path, "test")
    with pytest.raises(DataError, match="no split 'val'; expected one of: test"):
        open_split(card(), tmp_path, "val")
    shutil.rmtree(tmp_path / "wds_toy/test")
    (tmp_path / "wds_toy/test").mkdir()
    with pytest.raises(DataError, match="0 class folders"):
        open_split(card(), tmp_path, "test")


def test_majority():
    assert majority(np.array([0, 1, 1, 2]), 3) == 0.5
    assert majority(np.array([], dtype=np.int64), 3) == 0.0
