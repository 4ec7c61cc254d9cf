"""Images without a card: folders and tables are read alike, exported once, and evaluated like any dataset."""

import json
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from folders import encode, noise
from pyarrow import parquet

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.data import dataset, image_cards, sources
from robustbench_vlm.errors import DataError, InputError

LABELS = ["cat", "dog", "cat", "ibex", "dog"]
INDICES = [0, 1, 0, 2, 1]
PNG = [encode(noise(i, 20)) for i in range(5)]


def quiet(what, done, total):
    pass


@pytest.fixture
def images(tmp_path):
    """A folder with five images, `img/0.png` to `img/4.png`."""
    (tmp_path / "in/img").mkdir(parents=True)
    for i, content in enumerate(PNG):
        (tmp_path / f"in/img/{i}.png").write_bytes(content)
    return tmp_path / "in"


def table(folder, suffix, columns, name="pets"):
    """A table of that kind with these columns."""
    path = folder / f"{name}{suffix}"
    frame = pd.DataFrame(columns)
    if suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(frame.to_dict("records")), path)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")))
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    return path


PATHS = [f"img/{i}.png" for i in range(5)]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "columns", [("image", "label"), ("IMG", "Class"), ("path", "target"), ("file", "label")]
)
def test_every_kind_of_table_gives_the_same_images(images, suffix, columns):
    image, label = columns
    found = sources.open_images(table(images, suffix, {"id": range(5), image: PATHS, label: LABELS}))
    assert (found.count, found.names, found.split) == (5, ("cat", "dog", "ibex"), "test")
    assert list(found.items()) == [(PATHS[i], PNG[i], "png", INDICES[i]) for i in range(5)]
    assert found.notes == (f"images are in column {image!r}, labels in column {label!r}",)
    assert len(found.files) == 6


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_may_hold_the_images_themselves_and_their_class_names(images, struct):
    content = [{"bytes": png, "path": None} for png in PNG] if struct else PNG
    made = pa.Table.from_pylist([{"image": c, "label": i} for c, i in zip(content, INDICES, strict=True)])
    features = {"info": {"features": {"label": {"names": ["Cat", "Dog", "Ibex"], "_type": "ClassLabel"}}}}
    made = made.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(made, images / "validation-00000-of-00001.parquet")
    found = sources.open_images(images / "validation-00000-of-00001.parquet")
    assert (found.names, found.split) == (("Cat", "Dog", "Ibex"), "validation")
    assert list(found.items()) == [(f"s{i:07d}", PNG[i], "png", INDICES[i]) for i in range(5)]


def stated(names):
    """Metadata of a Parquet file whose column `label` has these class names."""
    features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    return {"huggingface": json.dumps(features)}


def test_class_names_of_a_file_are_matched_to_the_given_ones(images):
    rows = [{"image": c, "label": i} for c, i in zip(PNG, INDICES, strict=True)]
    path = images / "x.parquet"
    parquet.write_table(
        pa.Table.from_pylist(rows).replace_schema_metadata(stated(["cat", "dog", "ibex"])), path
    )
    found = sources.open_images(path, ["Ibex", "emu", "dog", "cat"])
    assert found.names == ("Ibex", "emu", "dog", "cat")
    assert [found.names[label].lower() for *_, label in found.items()] == LABELS
    assert found.notes[1:] == ("class names of the file are matched to the given ones by spelling",)
    with pytest.raises(DataError, match="1 of 3 classes are none of the 3 class names: cat"):
        sources.open_images(path, ["a", "dog", "ibex"])
    own = pa.Table.from_pylist(rows).replace_schema_metadata(stated(["1", "2", "3"]))
    parquet.write_table(own, path)  # names that are numbers: the file's integers are still its positions
    assert [label for *_, label in sources.open_images(path).items()] == INDICES
    assert [label for *_, label in sources.open_images(path, ["3", "2", "1"]).items()] == [2, 1, 2, 0, 1]


