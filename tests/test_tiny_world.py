"""The tiny world: every image is a function of its own name, and what lies on disk is the common layout."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.data.tiny import render, scenes, strokes, words, worlds, write
from robustbench_vlm.errors import InputError

SMALL = "tiny-counts"
OF_TEST_SETS = {  # the first 16 digits of the SHA-256 of all images
    "tiny-seen": "4e5a6491b9e1bd05",
    "tiny-pairs": "0f2f4d2e45cf8eb4",
    "tiny-colours": "d7116f97c169a6cb",
    "tiny-outlines": "135439593c83f071",
    "tiny-textures": "25139ae1a8a2075c",
    "tiny-counts": "83b148447705e370",
    "tiny-positions": "ce011fa970b00672",
    "tiny-letters": "63dc5c93687f7748",
    "tiny-digits": "584de9eba0ee1fbd",
}
HASHES = """
import hashlib, numpy as np
from robustbench_vlm.data.tiny import worlds
for name, world in worlds.WORLDS.items():
    images = worlds.images(name, "test", np.arange(world.size["test"]))
    print(name, hashlib.sha256(images.tobytes()).hexdigest()[:16])
"""
OTHER_PROCESSORS = {
    "this one": {},
    "no AVX2": {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3", "OPENBLAS_CORETYPE": "Prescott"},
    "Haswell's kernels": {"OPENBLAS_CORETYPE": "Haswell"},
}


@pytest.mark.parametrize("processor", OTHER_PROCESSORS)
def test_images_are_the_same_bytes_on_every_processor(processor):
    environment = os.environ | OTHER_PROCESSORS[processor]
    command = [sys.executable, "-W", "ignore", "-c", HASHES]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert dict(line.split() for line in ran.stdout.splitlines()) == OF_TEST_SETS


def test_an_image_does_not_depend_on_how_many_are_drawn():
    for name in worlds.WORLDS:
        many = worlds.images(name, "test", np.arange(100))
        few = worlds.images(name, "test", np.array([70, 3]))
        assert np.array_equal(many[[70, 3]], few)
        assert np.array_equal(
            worlds.labels(name, np.arange(100))[[70, 3]], worlds.labels(name, np.array([70, 3]))
        )


def test_splits_differ_and_images_within_a_split_differ():
    test = worlds.images(worlds.SEEN, "test", np.arange(200))
    train = worlds.images(worlds.SEEN, "train", np.arange(200))
    assert len({image.tobytes() for image in (*test, *train)}) == 400


@pytest.mark.parametrize("name", list(worlds.WORLDS))
def test_images_have_the_stated_form_and_are_not_flat(name):
    pixels = worlds.images(name, "test", np.arange(60))
    assert pixels.shape == (60, 32, 32, 3)
    assert pixels.dtype == np.uint8
    assert (pixels.reshape(60, -1).std(1) > 2).all()


def test_pinned_images():
    """Means over 4 x 4 cells of a few images; grey levels may move by one where libm differs."""
    pixels = worlds.images(worlds.SEEN, "test", np.array([0, 21, 35])).astype(float)
    cells = pixels.reshape(3, 4, 8, 4, 8, 3).mean((2, 4, 5))
    assert np.allclose(cells, PINNED, atol=1.0)


@pytest.mark.parametrize("name", [name for name in worlds.WORLDS if name != worlds.DIGITS])
def test_classes_are_exactly_balanced(name):
    world = worlds.WORLDS[name]
    for size in world.size.values():
        counts = Counter(worlds.labels(name, np.arange(size)).tolist())
        assert set(counts) == set(range(len(world.classes)))
        assert set(counts.values()) == {size // len(world.classes)}


def test_the_seen_set_is_large_enough():
    seen = worlds.WORLDS[worlds.SEEN]
    assert len(seen.classes) >= 32
    assert seen.size["test"] >= 1000
    assert len(worlds.WORLDS) >= 8


def test_no_training_image_shows_a_held_out_pair():
    u = np.random.default_rng(0).random((20_000, 8), dtype=np.float32)
    drawn = words.sample(u)
    assert not words.held_out(drawn.colour, drawn.shape).any()
    pairs = worlds.WORLDS["tiny-pairs"].classes
    assert len(pairs) == 25
    assert not set(pairs) & set(worlds.WORLDS[worlds.SEEN].classes)


def test_unseen_letters_are_unseen():
    assert not set(worlds.WORLDS["tiny-letters"].classes) & set(worlds.WORLDS[worlds.SEEN].classes)


def test_digits_are_those_of_scikit_learn_in_its_order():
    from sklearn.datasets import load_digits

    digits = load_digits()
    index = np.arange(len(digits.target))
    assert np.array_equal(worlds.labels(worlds.DIGITS, index), digits.target)
    pixels = worlds.images(worlds.DIGITS, "test", index)
    assert (pixels == pixels[..., :1]).all()
    # averaging is not the inverse of bilinear enlarging, but keeps what an image shows
    small = pixels[..., 0].reshape(-1, 8, 4, 8, 4).mean((2, 4)) / 255 * 16
    assert np.corrcoef(small.ravel(), digits.images.ravel())[0, 1] > 0.97


def test_enlarging_keeps_constants_and_range():
    assert np.allclose(render.enlarge(np.full((1, 8, 8), 0.3, np.float32)), 0.3)
    scans = np.random.default_rng(0).random((5, 8, 8), dtype=np.float32)
    assert 0 <= render.enlarge(scans).min() <= render.enlarge(scans).max() <= 1


def test_every_glyph_has_its_ink_where_its_strokes_are():
    glyph = np.arange(len(strokes.GLYPHS))
    points = strokes.sheet().control.shape[1]
    still = np.zeros((len(glyph), points, 2), np.float32)
    starts, ends = strokes.segments(glyph, np.zeros(len(glyph), np.float32), still)
    gap = strokes.distance(starts, ends, 16)
    assert (gap.reshape(len(glyph), -1).min(1) < 0.1).all()
    assert np.abs(starts).max() <= 1.1


def test_a_stream_is_a_function_of_its_name():
    first, second, other = scenes.stream("x/1", 64), scenes.stream("x/1", 64), scenes.stream("x/2", 64)
    assert np.array_equal(first[0], second[0])
    assert first[1] == second[1]
    assert not np.array_equal(first[0], other[0])


def test_captions_name_what_the_classes_are_called():
    _, captions = scenes.stream("captions", 4000)
    said = " ".join(set(captions))
    assert "{" not in said
    for world in worlds.WORLDS.values():
        for name in world.classes:
            assert all(word in said for word in name.split()), name


@pytest.mark.parametrize("name", list(worlds.WORLDS))
def test_cards_say_what_the_world_is(name):
    world, card = worlds.WORLDS[name], reader.read("datasets", name, DatasetCard)
    assert card.folder == world.folder
    assert card.names == tuple(world.classes)
    assert card.templates == world.templates
    assert card.size == world.size
    assert card.native_px == 32
    assert card.made_by == "tiny"


def test_the_suite_holds_the_whole_world():
    suite = reader.read("suites", "tiny", Suite)
    assert set(suite.datasets) == set(worlds.WORLDS)
    assert suite.eps == ("4/255",)
    assert suite.n == 100
    assert suite.means == {"zeroshot": suite.datasets[1:]}


def _digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_layout_is_written_and_reads_back(tmp_path):
    (folder,) = write.make(tmp_path, [SMALL])
    world = worlds.WORLDS[SMALL]
    assert (folder / "classnames.txt").read_text().splitlines() == list(world.classes)
    templates = (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert tuple(templates) == world.templates
    assert (folder / "test" / "nshards.txt").read_text() == "1\n"
    expected = worlds.images(SMALL, "test", np.arange(3))
    with tarfile.open(folder / "test" / "0.tar") as tar:
        assert len(tar.getnames()) == 2 * world.size["test"]
        for i in range(3):
            with Image.open(tar.extractfile(f"s{i:07d}.png")) as image:
                assert np.array_equal(np.asarray(image), expected[i])
            assert int(tar.extractfile(f"s{i:07d}.cls").read()) == i % len(world.classes)


def test_writing_twice_gives_the_same_bytes_and_a_finished_split_is_left_alone(tmp_path):
    write.make(tmp_path / "a", [SMALL])
    before = (tmp_path / "a" / "wds_tiny-counts" / "test" / "0.tar").stat().st_mtime_ns
    calls = []
    write.make(tmp_path / "a", [SMALL], progress=lambda *seen: calls.append(seen))
    assert (tmp_path / "a" / "wds_tiny-counts" / "test" / "0.tar").stat().st_mtime_ns == before
    assert not calls
    write.make(tmp_path / "b", [SMALL], progress=lambda *seen: calls.append(seen))
    assert calls[-1] == (f"{SMALL}/test", 1000, 1000)
    assert _digest(tmp_path / "a") == _digest(tmp_path / "b")


def test_interrupted_writing_is_completed_by_the_next_run(tmp_path):
    def die(_name, done, _total):
        if done >= 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write.make(tmp_path / "a", [SMALL], progress=die)
    assert not (tmp_path / "a" / "wds_tiny-counts" / "test").exists()
    write.make(tmp_path / "a", [SMALL])
    write.make(tmp_path / "b", [SMALL])
    assert _digest(tmp_path / "a") == _digest(tmp_path / "b")


def test_an_unknown_dataset_is_named_with_its_neighbours(tmp_path):
    with pytest.raises(InputError, match="tiny-digits"):
        write.make(tmp_path, ["tiny-digit"])


PINNED = np.array(
    [
        [
            [159.8, 152.8, 155.2, 159.7],
            [156.4, 128.8, 125.7, 151.9],
            [155.6, 132.2, 128.7, 157.1],
            [159.8, 157.7, 155.2, 159.8],
        ],
        [
            [78.5, 80.6, 83.1, 77.4],
            [91.6, 99.2, 97.9, 77.5],
            [84.3, 91.2, 91.4, 79.0],
            [79.8, 79.9, 77.7, 77.8],
        ],
        [
            [154.2, 139.5, 144.4, 151.0],
            [153.1, 125.8, 126.5, 151.9],
            [150.8, 131.8, 131.3, 154.0],
            [148.2, 143.0, 138.0, 154.3],
        ],
    ]
)
