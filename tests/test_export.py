"""Exported, a dataset is still itself: the same keys, labels, bytes and verdicts."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import toys
from command_line import run_command as vlmrob
from folders import encode, folder_sha, noise
from PIL import Image
from torchvision import datasets as torchvision_datasets

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data.dataset import open_split
from robustbench_vlm.data.pixels import rgb
from robustbench_vlm.data.torchvision_images import from_torchvision
from robustbench_vlm.errors import DataError, InputError

CLASSES = ("cat", "dog", "red_fox")


def tree(folder, classes=CLASSES, n=4, px=40):
    for label, name in enumerate(classes):
        (folder / name / "deep").mkdir(parents=True)
        for i in range(n):
            place = folder / name / ("deep" if i % 2 else "") / f"img {i}.{['png', 'jpg'][i % 2]}"
            place.write_bytes(encode(noise(10 * label + i, px), ["png", "jpeg"][i % 2]))
    (folder / classes[0] / "notes.txt").write_text("no image")
    return folder


def opened(root, name):
    return open_split(reader.read("datasets", name, DatasetCard), root, "test")


def identity(split):
    images = split.images(32)
    return folder_sha(images.keys, images.labels, images.sha256)


def test_folders_and_their_export_are_one_dataset(tmp_path, monkeypatch, capsys):
    tree(tmp_path / "a/wds_pets3/test")
    to = tmp_path / "b"
    assert (
        vlmrob(monkeypatch, "data", "export", tmp_path / "a/wds_pets3/test", "--to", to, "--name", "pets3")
        == 0
    )
    said = capsys.readouterr()
    assert said.out.strip() == str(to / "wds_pets3")
    assert "note: 1 files that are no images were left out" in said.err
    assert "note: 12 images of 3 classes: 'cat', 'dog', 'red fox'" in said.err
    assert f"its cards are in {to / 'cards'}; commands with --data-root {to} find them" in said.err
    assert f"next: vlmrob data check pets3 --root {to} --split test" in said.err
    assert vlmrob(monkeypatch, "data", "check", "pets3", "--root", to, "--decode") == 0
    assert "class folders are matched" not in capsys.readouterr().err  # they are shards now
    reader.include([to / "cards"])
    card = reader.read("datasets", "pets3", DatasetCard)
    assert card.names == ("cat", "dog", "red fox")
    before, after = opened(tmp_path / "a", "pets3"), opened(to, "pets3")
    assert before.keys == after.keys
    assert before.keys[0] == "pets3/test/cat/deep/img 1.jpg"
    assert before.sha256 == after.sha256
    assert identity(before) == identity(after)
    assert before.subset(5).keys == after.subset(5).keys
    reader.include([])


def test_an_export_onto_other_images_is_refused(tmp_path, monkeypatch, capsys):
    tree(tmp_path / "src", n=2)
    line = ["data", "export", tmp_path / "src", "--to", tmp_path / "out", "--name", "pets6"]
    assert vlmrob(monkeypatch, *line) == 0
    assert "nothing was written" not in capsys.readouterr().err
    assert vlmrob(monkeypatch, *line) == 0
    there = tmp_path / "out/wds_pets6/test"
    assert f"note: {there} is there already, with the same images; nothing" in capsys.readouterr().err
    image = tmp_path / "src/cat/img 0.png"
    before = image.read_bytes()
    for change in (
        lambda: image.write_bytes(encode(noise(99, 40))),
        image.unlink,
        lambda: (image.write_bytes(before), image.with_name("more.png").write_bytes(before)),
        lambda: image.with_name("more.png").rename(tmp_path / "src/cat/more.ppm"),
    ):
        change()
        assert vlmrob(monkeypatch, *line) == 2
        assert f"{there}: a finished split of other images or labels" in capsys.readouterr().err


def test_options_of_another_kind_of_source_are_refused(tmp_path, monkeypatch, capsys):
    tree(tmp_path / "src", n=1)
    (tmp_path / "names.txt").write_text("\n")
    folder, to = ["data", "export", tmp_path / "src"], ["--to", tmp_path / "out", "--name", "pets7"]
    for words, says in (
        ([*folder, "--set", "train=true"], "expected torchvision:X; leave out --set"),
        ([*folder, "--source-root", tmp_path], "expected torchvision:X; leave out --source-root"),
        ([*folder, "--columns", "image=a"], "has no columns; expected a table; leave out --columns"),
        ([*folder, "--names", tmp_path / "names.txt"], "an empty file; expected a text file"),
        (["data", "export", "torchvision:EuroSAT", "--columns", "image=a"], "expected a table; leave out"),
    ):
        assert vlmrob(monkeypatch, *words, *to) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_verdicts_bear_the_same_keys_and_say_the_same(tmp_path, monkeypatch, capsys):
    tree(tmp_path / "a/wds_pets3/test")
    assert vlmrob(monkeypatch, "data", "export", tmp_path / "a/wds_pets3/test", "--to", tmp_path / "b",
                  "--name", "pets3") == 0  # fmt: skip
    include = toys.write_include(tmp_path / "b/cards", [], [toys.chain("few", "ce", rows=8)])
    model = toys.save_model(tmp_path / "model")
    tables = []
    for root in ("a", "b"):
        line = ["--include", include, "eval", "--suite", "pets3", "--attack", "few", "--model", model]
        more = ["--data-root", tmp_path / root, "--out", tmp_path / f"out-{root}", "--eps", "2"]
        assert vlmrob(monkeypatch, *line, *more, "--device", "cpu") == 0
        found = sorted((tmp_path / f"out-{root}").rglob("*.parquet"))
        assert len(found) == 1
        tables.append((found[0].name, pd.read_parquet(found[0])))
    assert tables[0][0] == tables[1][0]  # the cell's name is a hash of all that decides it
    pd.testing.assert_frame_equal(tables[0][1], tables[1][1])
    assert len(tables[0][1]) == 12
    assert (tables[0][1].backwards > 0).sum() >= 2


def test_an_export_reads_one_of_several_split_folders(tmp_path, monkeypatch, capsys):
    for split, n in (("train", 4), ("val", 2)):
        tree(tmp_path / "src" / split, n=n)
    line = ["data", "export", tmp_path / "src", "--to", tmp_path / "out", "--name", "pets5"]
    assert vlmrob(monkeypatch, *line) == 0
    assert "note: split val is read; train beside it are left alone" in capsys.readouterr().err
    assert vlmrob(monkeypatch, *line, "--split", "train") == 0
    counts = {split: len(opened_split(tmp_path / "out", "pets5", split)) for split in ("train", "val")}
    assert counts == {"train": 12, "val": 6}


def opened_split(root, name, split):
    reader.include([root / "cards"])
    try:
        return open_split(reader.read("datasets", name, DatasetCard), root, split)
    finally:
        reader.include([])


def test_torchvision_classes_are_matched_to_the_names_of_a_card(tmp_path, monkeypatch, capsys):
    for i, name in enumerate(("River", "Forest", "River")):
        (tmp_path / f"tv/eurosat/2750/{name}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(i, 64)).save(tmp_path / f"tv/eurosat/2750/{name}/{name}_{i}.png")
    (tmp_path / "names.txt").write_text("river\nforest\n")  # torchvision sorts them the other way
    line = [
        "data",
        "export",
        "torchvision:EuroSAT",
        "--source-root",
        tmp_path / "tv",
        "--to",
        tmp_path / "out",
    ]
    assert vlmrob(monkeypatch, *line, "--name", "rivers", "--names", tmp_path / "names.txt") == 0
    assert "classes are matched to class names by spelling" in capsys.readouterr().err
    assert opened_split(tmp_path / "out", "rivers", "test").labels.tolist() == [1, 0, 0]
    (tmp_path / "names.txt").write_text("lake\nforest\n")
    assert vlmrob(monkeypatch, *line, "--name", "lakes", "--names", tmp_path / "names.txt") == 2


def test_torchvision_imagenet_has_tuples_of_synonyms(tmp_path, monkeypatch):
    synonyms = {"n01": ("tench", "Tinca tinca"), "n02": ("crane",), "n03": ("crane",)}
    for wordnet_id in synonyms:
        (tmp_path / "tv/val" / wordnet_id).mkdir(parents=True)
        (tmp_path / f"tv/val/{wordnet_id}/a.png").write_bytes(encode(noise(1)))
    torch.save((synonyms, ["n01"] * 3), tmp_path / "tv/meta.bin")
    line = ["data", "export", "torchvision:ImageNet", "--source-root", tmp_path / "tv", "--set", "split=val"]
    assert vlmrob(monkeypatch, *line, "--to", tmp_path / "out", "--name", "mini") == 0
    split = opened_split(tmp_path / "out", "mini", "val")
    assert (split.card.names, split.labels.tolist()) == (("tench", "crane", "crane"), [0, 1, 2])


def caltech(root, names):
    """The files of torchvision's Caltech101, one image a category."""
    for i, name in enumerate(names):
        (root / "caltech101/101_ObjectCategories" / name).mkdir(parents=True)
        Image.fromarray(noise(i)).save(root / f"caltech101/101_ObjectCategories/{name}/image_0001.jpg")
    (root / "caltech101/Annotations").mkdir()