def test_a_parquet_file_of_imagenet_is_matched_to_its_card_by_the_words_of_wordnet(images):
    """As in the hub's ILSVRC/imagenet-1k, whose classes are called `tench, Tinca tinca`."""
    card = reader.read("datasets", "imagenet", DatasetCard)
    own = list(card.wordnet_synsets[::-1])  # another order than the card's
    labels = [0, 5, 134, 638, 999]  # of two cranes one; the file states both
    rows = [{"image": c, "label": 999 - label} for c, label in zip(PNG, labels, strict=True)]
    path = images / "validation-00000-of-00014.parquet"
    parquet.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(stated(own)), path)
    found = sources.open_images(path, card.names, other_names=card.other_names)
    assert [label for *_, label in found.items()] == labels
    assert found.notes[1:] == ("class names of the file are matched to the given ones by WordNet synset",)


def test_labels_of_a_table_may_be_wordnet_ids(images):
    card = reader.read("datasets", "imagenet", DatasetCard)
    labels = [0, 517, 134, 638, 0]
    path = table(images, ".csv", {"image": PATHS, "label": [card.wordnet_ids[label] for label in labels]})
    found = sources.open_images(path, card.names, other_names=card.other_names)
    assert [label for *_, label in found.items()] == labels


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_labels_are_no_positions_where_class_names_are_numbers(images, suffix):
    path = table(images, suffix, {"image": PATHS, "label": [1, 2, 1, 3, 2]})
    assert [label for *_, label in sources.open_images(path, ["3", "2", "1"]).items()] == [2, 1, 2, 0, 1]
    path = table(images, suffix, {"image": PATHS, "label": INDICES})
    with pytest.raises(DataError, match=r"1 of 3 classes are none of the 3 class names: 0; .*\(1, 2, 3\)"):
        sources.open_images(path, ["1", "2", "3"])


def test_integer_labels_take_names_or_are_called_by_their_numbers(images):
    path = table(images, ".csv", {"image": PATHS, "label": INDICES})
    found = sources.open_images(path)
    assert found.names == ("0", "1", "2")
    assert "labels are integers without names: the classes are called 0 to 2" in found.notes
    named = sources.open_images(path, ["cat", "dog", "ibex", "emu"])
    assert named.names == ("cat", "dog", "ibex", "emu")
    assert [label for *_, label in named.items()] == INDICES
    with pytest.raises(DataError, match="label 2; expected 0 to 1, for 2 class names"):
        sources.open_images(path, ["cat", "dog"])


def test_names_are_matched_by_spelling(images):
    path = table(
        images, ".csv", {"image": PATHS, "label": ["Ice_Bear", "dog", "ice bear", "ice-bear", "dog"]}
    )
    found = sources.open_images(path, ["dog", "ice bear"])
    assert [label for *_, label in found.items()] == [1, 0, 1, 1, 0]
    with pytest.raises(
        DataError, match=r"1 of 4 classes are none of the 2 class names: dog; expected class names .fox, ice"
    ):
        sources.open_images(path, ["fox", "ice bear"])


def tree(folder, classes, n=2):
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            (folder / name / f"{i}.png").write_bytes(encode(noise(10 * c + i, 20)))
    return folder


def test_folders_are_classes_and_split_folders_are_splits(tmp_path):
    tree(tmp_path / "plain", ["sea_lion", "dog"])
    found = sources.open_images(tmp_path / "plain")
    assert (found.names, found.split, found.count) == (("dog", "sea lion"), "test", 4)
    assert [(key, label) for key, _, _, label in found.items()][2:] == [
        ("sea_lion/0.png", 1),
        ("sea_lion/1.png", 1),
    ]
    for split, n in (("train", 3), ("val", 1)):
        tree(tmp_path / "whole" / split, ["a", "b"], n)
    found = sources.open_images(tmp_path / "whole")
    assert (found.split, found.count) == ("val", 2)
    assert found.notes == ("split val is read; train beside it are left alone",)
    assert sources.open_images(tmp_path / "whole", split="train").count == 6
    with pytest.raises(DataError, match="no split 'test'; expected one of: train, val"):
        sources.open_images(tmp_path / "whole", split="test")
    tree(tmp_path / "classes", ["test", "exam"])  # a class may be called like a split
    assert sources.open_images(tmp_path / "classes").names == ("exam", "test")


