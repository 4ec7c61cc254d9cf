"""A protocol fixes all that it names, its rows say so, and rows of different protocols share no column."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toys
from command_line import run_command as vlmrob
from folders import card, encode, noise, one_shard, tar_bytes, write_toy
from PIL import Image
from torchvision import transforms

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.cards.dataset import DatasetCard, lines_sha256
from robustbench_vlm.cards.protocol import PromptPack, Protocol, sentences_sha256
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.data import miniature, pixels
from robustbench_vlm.data.dataset import open_split
from robustbench_vlm.errors import CardError, DataError, InputError
from robustbench_vlm.evaluation import planning, protocols

# protocol: chain, radii in 1/255, images, prompt pack, canvas, suite
FACTS = {
    "aa2": ("aa2", (2, 4), 1000, "clip", "card", "zeroshot"),
    "fare": ("fare", (2, 4), 1000, "clip", "card", "fare-13"),
    "tecoa-pgd": ("tecoa-pgd5", (1,), 0, "tecoa", "card", "tecoa-15"),
    "pmg-pgd10": ("pmg-pgd10", (1,), 0, "tecoa", "card", "pmg-15"),
    "tga-pgd100": ("pgd100", (1,), 0, "tecoa", "model", "pmg-15"),
    "mmt-ard": ("fare", (3,), 1000, "clip", "card", "fare-13"),
    "robustbench-imagenet": ("autoattack", (4,), 5000, "clip", "card", "imagenet-robustbench"),
}


def dataset(name):
    return reader.read("datasets", name, DatasetCard)


# --- cards -------------------------------------------------------------------------------------------------


def test_there_are_seven_protocols_with_the_facts_of_their_papers():
    assert set(reader.names("protocols")) == FACTS.keys()
    for name, (attack, eps, n, prompts, canvas, suite) in FACTS.items():
        found = reader.read("protocols", name, Protocol)
        assert (found.attack, found.n, found.prompts, found.canvas) == (attack, n, prompts, canvas)
        assert found.eps == tuple(f"{e}/255" for e in eps)
        assert found.suite == suite
        reader.read("suites", suite, Suite)
        reader.read("attacks", attack, AttackCard)
        reader.read("prompts", prompts, PromptPack)
        assert found.differs or name == "aa2"


@pytest.mark.parametrize(("name", "steps"), [("tecoa-pgd5", 5), ("pmg-pgd10", 10), ("pgd100", 100)])
def test_pgd_of_the_papers_takes_steps_of_one_255th_and_is_judged_at_the_last(name, steps):
    found = reader.read("attacks", name, AttackCard)
    assert found.stop == "last"
    assert [stage.fields for stage in found.stage] == [
        {"loss": "ce", "steps": steps, "step_size": "1/255", "restarts": 1, "random_start": True}
    ]


@pytest.mark.parametrize("name", [n for n in reader.names("datasets") if not n.startswith("tiny-")])
@pytest.mark.parametrize("pack", ["clip", "tecoa"])
def test_every_dataset_has_sentences_in_every_pack_and_their_hash(pack, name):
    read, of = reader.read("prompts", pack, PromptPack), dataset(name)
    if of.names_from == "folder":
        of = of.model_copy(update={"names": tuple(f"class {i}" for i in range(of.n_classes))})
        assert name not in read.sentences_sha256
    else:
        assert len(read.sentences_sha256[name]) == 64
    names, templates = read.words(name, of.names, of.templates)
    assert len(names) == of.n_classes
    if pack == "clip":
        assert (names, templates) == (of.names, of.templates)
    else:
        assert len(templates) == 1


@pytest.mark.parametrize(
    ("name", "place", "sentence"),
    [
        ("cifar100", 47, "This is a photo of a maple tree"),
        ("stl10", 2, "This is a photo of a car"),
        ("sun397", 0, "This is a photo of a abbey"),
        ("imagenet", 2, "This is a photo of a great white shark"),
        ("cars", 0, "A photo of a am general hummer suv."),
        ("dtd", 1, "A surface with a blotchy texture."),
        ("eurosat", 3, "A centered satellite photo of a highway or a road."),
        ("fgvc_aircraft", 0, "A photo of a boeing 707-320, a type of aircraft."),
        ("flowers102", 0, "A photo of a pink primrose, a type of flower."),
        ("food101", 0, "A photo of apple pie, a type of food."),
        ("oxford_pets", 0, "A photo of a abyssinian, a type of pet."),
        ("pcam", 0, "Tthis is a photo of healthy lymph node tissue."),
        ("country211", 1, "A photo I took in United Arab Emirates."),
    ],
)
def test_sentences_of_tecoa_by_hand(name, place, sentence):
    of = dataset(name)
    names, templates = reader.read("prompts", "tecoa", PromptPack).words(name, of.names, of.templates)
    assert templates[0].replace("{c}", names[place]) == sentence


def test_a_changed_sentence_is_refused():
    pack = reader.read("prompts", "tecoa", PromptPack)
    of = dataset("dtd")
    with pytest.raises(ValueError, match="sentences of dtd have SHA-256"):
        pack.words("dtd", ("other", *of.names[1:]), of.templates)
    with pytest.raises(CardError, match=r"contain \{c\}"):
        reader.parse({"name": "x", "title": "x", "template": "no place"}, PromptPack, "here")
    assert sentences_sha256(["a", "b"], ["{c}1", "{c}2"]) == sentences_sha256(
        ["a1", "a2", "b1", "b2"], ["{c}"]
    )


# --- pixels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300), (64, 64), (257, 256), (100, 90)])
def test_resizes_of_the_protocols_are_torchvisions_bit_for_bit(width, height):
    y, x = np.mgrid[:height, :width]
    array = np.stack([x % 256, y % 256, (x * y) % 256], -1).astype(np.uint8)
    content = encode(array)
    bilinear = transforms.InterpolationMode.BILINEAR
    usual = transforms.Compose([transforms.Resize(256, bilinear), transforms.CenterCrop(224)])
    squash = transforms.Resize((224, 224), bilinear)
    for resize, transform in (("bilinear-256", usual), ("bilinear-squash", squash)):
        found = pixels.model(content, 224, "here", resize)
        assert np.array_equal(found, np.asarray(transform(Image.fromarray(array))))
    assert not np.array_equal(pixels.model(content, 224, "here"), found)


def test_the_protocol_places_every_dataset_on_its_canvas():
    tga, tecoa = (reader.read("protocols", name, Protocol) for name in ("tga-pgd100", "tecoa-pgd"))
    placed = {
        name: protocols.with_protocol_canvas(dataset(name), tga)
        for name in ("cifar10", "dtd", "hateful_memes")
    }
    assert {name: (of.canvas, of.resize) for name, of in placed.items()} == {
        "cifar10": ("model", "bilinear-squash"),
        "dtd": ("model", "bilinear-256"),
        "hateful_memes": ("model", "bilinear-squash"),
    }
    assert protocols.with_protocol_canvas(dataset("cifar10"), tecoa).canvas == "native"
    assert protocols.with_protocol_canvas(dataset("dtd"), tecoa).resize == "bilinear-256"
    assert protocols.with_protocol_canvas(dataset("dtd"), None) == dataset("dtd")


# --- subsets by name ---------------------------------------------------------------------------------------


def tree(root, names=("red", "green", "blue"), n=5):
    for label, name in enumerate(names):
        (root / "wds_toy/test" / name).mkdir(parents=True)
        for i in range(n):
            (root / "wds_toy/test" / name / f"v_{i}.JPEG").write_bytes(encode(noise(10 * label + i), "jpeg"))
    return open_split(card(size={}), root, "test")


def test_images_are_taken_by_a_list_of_names_and_prefixes_nest(tmp_path):
    split = tree(tmp_path)
    names = ("red/v_3.JPEG", "blue/v_0.JPEG", "green/v_1", "red/v_0.JPEG")
    assert split.listed(names, 2).keys == ("toy/test/blue/v_0.JPEG", "toy/test/red/v_3.JPEG")
    whole = split.listed(names)
    assert set(split.listed(names, 3).keys) < set(whole.keys)
    assert len(whole) == 4
    with pytest.raises(DataError, match=r"no image 'red/v_9.JPEG'.*export of them, which keeps these names"):
        split.listed(("red/v_0", "red/v_9.JPEG"))
    write_toy(tmp_path / "shards")
    with pytest.raises(DataError, match=r"no image 'red/v_3\.JPEG'"):
        open_split(card(), tmp_path / "shards", "test").listed(names)


def test_a_name_of_a_list_is_one_image(tmp_path):
    split = tree(tmp_path, n=1)
    place = tmp_path / "wds_toy/test/red"
    for i, name in enumerate(("img 1.png", "img 1.bmp", "v1.0 x.png", "0.5.png", "0.7.png")):
        (place / name).write_bytes(encode(noise(i), name.rpartition(".")[2]))
    split = open_split(card(size={}), tmp_path, "test")
    for name, key in (
        ("img 1.png", "img 1.png"),
        ("v1.0 x", "v1.0 x.png"),
        ("0.5", "0.5.png"),
        ("v_0.png", "v_0.JPEG"),
    ):
        assert split.listed([f"red/{name}"]).keys == (f"toy/test/red/{key}",)
    with pytest.raises(DataError, match=r"'red/img 1' of the list may be red/img 1.bmp, red/img 1.png"):
        split.listed(["red/img 1"])
    for twice in (("red/0.5", "red/0.5"), ("red/0.5", "red/0.5.png")):
        with pytest.raises(DataError, match=r"'red/0.5.*' is in the list twice"):
            split.listed(twice)
    members = [(f"v/0.{i}.{end}", b) for i in (5, 7) for end, b in (("png", encode(noise(i))), ("cls", b"0"))]
    one_shard(tmp_path / "b/wds_toy/test", tar_bytes(members))
    (tmp_path / "b/wds_toy/classnames.txt").write_text("red\ngreen\nblue\n")
    split = open_split(card(size={}), tmp_path / "b", "test")
    assert split.listed(["v/0.5"]).keys == split.listed(["v/0.5.png"]).keys == ("toy/test/v/0.5",)
    with pytest.raises(DataError, match="no image 'v/0'"):
        split.listed(["v/0"])


def test_the_list_of_robustbench_is_the_one_that_was_published(tmp_path):
    suite = reader.read("suites", "imagenet-robustbench", Suite)
    names = reader.subset(suite)
    assert (len(names), len(set(names))) == (5000, 5000)
    assert names[0] == "n09468604/ILSVRC2012_val_00015253.JPEG"
    assert len({name.partition("/")[0] for name in names}) == 997
    assert len({name.partition("/")[0] for name in names[:1000]}) == 631
    assert suite.subset_sha256.startswith("d4121626d07722a0")
    (tmp_path / "subsets").mkdir()
    (tmp_path / "subsets/imagenet-robustbench-5000.txt").write_text("n01440764/other.JPEG\n")
    reader.include([tmp_path])
    with pytest.raises(CardError, match="SHA-256"):
        reader.subset(suite)
    reader.include([])
    with pytest.raises(CardError, match=r"no file 'gone\.txt'"):
        reader.subset(suite.model_copy(update={"subset": "file:gone.txt"}))


def test_names_may_come_from_the_folder(tmp_path):
    write_toy(tmp_path)
    own = {"names": (), "names_from": "folder"}
    assert open_split(card(**own), tmp_path, "test").card.names == ("red", "green", "blue")
    stated = lines_sha256(["red", "green", "blue"])
    assert open_split(card(**own, names_sha256=stated), tmp_path, "test").card.names[2] == "blue"
    with pytest.raises(DataError, match="names with SHA-256"):
        open_split(card(**own, names_sha256="0" * 64), tmp_path, "test")
    (tmp_path / "wds_toy/classnames.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(DataError, match="4 names; expected the 3 class names"):
        open_split(card(**own), tmp_path, "test")
    (tmp_path / "wds_toy/classnames.txt").unlink()
    with pytest.raises(DataError, match=r"classnames\.txt: no such file"):
        open_split(card(**own), tmp_path, "test")


# --- rows --------------------------------------------------------------------------------------------------

OWN = """
name = "{name}"
title = "Own"
paper = "none"
suite = "toys"
attack = "few"
eps = ["4/255"]
n = 12
prompts = "{prompts}"
canvas = "{canvas}"
antialias = false
input_px = {px}
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Data of two datasets labelled by a small model, short chain, and own protocols; its command line."""
    monkeypatch.chdir(tmp_path)
    model = toys.save_model(tmp_path / "model")
    native = miniature_card("dtd", "shades", canvas="native", native_px=32)
    include = toys.write_include(tmp_path / "cards", [native], [toys.chain("few", "ce", rows=8)])
    (include / "protocols").mkdir()
    for name, prompts, canvas, px in (
        ("one", "tecoa", "card", 0),
        ("two", "clip", "model", 0),
        ("big", "clip", "card", 999),
    ):
        text = OWN.format(name=name, prompts=prompts, canvas=canvas, px=px)
        (include / "protocols" / f"{name}.toml").write_text(text)
    made = ["--include", include, "data", "make", "toys", "--n", 12, "--label-with", model]
    assert vlmrob(monkeypatch, *made) == 0
    return ["--include", include, "eval", "--model", model, "--device", "cpu"], include


def miniature_card(name, new, **changes):
    of = dataset(name)
    return DatasetCard.model_validate(of.model_dump() | {"name": new, "folder": f"wds_{new}"} | changes)


def test_rows_of_different_protocols_share_no_column(small, monkeypatch, capsys):
    line, include = small
    for protocol in ("one", "two"):
        assert vlmrob(monkeypatch, *line, "--protocol", protocol) == 0
    assert vlmrob(monkeypatch, *line, "--suite", "toys", "--attack", "few", "--eps", "4", "--n", 12) == 0
    capsys.readouterr()
    assert vlmrob(monkeypatch, "--include", include, "leaderboard", "--suite", "toys") == 0
    said = capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO(Path("leaderboards/toys.csv").read_text())))
    singles = {row["protocol"]: row for row in rows if row["dataset"] == "shades"}
    assert set(singles) == {"", "one/1", "two/1"}
    assert singles["one/1"]["threat_space"] == "native"
    assert singles["two/1"]["threat_space"] == "model"
    titles = [text for text in said.splitlines() if text.startswith("# ")]
    assert len(titles) == 3
    assert sum("protocol one/1" in title for title in titles) == 1
    cells = [json.loads(path.read_text())["config"] for path in Path("results/cells").rglob("*.json")]
    assert len({cell["bank_sha256"] for cell in cells}) == 2  # TeCoA's sentences are others
    assert [cell.get("antialias") for cell in cells if cell.get("protocol")] == [False, False]
    assert [cell.get("antialias") for cell in cells if not cell.get("protocol")] == [None]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eps", "2"], "--eps: not what protocol one says; expected 4/255"),
        (["--attack", "pgd20"], "--attack: not what protocol one says; expected few"),
        (["--n", 5], "--n: not what protocol one says; expected 12"),
        (["--norm", "l2"], "--norm: not what protocol one says; expected linf"),
    ],
)
def test_what_contradicts_a_protocol_is_refused(small, monkeypatch, capsys, flags, message):
    line, _ = small
    capsys.readouterr()
    assert vlmrob(monkeypatch, *line, "--protocol", "one", *flags) == 2
    assert message in capsys.readouterr().err
    assert not Path("results").exists()


def test_what_agrees_with_a_protocol_may_be_typed(small, monkeypatch):
    line, _ = small
    same = ["--eps", "4/255", "--attack", "few", "--n", 12, "--norm", "linf", "--suite", "toys"]
    assert vlmrob(monkeypatch, *line, "--protocol", "one", *same) == 0


def test_the_papers_name_of_a_chain_agrees_with_a_protocol_that_uses_it():
    chain = Protocol(
        **{"name": "own", "title": "Own", "paper": "none", "suite": "tiny", "attack": "autoattack"},
        **{"eps": ("4/255",), "n": 12, "prompts": "clip"},
    )
    order = planning.EvalRequest(models=(), attacks=("standard",), suite="", results=Path(), data_root=Path())
    assert planning.under_protocol(order, chain).attacks == ("autoattack",)
    with pytest.raises(InputError, match="--attack: not what protocol own says; expected autoattack"):
        planning.under_protocol(replace(order, attacks=("aa2",)), chain)


def test_engines_are_held_against_each_other_on_a_dataset_that_is_named_by_its_folder(
    small, monkeypatch, capsys
):
    line, include = small
    card = reader.read("datasets", str(include / "datasets" / "shades.toml"), DatasetCard)
    text = toys.toml(
        card.model_dump(mode="json", exclude_defaults=True, exclude={"names", "names_sha256"})
        | {"names_from": "folder"}
    )
    (include / "datasets" / "shades.toml").write_text(text)
    capsys.readouterr()
    cross = ["crosscheck", line[4], "--suite", "toys", "--attack", "few", "--engine", "native", "--json"]
    assert vlmrob(monkeypatch, *line[:2], *cross, "--device", "cpu") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["dataset"], found["n"]) == ("shades", 12)
    assert found["attacked"] > 1


def test_an_unfit_model_or_an_unknown_protocol(small, monkeypatch, capsys):
    line, _ = small
    assert vlmrob(monkeypatch, *line, "--protocol", "big") == 2
    assert "input of 32 pixels; expected 999" in capsys.readouterr().err
    assert vlmrob(monkeypatch, *line, "--protocol", "fair") == 2
    assert "did you mean 'fare'" in capsys.readouterr().err


def test_miniatures_of_all_suites_can_be_made_and_opened(tmp_path):
    for name in ("full", "tecoa-15", "pmg-15", "imagenet-shift", "tecoa-code-17"):
        suite = reader.read("suites", name, Suite)
        for one in suite.datasets:
            of = dataset(one)
            miniature.make(of, tmp_path, n=2)
            split = open_split(of, tmp_path, "test")
            assert len(split) == 2
            assert len(split.card.names) == of.n_classes
