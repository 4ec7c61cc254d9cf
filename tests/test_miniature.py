"""Miniatures have the real layout, the real class names, and the same bytes every time."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import layout, miniature
from robustbench_vlm.data.dataset import open_split
from robustbench_vlm.errors import DataError, InputError

NAMES = sorted(
    name
    for name in reader.names("datasets")
    if reader.read("datasets", name, DatasetCard).source.hub.startswith("clip-benchmark/")
)


def card(name):
    return reader.read("datasets", name, DatasetCard)


def members(folder):
    found = {}
    shards = int((folder / "nshards.txt").read_text())
    for i in range(shards):
        with tarfile.open(folder / f"{i}.tar", "r:") as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return found


def tree(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_card_has_one_that_is_read_back(name, tmp_path):
    facts = card(name)
    folder = miniature.make(facts, tmp_path, n=6)
    assert folder == tmp_path / facts.folder
    assert (folder / layout.CLASSNAMES).read_text().splitlines() == list(facts.names)
    assert (folder / layout.TEMPLATES).read_text().splitlines() == list(facts.templates)
    assert (folder / "test" / layout.NSHARDS).read_text() == "3\n"
    split = open_split(facts, tmp_path, "test")
    assert split.keys == tuple(f"{name}/test/s{i:07d}" for i in range(6))
    assert len(set(split.labels)) == min(6, facts.n_classes)
    pixels = split.images(32).pixels
    side = facts.native_px or 32
    assert pixels.shape == (6, side, side, 3)
    assert all(image.std() > 4 for image in pixels)
    assert len({image.tobytes() for image in pixels}) == 6


def test_formats_modes_and_sizes_vary_where_the_canvas_is_the_model_s(tmp_path):
    found = members(miniature.make(card("dtd"), tmp_path, n=36) / "test")
    pictures = {
        name: Image.open(io.BytesIO(content)) for name, content in found.items() if not name.endswith(".cls")
    }
    assert len(pictures) * 2 == len(found)
    kinds = {(name.partition(".")[2], picture.format, picture.mode) for name, picture in pictures.items()}
    assert kinds == {
        ("jpg", "JPEG", "RGB"),
        ("jpg", "JPEG", "L"),
        ("png", "PNG", "RGB"),
        ("png", "PNG", "P"),
        ("png", "PNG", "L"),
        ("webp", "WEBP", "RGB"),
    }
    ratios = {round(picture.width / picture.height, 1) for picture in pictures.values()}
    assert {1.0, 1.3, 0.5, 1.8} <= ratios
    short = {min(picture.size) for picture in pictures.values()}
    assert min(short) < 224 < max(short)


def test_native_images_are_lossless_and_of_the_native_size(tmp_path):
    found = members(miniature.make(card("stl10"), tmp_path, n=4) / "test")
    pictures = [Image.open(io.BytesIO(found[name])) for name in found if not name.endswith(".cls")]
    assert {(picture.format, picture.mode, picture.size) for picture in pictures} == {
        ("PNG", "RGB", (96, 96)),
        ("WEBP", "RGB", (96, 96)),
    }


@pytest.mark.parametrize(("extension", "mode"), [("png", "RGB"), ("webp", "RGB")])
def test_lossless_is_lossless(extension, mode):
    pixels = miniature.picture("a", "b", 20, 30)
    assert pixels.shape == (30, 20, 3)
    content = miniature.encode(pixels, extension, mode)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), pixels)


def test_same_arguments_same_bytes(tmp_path):
    first = tree(miniature.make(card("oxford_pets"), tmp_path / "a", n=7))
    again = tree(miniature.make(card("oxford_pets"), tmp_path / "b", n=7))
    other = tree(miniature.make(card("oxford_pets"), tmp_path / "c", n=7, seed=1))
    assert first == again
    assert first.keys() == other.keys()
    assert first["test/0.tar"] != other["test/0.tar"]
    assert first["classnames.txt"] == other["classnames.txt"]


def test_per_class_and_few_images(tmp_path):
    split = open_split(card("cifar10"), miniature.make(card("cifar10"), tmp_path, per_class=2).parent, "test")
    assert np.bincount(split.labels).tolist() == [2] * 10
    one = miniature.make(card("pcam"), tmp_path, n=1)
    assert (one / "test" / layout.NSHARDS).read_text() == "1\n"
    for wrong in ({"n": 0}, {"per_class": 0}, {"n": -3}):
        with pytest.raises(InputError, match="at least one"):
            miniature.make(card("dtd"), tmp_path, **wrong)


def test_labels_of_one_s_own_change_no_image(tmp_path):
    facts = card("eurosat")
    plain = members(miniature.make(facts, tmp_path / "a", n=5) / "test")
    chosen = members(
        miniature.make(facts, tmp_path / "b", n=5, labels={"s0000001": 7, "s0000004": 0}) / "test"
    )
    assert plain.keys() == chosen.keys()
    changed = {name for name in plain if plain[name] != chosen[name]}
    assert changed <= {"s0000001.cls", "s0000004.cls"}
    assert (chosen["s0000001.cls"], chosen["s0000004.cls"]) == (b"7", b"0")


def test_labels_that_cannot_be(tmp_path):
    with pytest.raises(DataError, match="no such image"):
        miniature.make(card("pcam"), tmp_path, n=2, labels={"s0000002": 0})
    for label in (2, -1):
        with pytest.raises(DataError, match="an integer from 0 to 1"):
            miniature.make(card("pcam"), tmp_path, n=2, labels={"s0000000": label})
    assert not list(tmp_path.iterdir())


def test_a_finished_one_is_left_alone(tmp_path):
    facts = card("pcam")
    folder = miniature.make(facts, tmp_path, n=3)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert miniature.make(facts, tmp_path, n=9, seed=4) == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    split = open_split(facts, tmp_path, "test")
    labels = {entry.sample.name: entry.label for entry in split.entries}
    miniature.make(facts, tmp_path, n=3, labels=labels)
    with pytest.raises(DataError, match="with other labels"):
        miniature.make(facts, tmp_path, n=3, labels={"s0000000": 1 - labels["s0000000"]})


def test_a_second_split_goes_beside_the_first(tmp_path):
    facts = card("pcam")
    folder = miniature.make(facts, tmp_path, n=2)
    first = tree(folder)
    miniature.make(facts, tmp_path, n=2, split="train")
    assert first.items() <= tree(folder).items()
    assert tree(folder)["train/0.tar"] != first["test/0.tar"]


def test_real_data_is_never_touched(tmp_path):
    facts = card("pcam")
    real = tmp_path / facts.folder
    (real / "test").mkdir(parents=True)
    (real / "test" / "0.tar").write_bytes(b"half a download")
    before = tree(tmp_path)
    with pytest.raises(DataError, match="real dataset"):
        miniature.make(facts, tmp_path, n=2)
    assert tree(tmp_path) == before


def samples(n=5):
    return [(f"s{i:07d}", bytes([i]) * 600, "png", i) for i in range(n)]


def test_writer_cuts_shards_and_takes_a_generator(tmp_path):
    assert layout.write_split(tmp_path, "test", iter(samples()), 2) == 3
    assert sorted(path.name for path in (tmp_path / "test").iterdir()) == [
        "0.tar",
        "1.tar",
        "2.tar",
        "nshards.txt",
    ]
    found = members(tmp_path / "test")
    assert found["s0000003.png"] == bytes([3]) * 600
    assert found["s0000003.cls"] == b"3"
    assert layout.write_split(tmp_path, "test", iter(()), 2) == 3


@pytest.mark.parametrize(
    ("last", "says"),
    [
        (("s0000000", b"", "png", 0), "occurs twice"),
        (("s.1", b"", "png", 0), "member name"),
        (("a/b", b"", "png", 0), "member name"),
        (("", b"", "png", 0), "member name"),
        (("s9", b"", "heic", 0), "extension"),
        (("s9", b"", "png", -1), "label -1"),
    ],
)
def test_writer_refuses_and_leaves_nothing_behind(last, says, tmp_path):
    with pytest.raises(DataError, match=says):
        layout.write_split(tmp_path, "test", [*samples(), last], 2)
    assert not list(tmp_path.iterdir())


def test_writer_stopped_half_way_leaves_nothing_behind(tmp_path):
    def stopped():
        yield from samples(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        layout.write_split(tmp_path, "test", stopped(), 2)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="no samples"):
        layout.write_split(tmp_path, "test", [], 2)
    assert not list(tmp_path.iterdir())


def test_writer_does_not_finish_what_another_began(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.tar").touch()
    with pytest.raises(DataError, match=r"without nshards\.txt"):
        layout.write_split(tmp_path, "test", samples(), 2)


def test_of_two_writers_of_one_split_the_first_to_finish_wins(tmp_path):
    def overtaken():
        yield from samples(3)
        layout.write_split(tmp_path, "test", samples(4), 1)

    assert layout.write_split(tmp_path, "test", overtaken(), 2) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["test"]
    (tmp_path / "test" / layout.NSHARDS).write_bytes(b"\xef\xbb\xbf4\r\n")
    assert layout.write_split(tmp_path, "test", samples(), 2) == 4
    (tmp_path / "test" / layout.NSHARDS).write_bytes(b"four")
    with pytest.raises(DataError, match="no number; expected the number of shards"):
        layout.write_split(tmp_path, "test", samples(), 2)


@pytest.mark.parametrize("name", ["red\x07", "red\x7f", "red\x85", "x" * 10_001])
def test_texts_that_no_card_may_contain_are_refused_before_anything_is_written(tmp_path, name):
    for names, templates in ((["a", name], ["{c}"]), (["a", "b"], ["{c}", name])):
        with pytest.raises(DataError, match=r"a control character|an entry of 10001 characters"):
            layout.write_texts(tmp_path / "x", names, templates)
    assert not list(tmp_path.iterdir())


def test_texts_are_the_same_with_other_ends_of_lines(tmp_path):
    layout.write_texts(tmp_path, ["a", "b", ""], ["{c}"])
    for name in (layout.CLASSNAMES, layout.TEMPLATES):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    layout.write_texts(tmp_path, ["a", "b", ""], ["{c}"])
    (tmp_path / layout.CLASSNAMES).write_bytes(b"\xff")
    with pytest.raises(DataError, match="another list"):
        layout.write_texts(tmp_path, ["a", "b", ""], ["{c}"])


def test_texts_keep_blank_names_and_refuse_line_breaks(tmp_path):
    layout.write_texts(tmp_path, ["near", "", "far"], ["{c} shapes."])
    assert (tmp_path / layout.CLASSNAMES).read_bytes() == b"near\n\nfar\n"
    layout.write_texts(tmp_path, ["near", "", "far"], ["{c} shapes."])
    with pytest.raises(DataError, match="another list"):
        layout.write_texts(tmp_path, ["near", "far"], ["{c} shapes."])
    with pytest.raises(DataError, match="line break"):
        layout.write_texts(tmp_path / "b", ["a\nb"], ["{c}"])
    assert not (tmp_path / "b").exists()