def test_a_split_that_is_asked_for_is_read_whatever_lies_beside_it(tmp_path):
    for split in ("train", "val"):
        tree(tmp_path / split, ["a", "b"])
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        found = sources.open_images(tmp_path, split=split)
        assert (found.names, found.split) == (("a", "b"), split)
    with pytest.raises(DataError, match="no split 'test'; expected one of: train, val"):
        sources.open_images(tmp_path, split="test")
    with pytest.raises(DataError, match="folders val, train are called like splits, annotations beside them"):
        sources.open_images(tmp_path)


def test_two_spellings_of_one_class_are_refused_where_nobody_names_the_classes(images, tmp_path):
    path = table(images, ".csv", {"image": PATHS, "label": ["Red", "red", "blue", "Red", "red"]})
    with pytest.raises(DataError, match=r"'Red' and 'red' are spelt alike; expected one spelling a class"):
        sources.open_images(path)
    assert sources.open_images(path, ["blue", "red", "Red"]).count == 5
    assert sources.open_images(path, ["blue", "red"]).count == 5
    tree(tmp_path / "x", ["e\u0301", "\u00e9"])
    with pytest.raises(DataError, match=r"'e\\u0301' and '\\xe9' are spelt alike"):
        sources.open_images(tmp_path / "x")


def test_folders_take_given_names_by_spelling_and_never_by_order(tmp_path):
    tree(tmp_path, ["n01", "n02", "sea_lion"], 1)
    with pytest.raises(DataError, match="2 of 3 classes are none of the 3 class names: n01, n02"):
        sources.open_images(tmp_path, ["tench", "goldfish", "Sea Lion"])
    found = sources.open_images(tmp_path, ["Sea Lion", "N02", "N01"])
    assert found.notes == ("class folders are matched to class names by spelling",)
    assert [label for *_, label in found.items()] == [2, 1, 0]


