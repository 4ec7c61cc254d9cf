"""A dataset is what its card and its manifest say, or every difference is told, one line each."""

import json

import numpy as np
import pytest
from command_line import run_command as vlmrob
from folders import NAMES, TEMPLATES, card, encode, noise, one_shard, samples, tar_bytes, write_toy

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.data import check, layout, manifest, miniature
from robustbench_vlm.data.dataset import open_split
from robustbench_vlm.errors import DataError


def checked(root, split="test", **options):
    return check.check(card(**options.pop("card", {})), root, split, lambda *_: None, **options)


def test_a_whole_dataset_gets_a_manifest_that_later_checks_hold_it_to(tmp_path):
    place = write_toy(tmp_path)
    first = checked(tmp_path, decode=True)
    assert (first.images, first.classes, first.shards) == (24, 3, 3)
    assert first.problems == first.notes == ()
    assert first.manifest == "recorded"
    assert first.size == sum(path.stat().st_size for path in tmp_path.rglob("*.t*") if path.is_file())
    known = manifest.read(place.parent)
    assert known.images == {"test": 24}
    assert {path for path in known.files if path.startswith("test/")} == {
        "test/0.tar",
        "test/1.tar",
        "test/2.tar",
        "test/nshards.txt",
    }
    before = (place.parent / manifest.FILE).read_bytes()
    assert checked(tmp_path).manifest == "same"
    assert (place.parent / manifest.FILE).read_bytes() == before