def test_categories_of_torchvision_are_matched_as_classes_are(tmp_path, monkeypatch, capsys):
    caltech(tmp_path, ["BACKGROUND_Google", "accordion", "airplanes", "crab"])
    names = ("crab", "accordion", "airplanes")
    (tmp_path / "names.txt").write_text("\n".join(names))
    line = ["data", "export", "torchvision:Caltech101", "--source-root", tmp_path, "--to", tmp_path / "out"]
    assert vlmrob(monkeypatch, *line, "--name", "mini", "--names", tmp_path / "names.txt") == 0
    split = opened_split(tmp_path / "out", "mini", "test")
    assert [names[label] for label in split.labels] == ["accordion", "airplanes", "crab"]
    capsys.readouterr()
    assert vlmrob(monkeypatch, *line, "--name", "caltech101") == 2  # the card calls it airplane
    assert "1 of 3 classes are none of the 102 class names: airplanes" in capsys.readouterr().err
    assert vlmrob(monkeypatch, *line, "--name", "own") == 0
    assert opened_split(tmp_path / "out", "own", "test").card.names == ("accordion", "airplanes", "crab")


class Labels:
    """A dataset of torchvision that has no class names."""

    images = (Image.new("RGB", (8, 8)), Image.new("CMYK", (8, 8), (0, 99, 0, 0)))
    labels = (1, 0)

    def __init__(self, root, train=True):
        self.train = train

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return self.images[i], self.labels[i] if not self.train else 1


