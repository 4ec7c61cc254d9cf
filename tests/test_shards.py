"""Whole shards are read as they are; damaged or hostile ones are one-line errors."""

import contextlib
import os
import pickle
import random
import tarfile
import time

import pytest
from folders import encode, noise, one_shard, samples, tar_bytes, write_toy

from robustbench_vlm.data import pixels
from robustbench_vlm.data.shards import index_folders, index_shards, is_sharded
from robustbench_vlm.errors import DataError

PNG = encode(noise(0))


def pair(name="s0", label=b"0", extension="png"):
    return [(f"{name}.{extension}", PNG), (f"{name}.cls", label)]


def test_index_finds_every_image_and_its_bytes(tmp_path):
    folder = write_toy(tmp_path)
    index = index_shards(folder, 3)
    wanted = samples(24)
    assert is_sharded(folder)
    assert index.ignored == 0
    assert [s.name for s in index.samples] == [name for name, *_ in wanted]
    assert [s.label for s in index.samples] == [label for *_, label in wanted]
    assert [s.read() for s in index.samples] == [image for _, image, *_ in wanted]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_dialect_and_extension(tmp_path, form):
    long = tarfile.TarInfo("./" + "t" * 120 + "/s9.png")
    long.mtime = 1.5  # a float time makes a PAX header
    members = [m for i, e in enumerate(["webp", "png", "jpg", "JPEG"]) for m in pair(f"s{i}", b" 2\n", e)]
    if form != tarfile.USTAR_FORMAT:
        members += [(long, PNG), ("t" * 120 + "/s9.cls", b"1")]
    index = index_shards(one_shard(tmp_path, tar_bytes(members, form)), 3)
    assert [s.label for s in index.samples] == [2] * 4 + [1] * (form != tarfile.USTAR_FORMAT)
    assert all(s.read() == PNG for s in index.samples)


def test_every_cut_before_the_end_mark_is_an_error(tmp_path):
    whole = tar_bytes(pair("s0") + pair("s1", b"1"))
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512 + 1024  # last header or payload block, then the mark
    odd = random.Random(0)
    cuts = {*range(0, end, 512), *range(1, end, 97), *(odd.randrange(end) for _ in range(100)), end - 1}
    for cut in sorted(cuts):
        with pytest.raises(DataError, match=r"0\.tar: .*again"):
            index_shards(one_shard(tmp_path, whole[:cut]), 3)
    assert len(index_shards(one_shard(tmp_path, whole[:end]), 3).samples) == 2  # only padding was cut


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_cuts_inside_extended_headers(tmp_path, form):
    whole = tar_bytes([("d" * 150 + "/s0.png", PNG), ("e" * 150 + "/s0.cls", b"0")], form)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512 + 1024
    for cut in range(0, end, 256):
        with pytest.raises(DataError, match=r"0\.tar"):
            index_shards(one_shard(tmp_path, whole[:cut]), 3)


def test_labels_and_keys_may_have_a_byte_order_mark(tmp_path):
    mark = b"\xef\xbb\xbf"
    members = [*pair(label=mark + b"1\r\n"), ("s0.key", mark + b"red/0.png")]
    (sample,) = index_shards(one_shard(tmp_path, tar_bytes(members)), 3).samples
    assert (sample.name, sample.label) == ("red/0.png", 1)


def test_random_damage_never_escapes_as_another_error(tmp_path):
    whole = bytearray(tar_bytes(pair("s0") + pair("s1", b"1"), tarfile.PAX_FORMAT))
    dice = random.Random(1)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(dice.randrange(1, 20)):
            damaged[dice.randrange(3000)] = dice.randrange(256)
        with contextlib.suppress(DataError):
            index_shards(one_shard(tmp_path, bytes(damaged)), 3)


def test_negative_size_does_not_loop(tmp_path):
    whole = bytearray(tar_bytes(pair()))
    whole[124:136] = (b"\xff" * 10) + b"\xfe\x00"  # base-256, negative
    whole[148:156] = b" " * 8
    whole[148:156] = f"{sum(whole[:512]):06o}\0 ".encode()
    with pytest.raises(DataError):
        index_shards(one_shard(tmp_path, bytes(whole)), 3)