def test_every_change_of_a_file_is_found_by_its_hash(tmp_path):
    place = write_toy(tmp_path)
    checked(tmp_path)
    shard = place / "1.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1  # a bit of an image's bytes: the archive is whole and the size the same
    shard.write_bytes(bytes(content))
    found = checked(tmp_path)
    assert len(found.problems) == 1
    assert "1.tar: SHA-256" in found.problems[0]
    assert "in the manifest" in found.problems[0]
    assert found.manifest == ""
    (place.parent / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    assert len(checked(tmp_path).problems) == 2
    shard.write_bytes(b"")
    with pytest.raises(DataError, match=r"1\.tar: 0 bytes; expected \d+ by manifest\.json"):
        open_split(card(), tmp_path, "test")


def test_a_dataset_that_cannot_be_written_to_is_checked_all_the_same(tmp_path, monkeypatch):
    write_toy(tmp_path)

    def write(folder, manifest):  # as for another user than root
        raise PermissionError(13, "Permission denied", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", write)
        found = checked(tmp_path)
    assert (found.images, found.problems, found.manifest) == (24, (), "")
    assert found.notes == (f"{tmp_path / 'wds_toy/manifest.json'}: not recorded (Permission denied)",)


def test_flags_of_an_export_are_checked(tmp_path):
    place = write_toy(tmp_path)
    (place / layout.FLAGS).write_text("images-left-out\n")
    assert open_split(card(), tmp_path, "test").flags == ("images-left-out",)
    assert checked(tmp_path).notes == (
        "the folder that was exported has the flag images-left-out",
        "results carry the flag images-left-out",
    )
    (place / layout.FLAGS).write_text("well-done\n")
    assert "flags.txt: 'well-done'; expected images-left-out or" in checked(tmp_path).problems[0]


def test_all_problems_are_told_at_once(tmp_path):
    place = write_toy(tmp_path)
    (place / "0.tar").write_bytes((place / "0.tar").read_bytes()[:5000])
    one_shard(tmp_path / "x", tar_bytes([("s9.png", encode(noise(9))), ("s9.cls", b"7")]))
    (tmp_path / "x/0.tar").rename(place / "1.tar")
    (place / "2.tar").unlink()
    (place.parent / "classnames.txt").write_text("red\nlime\nblue\n")
    found = checked(tmp_path)
    text = "\n".join(found.problems)
    assert len(found.problems) == 5
    for part in (
        "line 2: 'lime'; expected 'green'",
        "2.tar missing",
        "0.tar: no whole tar archive (unexpected end of data)",
        "label 7 is outside the class list",
        "0 images, where the card says 24",
    ):
        assert part in text
    assert not any("\n" in line for line in found.problems)
    assert not (place.parent / manifest.FILE).exists()


def test_a_key_in_two_shards_and_a_shard_without_images(tmp_path):
    place = write_toy(tmp_path, n=2, per_shard=1)
    (place / "1.tar").write_bytes((place / "0.tar").read_bytes())
    problems = checked(tmp_path, card={"size": {}}).problems
    assert [line.partition(": ")[2] for line in problems] == ["key 's0000000' occurs twice"]
    (place / "1.tar").write_bytes(tar_bytes([("readme.txt", b"hello")]))
    problems = checked(tmp_path, card={"size": {}}).problems
    assert [line.partition(": ")[2] for line in problems] == ["no images"]


def test_images_are_decoded_on_request(tmp_path):
    rows = [*samples(5), ("s0000005", encode(noise(5, px=9)), "png", 0), ("s0000006", b"<html>", "png", 1)]
    layout.write_texts(tmp_path / "wds_toy", NAMES, TEMPLATES)
    layout.write_split(tmp_path / "wds_toy", "test", rows, 4)
    assert checked(tmp_path, card={"size": {"test": 7}}).problems == ()
    problems = checked(tmp_path, card={"size": {"test": 7}}, decode=True).problems
    assert len(problems) == 2
    assert "1.tar, toy/s0000005: 9 x 9 pixels; expected 8 x 8" in problems[0]
    assert "1.tar, toy/s0000006: not a whole image (a web page)" in problems[1]


def test_class_folders_have_a_manifest_too(tmp_path):
    for i, name in enumerate(NAMES):
        (tmp_path / "wds_toy/val" / name).mkdir(parents=True)
        (tmp_path / "wds_toy/val" / name / "x.png").write_bytes(encode(noise(i)))
    assert checked(tmp_path, "val").manifest == "recorded"
    (tmp_path / "wds_toy/val/red/y.png").write_bytes(encode(noise(4)))
    (tmp_path / "wds_toy/val/green/x.png").unlink()
    lines = [line.partition("wds_toy/")[2] for line in checked(tmp_path, "val").problems]
    assert lines == ["val/green/x.png: missing; the manifest has it", "val/red/y.png: not in the manifest"]
    (tmp_path / "wds_toy/val/red/y.png").unlink()
    (tmp_path / "wds_toy/val/green").rmdir()
    assert "2 class folders; expected 3" in checked(tmp_path, "val").problems[0]


def test_a_second_split_joins_the_manifest(tmp_path):
    write_toy(tmp_path)
    checked(tmp_path)
    write_toy(tmp_path, n=6, split="val")
    found = checked(tmp_path, "val", card={"size": {"test": 24, "val": 6}})
    assert (found.problems, found.manifest) == ((), "recorded")
    assert checked(tmp_path).manifest == "same"
    assert manifest.read(tmp_path / "wds_toy").images == {"test": 24, "val": 6}


@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"schema": "vlmrob-manifest/1", "files": 3}'])
def test_a_broken_manifest_is_a_problem(tmp_path, content):
    place = write_toy(tmp_path)
    (place.parent / manifest.FILE).write_text(content)
    assert len(checked(tmp_path).problems) == 1


def test_the_command_prints_a_table_and_exits_1_when_broken(tmp_path, monkeypatch, capsys):
    root = tmp_path / "data"
    for name in ("dtd", "pcam"):
        miniature.make(reader.read("datasets", name, DatasetCard), root, n=6)
    assert vlmrob(monkeypatch, "data", "check", "--root", root) == 0
    said = capsys.readouterr()
    lines = [line.split("\t") for line in said.out.splitlines()[1:]]
    assert lines[0] == list(check.COLUMNS)
    assert [(line[0], line[2], line[-1]) for line in lines[1:]] == [
        ("dtd", "6", "whole"),
        ("pcam", "6", "whole"),
    ]
    assert "a miniature" in said.err
    (root / "wds_vtab-dtd/test/0.tar").write_bytes(b"")
    assert vlmrob(monkeypatch, "data", "check", "dtd", "--root", root, "--json") == 1
    said = capsys.readouterr()
    assert len(json.loads(said.out)[0]["problems"]) == said.err.count("problem: dtd: ") == 2
    assert vlmrob(monkeypatch, "data", "check", "cars", "--root", root) == 1
    assert "problem: cars: no " in capsys.readouterr().err
    assert vlmrob(monkeypatch, "data", "check", "carz", "--root", root) == 2
    assert "did you mean 'cars'" in capsys.readouterr().err


def test_a_whole_suite_is_checked_by_its_name(tmp_path, monkeypatch, capsys):
    suite = reader.read("suites", "zeroshot", Suite)
    miniature.make(reader.read("datasets", "dtd", DatasetCard), tmp_path, n=2)
    assert vlmrob(monkeypatch, "data", "check", "zeroshot", "--root", tmp_path) == 1
    states = [line.split("\t") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0] for line in states] == list(suite.datasets)
    assert np.array([line[-1] == "whole" for line in states]).sum() == 1