class Splits(Labels):
    def __init__(self, root, split="train", fold=1):
        if split not in ("train", "valid"):
            raise ValueError(f"Unknown value '{split}'")
        self.train = split == "train"


class More(Labels):
    """As EMNIST: `train` is handed on."""

    def __init__(self, root, split, **settings):
        super().__init__(root, **settings)


def test_the_split_of_torchvision_is_the_one_that_was_read(tmp_path, monkeypatch):
    for kind in (Labels, Splits, More):
        monkeypatch.setattr(torchvision_datasets, kind.__name__, kind, raising=False)
    names = [*torchvision_datasets.__all__, "Labels", "Splits", "More"]
    monkeypatch.setattr(torchvision_datasets, "__all__", names)

    def read(kind, split="", **settings):
        found = from_torchvision(kind, tmp_path, settings, ("a", "b"), split)
        return found.split, [label for *_, label in found.items()]

    train, test = [1, 1], [1, 0]
    assert read("Labels") == ("test", test)
    assert read("Labels", "train") == read("Labels", train=True) == ("train", train)
    assert read("Labels", "val", train=False) == ("val", test)
    assert read("Splits", "valid") == ("valid", test)
    assert read("Splits", "train") == ("train", train)
    with pytest.raises(InputError, match="Labels: no split 'val'; expected train or test"):
        read("Labels", "val")
    with pytest.raises(InputError, match="Splits: Unknown value 'test'"):
        read("Splits")
    found = from_torchvision("More", tmp_path, {"split": "letters"}, ("a", "b"))
    assert (found.split, [label for *_, label in found.items()]) == ("test", test)
    with pytest.raises(DataError, match=r"Labels: labels without class names; .* give --names FILE"):
        from_torchvision("Labels", tmp_path, {}, ("a", "b"), ordered=False)


