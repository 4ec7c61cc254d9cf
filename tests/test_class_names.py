"""Labels are never guessed: classes match by name, spelling, number or WordNet id, or they are refused."""

import unicodedata

import pytest

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import class_names
from robustbench_vlm.errors import DataError

ELEVEN = [f"class {i}" for i in range(11)]


def decomposed(text):
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize(
    ("found", "names", "rule", "labels"),
    [
        (["b", "a"], ["a", "b"], "name", [1, 0]),
        (["Crane", "crane"], ["crane", "Crane"], "name", [1, 0]),
        (["blue_thing", "Red-Thing"], ["red thing", "blue thing"], "spelling", [1, 0]),
        ([decomposed("rouge \u00e9"), "bleu"], ["bleu", "rouge \u00e9"], "spelling", [1, 0]),
        (["001.t_shirt", "002.car-side-101"], ["car side", "T-shirt"], "spelling", [1, 0]),
        (sorted(map(str, range(11))), ELEVEN, "number", [0, 1, 10, *range(2, 10)]),
        ([f"{i:03d}" for i in range(11)], ELEVEN, "number", list(range(11))),
        (["1", "2", "3"], ["3", "1", "2"], "name", [1, 2, 0]),
        (["00", "01", "02"], ["2", "1", "0"], "number", [2, 1, 0]),
        (["01", "red"], ["Red", "1"], "number", [1, 0]),
        (["n02", "n01"], ["dog", "cat"], "WordNet id", [1, 0]),
        (["n01", "n02"], ["crane", "crane"], "WordNet id", [0, 1]),
    ],
)
def test_rules(found, names, rule, labels):
    others = {"WordNet id": ("n01", "n02")} if rule == "WordNet id" else {}
    matched = class_names.match(found, names, "x", others)
    assert (matched.rule, list(matched.labels)) == (rule, labels)


@pytest.mark.parametrize(
    ("found", "names", "message"),
    [
        (["1", "2", "3"], ["a", "b", "c"], "classes are numbered 1 to 3; expected 0 to 2"),
        (["0", "1", "3"], ["a", "b", "c"], "3 of 3 classes are none of the 3 class names: 0, 1, 3"),
        (["0", "00", "1"], ["a", "b", "c"], "3 of 3 classes are none"),
        (["0", "1", "2"], ["1", "2", "3"], r"1 of 3 .* names: 0; expected class names \(1, 2, 3\); rename"),
        (["1", "2", "3"], ["a", "b", "9"], "3 of 3 classes are none of the 3 class names"),
        (["n01", "n02"], ["dog", "cat"], "2 of 2 classes are none of the 2 class names: n01, n02"),
        (["a", "n02"], ["a", "b"], "1 of 2 classes are none of the 2 class names: n02"),
        (["crane", "dog"], ["crane", "crane"], "1 of 2 classes are none"),
        (["crane", "Crane"], ["crane", "crane"], "several classes are called crane"),
        (["ice bear", "ice_bear"], ["Ice Bear", "dog"], "two classes are spelt alike"),
    ],
)
def test_nothing_is_guessed(found, names, message):
    with pytest.raises(DataError, match=f"^x: {message}"):
        class_names.match(found, names, "x")


def test_two_spellings_of_a_table_may_be_one_class():
    found = class_names.match(["ice bear", "ice_bear", "dog"], ["dog", "Ice Bear"], "x", merge=True)
    assert found.labels == (1, 1, 0)


@pytest.mark.parametrize("name", ["imagenet", "imagenet-v2", "imagenet-sketch", "imagenet-a", "imagenet-r"])
def test_imagenet_folders_are_matched_by_their_wordnet_ids(name):
    card = reader.read("datasets", name, DatasetCard)
    ids = sorted(card.wordnet_ids)
    matched = class_names.match(ids, card.names, name, card.other_names)
    assert (matched.rule, matched.labels) == ("WordNet id", tuple(range(card.n_classes)))
    by_id = dict(zip(card.wordnet_ids, card.names, strict=True))
    assert by_id["n02007558"] == "flamingo"  # in all five


@pytest.mark.parametrize("name", ["imagenet", "imagenet-v2", "imagenet-sketch", "imagenet-a", "imagenet-r"])
def test_imagenet_classes_are_matched_by_the_words_of_wordnet(name):
    """As the column `label` of the hub's ILSVRC/imagenet-1k calls them."""
    card = reader.read("datasets", name, DatasetCard)
    words = sorted(card.wordnet_synsets)
    matched = class_names.match(words, card.names, name, card.other_names)
    assert matched.rule == "WordNet synset"
    assert [card.wordnet_synsets[label] for label in matched.labels] == words
    by_words = dict(zip(card.wordnet_synsets, card.wordnet_ids, strict=True))
    assert by_words["flamingo"] == "n02007558"  # in all five


def test_two_classes_with_the_same_words_are_never_taken_for_one():
    card = reader.read("datasets", "imagenet", DatasetCard)
    both = ["tench, Tinca tinca", "crane", "crane2"]
    assert class_names.match(both, card.names, "x", card.other_names).labels == (0, 134, 517)
    with pytest.raises(DataError, match="2 of 2 classes are none of the 1000 class names"):
        class_names.match(both[:2], card.names, "x", card.other_names)