BAD = {
    "no image column": (
        {"picture": PATHS, "label": LABELS},
        r"columns 'picture', 'label'; expected one called image",
    ),
    "no label column": ({"image": PATHS, "kind": LABELS}, "expected one called label, class or target"),
    "outside": ({"image": ["../x.png"], "label": ["a"]}, "no image '../x.png' below"),
    "missing": ({"image": ["img/9.png"], "label": ["a"]}, "line 2: no image 'img/9.png'"),
    "twice": ({"image": ["img/0.png"] * 2, "label": ["a", "b"]}, "line 3: image 'img/0.png' occurs twice"),
    "no label": ({"image": ["img/0.png"], "label": [None]}, "line 2: label ''; expected a class name"),
    "negative": ({"image": ["img/0.png"], "label": [-1]}, "none of"),
    "empty": ({"image": [], "label": []}, "expected one called image"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_table_is_one_line(images, case):
    columns, message = BAD[case]
    names = ("a", "b") if case == "negative" else ()
    with pytest.raises(DataError, match=message) as caught:
        sources.open_images(table(images, ".csv", columns), names)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.parquet", b"PAR1 no", "not a Parquet file"),
        ("x.csv", b"image,label\n\xff\xfe,1\n", "not a table"),
        ("x.csv", b"image,label\n0.png,red, dark\n", "line 2: 3 fields; expected 2, as the header has"),
        ("x.csv", b'image,label\n0.png,"red, dark"\n1.png\n', "line 3: 1 fields; expected 2"),
        ("x.tsv", b"image\tlabel\tlabel\n0.png\ta\tb\n", "two columns 'label'; expected each name once"),
        ("x.jsonl", b'{"image": "a", "label": 1}\n[]\n', "line 2: b'\\[\\]"),
        ("x.jsonl", b"[" * 100_000, "line 1"),
        ("x.xlsx", b"", "neither a folder nor a known table; expected class folders, or a file in .csv"),
    ],
)
def test_files_that_are_no_tables_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        sources.open_images(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_image_are_refused(images):
    path = table(images, ".parquet", {"image": [PNG[0], b"text"], "label": [0, 1]})
    with pytest.raises(
        DataError, match="row 2: bytes that begin with b'text'; expected a PNG, JPEG, WebP, GIF"
    ):
        list(sources.open_images(path).items())


def opened(made, root):
    reader.include([made.include])
    try:
        card = reader.read("datasets", made.name, DatasetCard)
        suite = reader.read("suites", made.name, Suite)
    finally:
        reader.include([])
    assert (suite.datasets, suite.split) == ((made.name,), made.split)
    return dataset.open_split(card, root, made.split)


def test_a_card_of_images_is_made_once_and_named_by_its_content(images, tmp_path, monkeypatch):
    path = table(images, ".csv", {"image": PATHS, "label": LABELS})
    root = tmp_path / "data"
    made = image_cards.card_of_images(path, root, quiet)
    assert made.name.startswith("pets-")
    assert made.notes[0] == "5 images of 3 classes: 'cat', 'dog', 'ibex'"
    split = opened(made, root)
    assert split.keys == tuple(f"{made.name}/test/{name}" for name in PATHS)
    assert split.labels.tolist() == INDICES
    assert np.array_equal(split.read(3, 20).pixels, noise(3, 20))
    files = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    with monkeypatch.context() as patch:  # a second call reads no image
        patch.setattr(image_cards, "_content", None)
        assert image_cards.card_of_images(path, root, quiet) == made
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()} == files
    shutil.copytree(images, tmp_path / "copy")  # the same images elsewhere are the same dataset
    assert image_cards.card_of_images(tmp_path / "copy/pets.csv", tmp_path / "other", quiet).name == made.name
    (images / "img/0.png").write_bytes(PNG[1])
    changed = image_cards.card_of_images(path, root, quiet)
    assert changed.name != made.name
    assert opened(changed, root).labels.tolist() == INDICES
    words = image_cards.card_of_images(path, root, quiet, templates=["a drawing of a {c}"])
    assert words.name not in (made.name, changed.name)
    assert opened(words, root).card.templates == ("a drawing of a {c}",)


def test_a_folder_of_splits_is_evaluated_on_the_split_that_was_read(tmp_path):
    for split in ("train", "val"):
        tree(tmp_path / "My Pets" / split, ["cat", "dog"])
    made = image_cards.card_of_images(tmp_path / "My Pets", tmp_path / "data", quiet)
    assert made.name.startswith("my-pets-")
    assert (made.split, len(opened(made, tmp_path / "data"))) == ("val", 4)
    assert "split val is read; train beside it are left alone" in made.notes


def test_what_a_folder_has_lost_is_a_flag_of_its_export(tmp_path):
    tree(tmp_path / "x", ["a", "b", "c"])
    whole = image_cards.card_of_images(tmp_path / "x", tmp_path / "data", quiet)
    assert opened(whole, tmp_path / "data").flags == ()
    (tmp_path / "x/a/z.ppm").write_bytes(b"P6")
    lossy = image_cards.card_of_images(tmp_path / "x", tmp_path / "data", quiet)
    assert lossy.name != whole.name
    assert opened(lossy, tmp_path / "data").flags == ("images-left-out",)
    (tmp_path / "x/a/z.ppm").unlink()
    (tmp_path / "x/d").mkdir()
    empty = image_cards.card_of_images(tmp_path / "x", tmp_path / "data", quiet)
    assert opened(empty, tmp_path / "data").flags == ("classes-without-images",)
    assert "1 of 4 classes have no image: d" in empty.notes


def test_what_cannot_be_evaluated_makes_no_card(images, tmp_path):
    path = table(images, ".csv", {"image": PATHS, "label": ["cat"] * 5})
    with pytest.raises(DataError, match="1 class; expected at least two classes"):
        image_cards.card_of_images(path, tmp_path / "data", quiet)
    with pytest.raises(InputError, match="templates"):
        image_cards.card_of_images(path, tmp_path / "data", quiet, templates=["a photo"])
    assert not (tmp_path / "data").exists()