def test_pickles_links_and_devices_are_never_touched(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle ran",))

    link = tarfile.TarInfo("s1.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("s2.png")
    device.type = tarfile.CHRTYPE
    others = [
        ("s0.pkl", pickle.dumps(Bomb())),
        ("s0.pyd", pickle.dumps(Bomb())),
        ("s0.cbor", b""),
        ("pipe:touch x.txt", b""),
        ("._s0.png", b"a Mac was here"),
        (link, None),
        (device, None),
    ]
    index = index_shards(one_shard(tmp_path, tar_bytes(pair() + others)), 3)
    assert [s.name for s in index.samples] == ["s0"]
    assert index.ignored == len(others)
    with pytest.raises(DataError, match="'s1' has no image"):
        index_shards(one_shard(tmp_path, tar_bytes([(link, None), ("s1.cls", b"0")])), 3)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (pair(label=b"abc"), r"0\.tar, s0\.cls: label 'abc'; expected an integer from 0 to 2"),
        (pair(label=b""), "label ''"),
        (pair(label=b"-1"), "label '-1'"),
        (pair(label=b"1.0"), r"label '1\.0'"),
        (pair(label="\u0661".encode()), "label"),  # a digit, but not an ASCII one
        (pair(label=b"1" * 100), "label '1111"),
        (pair(label=b"3"), r"s0\.cls: label 3 is outside the class list; expected an integer from 0 to 2"),
        (pair()[:1], "'s0' has no label"),
        (pair()[1:], "'s0' has no image"),
        (pair() + pair(), "'s0' has two images"),
        (pair() + pair(extension="jpg")[:1], "'s0' has two images"),
        ([*pair(), ("s0.cls", b"0")], "'s0' has two labels"),
        (pair("s\n0"), r"the name 's\\n0'"),
        (pair("s\udcff0"), r"the name 's\\udcff0'"),
        (pair("s\x1b[31m"), r"the name 's\\x1b"),
        ([("readme.txt", b"hello")], "no images in any shard"),
        ([], "no images in any shard"),
    ],
)
def test_bad_samples(tmp_path, members, message):
    with pytest.raises(DataError, match=message):
        index_shards(one_shard(tmp_path, tar_bytes(members)), 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no whole tar archive"),
        (b"<!DOCTYPE html><html>sign in</html>" * 100, "no whole tar archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
        (b"\x1f\x8b" + b"x" * 3000, "no whole tar archive"),
        (tar_bytes(pair()) + tar_bytes(pair("s1")), "glued"),
    ],
)
def test_files_that_are_no_shard(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        index_shards(one_shard(tmp_path, content), 3)


def test_a_key_in_two_shards(tmp_path):
    one_shard(tmp_path, tar_bytes(pair()), "2\n")
    (tmp_path / "1.tar").write_bytes(tar_bytes(pair()))
    with pytest.raises(DataError, match=r"1\.tar: key 's0' is also in 0\.tar"):
        index_shards(tmp_path, 3)


@pytest.mark.parametrize(
    ("nshards", "message"),
    [
        ("2\n", r"1\.tar missing; expected 2 shards"),
        ("9\n", r"1\.tar, 2\.tar, 3\.tar and 5 more missing"),
        ("two\n", "'two'"),
        ("0\n", "'0'"),
        ("", "''"),
    ],
)
def test_wrong_nshards(tmp_path, nshards, message):
    with pytest.raises(DataError, match=message):
        index_shards(one_shard(tmp_path, tar_bytes(pair()), nshards), 3)


def test_more_shards_than_stated_or_none_stated(tmp_path):
    one_shard(tmp_path, tar_bytes(pair()))
    (tmp_path / "7.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"7\.tar is there; expected 1 shards"):
        index_shards(tmp_path, 3)
    (tmp_path / "nshards.txt").unlink()
    assert is_sharded(tmp_path)
    with pytest.raises(DataError, match=r"nshards\.txt: no such file"):
        index_shards(tmp_path, 3)


def test_a_shard_that_shrinks_after_indexing(tmp_path):
    folder = one_shard(tmp_path, tar_bytes(pair()))
    sample = index_shards(folder, 3).samples[0]
    (folder / "0.tar").write_bytes(b"gone")
    with pytest.raises(DataError, match="s0: 0 bytes left"):
        sample.read()
    (folder / "0.tar").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        sample.read()


def test_folders_and_dots_of_members_are_part_of_the_key(tmp_path):
    members = pair("red/0") + pair("blue/0", b"1") + pair("./img.v2.final", b"2")
    members += [("red/0.mask.png", PNG), ("red/0.txt", b"a caption")]  # of the sample red/0, as in webdataset
    index = index_shards(one_shard(tmp_path, tar_bytes(members)), 3)
    assert [(s.name, s.label) for s in index.samples] == [("blue/0", 1), ("img.v2.final", 2), ("red/0", 0)]
    assert index.ignored == 2


@pytest.mark.parametrize("megabytes", [0.04, 2])
def test_extended_headers_are_bounded(tmp_path, megabytes):
    whole = tar_bytes([(f"{'1' * int(megabytes * 2**20)}.png", PNG), ("s0.cls", b"0")], tarfile.PAX_FORMAT)
    began = time.perf_counter()
    with pytest.raises(DataError, match=r"0\.tar: no whole tar archive .an extended header of \d+ bytes"):
        index_shards(one_shard(tmp_path, whole), 3)
    assert time.perf_counter() - began < 1


def test_only_regular_files_are_opened(tmp_path):
    folder = one_shard(tmp_path / "shards", tar_bytes(pair()))
    sample = index_shards(folder, 3).samples[0]
    (folder / "0.tar").unlink()
    os.mkfifo(folder / "0.tar")
    for read in (lambda: index_shards(folder, 3), sample.read):
        with pytest.raises(DataError, match=r"cannot be read .not a regular file"):
            read()
    (folder / "nshards.txt").unlink()
    os.mkfifo(folder / "nshards.txt")
    with pytest.raises(DataError, match="unreadable"):
        index_shards(folder, 3)
    (tmp_path / "tree/a").mkdir(parents=True)
    os.mkfifo(tmp_path / "tree/a/x.png")
    os.mkfifo(tmp_path / "tree/a/x.bin")
    index = index_folders(tmp_path / "tree", ("a",))
    with pytest.raises(DataError, match="not a regular file"):
        index.samples[0].read()


def test_links_are_followed_and_every_decoded_format_is_read(tmp_path):
    tree, away = tmp_path / "tree", tmp_path / "away"
    for file in (tree / "a/1.png", tree / "a/2.BMP", tree / "a/3.gif", tree / "a/4.tiff", away / "5.webp"):
        file.parent.mkdir(parents=True, exist_ok=True)
        kind = {"bmp": "BMP", "gif": "GIF", "tiff": "TIFF", "webp": "WEBP"}.get(
            file.suffix[1:].lower(), "PNG"
        )
        file.write_bytes(encode(noise(0), kind))
    (tree / "a/more").symlink_to(away)
    (tree / "b").symlink_to(away)
    index = index_folders(tree, ("a", "b"))
    names = ["a/1.png", "a/2.BMP", "a/3.gif", "a/4.tiff", "a/more/5.webp", "b/5.webp"]
    assert [s.name for s in index.samples] == names
    assert [pixels.rgb(s.read(), s.name).size for s in index.samples] == [(8, 8)] * 6
    (away / "up").symlink_to(tree)
    with pytest.raises(DataError, match="a link to a folder above itself"):
        index_folders(tree, ("a", "b"))


def test_images_that_are_left_out_are_named(tmp_path):
    for file in (
        "a/x.png",
        "a/y.heic",
        "a/z.dat",
        ".old/w.png",
        "a/._x.png",
        "v.jpg",
        "a/.DS_Store",
        "a/t.txt",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(
            PNG if file[-3:] in ("png", "jpg", "dat") and "._" not in file else b"\0\5"
        )
    index = index_folders(tmp_path, ("a",))
    assert index.left_out == (".old/w.png", "a/y.heic", "a/z.dat", "v.jpg")
    assert index.ignored == 7


def test_class_folders(tmp_path):
    for file in ("b/x.JPEG", "b/deep/y.png", "a/z.webp", "c/.hidden.png", "c/w.jpg"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(PNG)
    (tmp_path / "a/notes.txt").write_text("no image")
    index = index_folders(tmp_path, ("a", "b", "c"))
    assert (index.rule, index.ignored, index.left_out) == ("name", 2, ("c/.hidden.png",))
    found = [(s.name, s.label) for s in index.samples]
    assert found == [("a/z.webp", 0), ("b/deep/y.png", 1), ("b/x.JPEG", 1), ("c/w.jpg", 2)]
    assert index.samples[0].read() == PNG
    index = index_folders(tmp_path, ("c", "b", "a"))  # the folders say which class they are
    assert [s.label for s in index.samples] == [2, 1, 1, 0]
    with pytest.raises(DataError, match="3 of 3 classes are none of the 3 class names: a, b, c"):
        index_folders(tmp_path, ("wolf", "bear", "cat"))
    with pytest.raises(DataError, match="3 class folders; expected 4"):
        index_folders(tmp_path, ("a", "b", "c", "d"))