def test_what_torchvision_cannot_read_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision_datasets, "Labels", Labels, raising=False)
    monkeypatch.setattr(torchvision_datasets, "__all__", [*torchvision_datasets.__all__, "Labels"])
    pixels = [rgb(content, "x").getpixel((0, 0)) for _, content, *_ in
              from_torchvision("Labels", tmp_path, {}).items()]  # fmt: skip
    assert pixels == [(0, 0, 0), (255, 156, 255)]  # CMYK has become RGB
    for labels in ((0, -1), (0, None), (0, (1, 2))):
        monkeypatch.setattr(Labels, "labels", labels)
        with pytest.raises(DataError, match="torchvision:Labels, image 1: ") as caught:
            list(from_torchvision("Labels", tmp_path, {}).items())
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="torchvision:VisionDataset: NotImplementedError"):
        from_torchvision("VisionDataset", tmp_path, {})
    (tmp_path / "meta.bin").write_bytes(b"junk")
    with pytest.raises(InputError, match="torchvision:ImageNet: "):
        from_torchvision("ImageNet", tmp_path, {"split": "val"})
    torch.save(({"n01": (), "n02": ("crane",)}, ["n01"]), tmp_path / "meta.bin")
    for wordnet_id in ("n01", "n02"):
        (tmp_path / "val" / wordnet_id).mkdir(parents=True)
        (tmp_path / f"val/{wordnet_id}/a.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="torchvision:ImageNet: class 0 has no name"):
        from_torchvision("ImageNet", tmp_path, {"split": "val"})
    for settings, message in (
        ({}, "cannot identify image"),
        ({"transform": "x"}, "'str' object is not callable"),
    ):
        if settings:
            (tmp_path / "val/n01/a.png").write_bytes(encode(noise(1)))
        with pytest.raises(DataError, match=f"torchvision:ImageFolder, image 0: {message}"):
            list(from_torchvision("ImageFolder", tmp_path / "val", settings).items())


def test_numbered_folders_and_names_from_a_file(tmp_path, monkeypatch):
    tree(tmp_path / "src", ["001.ak47", "002.car-side-101", "003.t_shirt"], n=1)
    line = ["data", "export", tmp_path / "src", "--to", tmp_path / "out", "--name", "numbered"]
    assert vlmrob(monkeypatch, *line) == 0
    assert (tmp_path / "out/wds_numbered/classnames.txt").read_text() == "ak47\ncar side\nt shirt\n"
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfT-shirt\r\nAK47\r\ncar side\r\n")
    line = ["data", "export", tmp_path / "src", "--to", tmp_path / "out", "--name", "other"]
    assert vlmrob(monkeypatch, *line, "--names", tmp_path / "names.txt") == 0
    assert (tmp_path / "out/wds_other/classnames.txt").read_text() == "T-shirt\nAK47\ncar side\n"
    reader.include([tmp_path / "out/cards"])
    keys = {entry.sample.name[:3]: entry.label for entry in opened(tmp_path / "out", "other").entries}
    assert keys == {"001": 1, "002": 2, "003": 0}
    reader.include([])
    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    line = ["data", "export", tmp_path / "src", "--to", tmp_path / "out", "--name", "third"]
    assert vlmrob(monkeypatch, *line, "--names", tmp_path / "names.txt") == 2
    (tmp_path / "names.txt").write_text("x\ny\n")
    line = ["data", "export", tmp_path / "src", "--to", tmp_path / "out", "--name", "third"]
    assert vlmrob(monkeypatch, *line, "--names", tmp_path / "names.txt") == 2
    assert not (tmp_path / "out/wds_third").exists()


def test_records_of_images_and_labels(tmp_path, monkeypatch, capsys):
    (tmp_path / "img").mkdir()
    for i in range(3):
        (tmp_path / f"img/{i}.png").write_bytes(encode(noise(i, 30)))
    rows = [{"id": i, "img": f"img/{i}.png", "label": i % 2, "text": "x"} for i in range(3)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "names.txt").write_text("meme\nhatespeech meme\n")
    line = ["data", "export", tmp_path / "test.jsonl", "--to", tmp_path / "out", "--name", "memes3"]
    assert vlmrob(monkeypatch, *line, "--names", tmp_path / "names.txt") == 0
    reader.include([tmp_path / "out/cards"])
    split = opened(tmp_path / "out", "memes3")
    assert split.keys == tuple(f"memes3/test/img/{i}.png" for i in range(3))
    assert split.labels.tolist() == [0, 1, 0]
    reader.include([])
    bad_lines = [
        *('{"img": "../x.png", "label": 0}', '{"img": "img/9.png", "label": 0}', "[]", "{", ""),
        *('{"img": 1, "label": 0}', '{"img": "img/0.png", "label": -1}', '{"img": "img/0.png"}'),
    ]
    for bad in bad_lines:
        (tmp_path / "bad.jsonl").write_text(bad + "\n" if bad else "")
        capsys.readouterr()
        line = ["data", "export", tmp_path / "bad.jsonl", "--to", tmp_path / "out", "--name", "bad"]
        assert vlmrob(monkeypatch, *line, "--names", tmp_path / "names.txt") == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_a_torchvision_dataset_keeps_its_pixels_and_order(tmp_path, monkeypatch, capsys):
    from torchvision.datasets import FakeData

    line = ["data", "export", "torchvision:FakeData", "--to", tmp_path, "--name", "fake", "--names"]
    (tmp_path / "names.txt").write_text("".join(f"class {i}\n" for i in range(3)))
    more = ["--set", "size=7", "--set", "image_size=[3, 20, 24]", "--set", "num_classes=3"]
    assert vlmrob(monkeypatch, *line, tmp_path / "names.txt", *more) == 0  # its first argument is no root
    assert vlmrob(monkeypatch, *line, tmp_path / "names.txt", "--set", "colour=3") == 2
    assert "torchvision:FakeData: " in capsys.readouterr().err

    (tmp_path / "tv/eurosat/2750/River").mkdir(parents=True)
    (tmp_path / "tv/eurosat/2750/Forest").mkdir(parents=True)
    for i, name in enumerate(("River", "Forest", "River")):
        Image.fromarray(noise(i, 64)).save(tmp_path / f"tv/eurosat/2750/{name}/{name}_{i}.png")
    line = [
        "data",
        "export",
        "torchvision:EuroSAT",
        "--source-root",
        tmp_path / "tv",
        "--to",
        tmp_path / "out",
    ]
    assert vlmrob(monkeypatch, *line, "--name", "rivers") == 0
    reader.include([tmp_path / "out/cards"])
    split = opened(tmp_path / "out", "rivers")
    assert split.keys == tuple(f"rivers/test/s{i:07d}" for i in range(3))
    assert split.labels.tolist() == [0, 1, 1]
    assert split.card.names == ("Forest", "River")
    assert np.array_equal(split.read(0, 64).pixels, noise(1, 64))
    reader.include([])
    assert vlmrob(monkeypatch, "data", "export", "torchvision:EuroSAX", "--to", tmp_path) == 2
    assert "did you mean 'EuroSAT'" in capsys.readouterr().err
    assert FakeData


def test_stored_keys_are_held_to_be_names(tmp_path):
    from folders import one_shard, tar_bytes

    from robustbench_vlm.data.shards import index_shards

    pair = [("s0.png", encode(noise(0))), ("s0.cls", b"0")]
    found = index_shards(one_shard(tmp_path, tar_bytes([*pair, ("s0.key", b"red/\xc3\xa9.png")])), 1)
    assert [sample.name for sample in found.samples] == ["red/é.png"]
    for content in (b"", b"\xff", b"a\nb", b"x" * 1025):
        with pytest.raises(DataError, match=r"0\.tar"):
            index_shards(one_shard(tmp_path, tar_bytes([*pair, ("s0.key", content)])), 1)
    with pytest.raises(DataError, match="'s1' has no image"):
        index_shards(one_shard(tmp_path, tar_bytes([*pair, ("s1.key", b"x")])), 1)
    twice = [*pair, ("s0.key", b"x"), ("s1.png", pair[0][1]), ("s1.cls", b"0"), ("s1.key", b"x")]
    with pytest.raises(DataError, match="key 'x' is also in the same shard"):
        index_shards(one_shard(tmp_path, tar_bytes(twice)), 1)


def test_an_export_for_a_card_of_ones_own_goes_to_the_folder_that_it_names(tmp_path, monkeypatch, capsys):
    tree(tmp_path / "src")
    (tmp_path / "cards/datasets").mkdir(parents=True)
    facts = {"name": "pets4", "title": "Pets", "folder": "elsewhere", "n_classes": 3, "names": list(CLASSES)}
    facts |= {"canvas": "native", "native_px": 40, "templates": ["a {c}"], "licence": "none"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in facts.items()]
    (tmp_path / "cards/datasets/pets4.toml").write_text("\n".join([*lines, "size = { test = 12 }"]))
    line = ["--include", tmp_path / "cards", "data", "export", tmp_path / "src", "--name", "pets4"]
    assert vlmrob(monkeypatch, *line, "--to", tmp_path / "out") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out/elsewhere")
    reader.include([tmp_path / "cards"])
    assert len(opened(tmp_path / "out", "pets4")) == 12
    tree(tmp_path / "in/elsewhere/test")
    line[4] = tmp_path / "in/elsewhere/test"
    before = sorted((tmp_path / "in").rglob("*"))
    assert vlmrob(monkeypatch, *line, "--to", tmp_path / "in") == 2  # onto itself
    assert not set(before) - set((tmp_path / "in").rglob("*"))
    reader.include([])
