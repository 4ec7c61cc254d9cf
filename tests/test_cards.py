"""Facts are read strictly: counts, hashes, near names, overrides, and what a typed radius means."""

import tomllib
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustbench_vlm.cards import overrides, reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.errors import CardError, InputError
from robustbench_vlm.threat import NUMBER, SNAP, Threat, eps_text, in_ladder, parse_eps, typed_eps

FIFTEEN = [
    *("cifar10", "cifar100", "stl10", "caltech101", "oxford_pets", "cars", "food101", "flowers102"),
    *("fgvc_aircraft", "sun397", "dtd", "eurosat", "pcam", "imagenet-r", "imagenet-sketch"),
]
SIXTEEN = ["imagenet", *FIFTEEN]

# dataset: folder, classes, test images, side of a native canvas
FACTS = {
    "imagenet": ("wds_imagenet1k", 1000, 50_000, 0),
    "cifar10": ("wds_vtab-cifar10", 10, 10_000, 32),
    "cifar100": ("wds_vtab-cifar100", 100, 10_000, 32),
    "stl10": ("wds_stl10", 10, 8_000, 96),
    "caltech101": ("wds_vtab-caltech101", 102, 6_084, 0),
    "oxford_pets": ("wds_vtab-pets", 37, 3_669, 0),
    "cars": ("wds_cars", 196, 8_041, 0),
    "food101": ("wds_food101", 101, 25_250, 0),
    "flowers102": ("wds_vtab-flowers", 102, 6_149, 0),
    "fgvc_aircraft": ("wds_fgvc_aircraft", 100, 3_333, 0),
    "sun397": ("wds_sun397", 397, 21_750, 0),
    "dtd": ("wds_vtab-dtd", 47, 1_880, 0),
    "eurosat": ("wds_vtab-eurosat", 10, 5_400, 0),
    "pcam": ("wds_vtab-pcam", 2, 32_768, 0),
    "imagenet-r": ("wds_imagenet-r", 200, 30_000, 0),
    "imagenet-sketch": ("wds_imagenet_sketch", 1000, 50_889, 0),
}

# SHA-256 of newline-joined lists as CLIP_benchmark ships them (first 16 digits)
NAMES = {
    "imagenet": "571ae1c583b4be7d",
    "imagenet-sketch": "571ae1c583b4be7d",
    "caltech101": "8cd73f5d8e14e75f",
    "oxford_pets": "50be1443390f8a02",
    "flowers102": "5429e1ef6e0e5aa3",
    "eurosat": "ee2e41b9973e7206",
    "pcam": "27352df7ede1fd87",
}
TEMPLATES = {
    "imagenet": (80, "c078f4d4ced9e360"),
    "imagenet-r": (80, "c078f4d4ced9e360"),
    "imagenet-sketch": (80, "c078f4d4ced9e360"),
    "cifar10": (18, "1762a3675d3243c7"),
    "cifar100": (18, "1762a3675d3243c7"),
    "stl10": (2, "a771a976d1c71895"),
    "sun397": (2, "a771a976d1c71895"),
    "caltech101": (34, "d0359fcd9eb14bae"),
    "oxford_pets": (1, "ee5e9e3f42e3ca57"),
    "cars": (8, "a9a744a57eb69793"),
    "food101": (1, "ed37b8edb44968e5"),
    "flowers102": (1, "15a4cd24ceee766a"),
    "fgvc_aircraft": (2, "d5ef16cd2372eda4"),
    "dtd": (8, "38047254790e4cff"),
    "eurosat": (3, "84e63e79ba0bb990"),
    "pcam": (2, "6bc4924b0f83d172"),
}

MINIMAL_TOML = """
name = "two"
title = "Two classes"
folder = "wds_two"
n_classes = 2
size = { test = 4 }
canvas = "native"
native_px = 8
names = ["cat", "dog"]
templates = ["a photo of a {c}."]
licence = "CC0"
"""
MINIMAL = tomllib.loads(MINIMAL_TOML)


def dataset(name):
    return reader.read("datasets", name, DatasetCard)


def all_cards():
    return [(kind, name) for kind in reader.FOLDERS for name in reader.names(kind)]


@pytest.mark.parametrize(("kind", "name"), all_cards())
def test_every_card_is_read_and_bears_the_name_of_its_file(kind, name):
    card = reader.read(kind, name, reader.FOLDERS[kind][1])
    assert card.name == name
    assert card.title
    assert "\n" not in card.title


@pytest.mark.parametrize("name", SIXTEEN)
def test_the_sixteen(name):
    card = dataset(name)
    folder, classes, images, side = FACTS[name]
    train = {"train": 1_281_167} if name == "imagenet" else {}
    assert (card.folder, card.n_classes, card.size) == (folder, classes, {"test": images} | train)
    assert (card.canvas, card.native_px) == (("native", side) if side else ("model", 0))
    assert card.source.hub == f"clip-benchmark/{folder}"
    assert len(card.source.revision) in (0, 40)
    assert card.names_sha256.startswith(NAMES.get(name, ""))
    assert len(card.names_sha256) == len(card.templates_sha256) == 64
    assert len(card.templates) == TEMPLATES[name][0]
    assert card.templates_sha256.startswith(TEMPLATES[name][1])
    assert all(line == line.strip() and line for line in (*card.names, *card.templates))
    assert len(set(card.names)) == (998 if classes == 1000 else classes)
    assert card.made_by == ""
    assert card.notes


def test_order_of_labels():
    imagenet, renditions = dataset("imagenet"), dataset("imagenet-r")
    assert (imagenet.names[0], imagenet.names[-1]) == ("tench", "toilet paper")
    places = [imagenet.names.index(name) for name in renditions.names]
    assert places == sorted(places)
    assert dataset("stl10").names[1:4] == ("bird", "car", "cat")
    assert dataset("sun397").names[206:208] == ("jail indoor", "jail cell")
    assert dataset("cars").names[195] == "smart fortwo Convertible 2012"
    assert dataset("imagenet").names == dataset("imagenet-sketch").names


def test_order_of_keys_is_the_same_in_every_card():
    orders = set()
    for name in SIXTEEN:
        text = (reader.home() / "datasets" / f"{name}.toml").read_text()
        orders.add(tuple(key for key in tomllib.loads(text) if not key.startswith("wordnet_")))  # of ImageNet
    assert len(orders) == 2
    short, long = sorted(orders, key=len)
    assert tuple(key for key in long if key != "native_px") == short


@pytest.mark.parametrize("name", reader.names("suites"))
def test_suites_name_cards_that_exist(name):
    suite = reader.read("suites", name, Suite)
    known = reader.names("datasets")
    assert set(suite.datasets) <= set(known)
    assert len(set(suite.datasets)) == len(suite.datasets)
    for subset in suite.means.values():
        assert set(subset) < set(suite.datasets)
        assert len(set(subset)) == len(subset)
    radii = [parse_eps(eps, suite.norm) for eps in suite.eps]
    assert radii == sorted(set(radii))


def test_zeroshot_is_the_fifteen():
    suite = reader.read("suites", "zeroshot", Suite)
    assert list(suite.datasets) == FIFTEEN
    assert (suite.version, suite.norm, suite.n, suite.seed) == (1, "linf", 1000, 0)
    assert suite.eps == ("2/255", "4/255")
    assert set(suite.means["fare-13"]) == set(FIFTEEN) - {"food101", "sun397"}
    assert set(suite.means["without-pcam"]) == set(FIFTEEN) - {"pcam"}
    assert reader.read("suites", "imagenet", Suite).datasets == ("imagenet",)


def refusal(**changes):
    table = {key: value for key, value in (MINIMAL | changes).items() if value is not None}
    with pytest.raises(CardError) as caught:
        reader.parse(table, DatasetCard, "two.toml")
    message = str(caught.value)
    assert message.startswith("two.toml: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"canvass": "native"}, "unknown key 'canvass'; did you mean 'canvas'"),
        ({"source": {"hubb": "x"}}, "unknown key 'source.hubb'; did you mean 'hub'"),
        ({"n_classes": "two"}, "n_classes"),
        ({"names": "cat"}, "names"),
        ({"size": {"test": "many"}}, "size.test"),
        ({"canvas": "nativ"}, "canvas"),
        ({"licence": None}, "licence"),
        ({"n_classes": 3}, "names has 2 entries, expected n_classes = 3"),
        ({"templates": ["a photo"]}, "{c}"),
        ({"templates": []}, "{c}"),
        ({"native_px": None}, "native_px"),
        ({"native_px": 99_999_999_999}, "native_px = 99999999999; expected less than or equal to 8000"),
        ({"n_classes": 1, "names": ["cat"]}, "n_classes = 1; expected greater than or equal to 2"),
        ({"size": {"test": -4}}, "size.test = -4; expected greater than or equal to 0"),
        ({"size": {"test": True}}, "size.test = True; expected a valid integer"),
        ({"names_sha256": "0" * 64}, "the list was changed"),
        ({"templates_sha256": "0" * 64}, "the list was changed"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(changes, says):
    assert says in refusal(**changes)


def test_a_card_is_frozen_and_blank_names_are_legal():
    card = reader.parse(MINIMAL | {"names": ["cat", ""]}, DatasetCard, "two.toml")
    assert card.names == ("cat", "")
    with pytest.raises(ValueError, match="frozen"):
        card.n_classes = 3


@pytest.mark.parametrize("name", ["cifar-10", "imagenet_r", "food-101"])
def test_the_nearest_name_is_offered(name):
    near = {"cifar-10": "cifar10", "imagenet_r": "imagenet-r", "food-101": "food101"}[name]
    with pytest.raises(CardError, match=f"did you mean .*'{near}'"):
        dataset(name)


def test_files(tmp_path):
    path = tmp_path / "datasets" / "two.toml"
    path.parent.mkdir()
    with pytest.raises(CardError, match="no such file"):
        dataset(str(path))
    path.write_text("name = ")
    with pytest.raises(CardError, match="not TOML"):
        dataset(str(path))
    path.write_text(MINIMAL_TOML.replace('["cat", "dog"]', '"@prompts/pets.txt"'))
    with pytest.raises(CardError, match=r"'prompts/pets\.txt', which does not exist"):
        dataset(str(path))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "pets.txt").write_text("cat\ndog\n")
    assert dataset(str(path)).names == ("cat", "dog")


def test_folders_of_further_cards(tmp_path):
    (tmp_path / "more.toml").write_text('name = "more"\ntitle = "One"\ndatasets = ["dtd"]\neps = ["1/255"]\n')
    try:
        reader.include([tmp_path])
        assert "more" in reader.names("suites")
        assert "zeroshot" in reader.names("suites")
        assert reader.read("suites", "more", Suite).n == 1000
    finally:
        reader.include([])
    assert "more" not in reader.names("suites")
    with pytest.raises(InputError, match="no such folder"):
        reader.include([tmp_path / "absent"])


def test_set():
    table = {"optim": {"lr": 0.1}, "seed": 0}
    settings = ["optim.lr=0.2", "optim.steps=7", "seed=3", "title=a b", 'name="x"', "lora.r=4", "eps=2/255"]
    assert overrides.override(table, settings) == {
        "optim": {"lr": 0.2, "steps": 7},
        "seed": 3,
        "title": "a b",
        "name": "x",
        "lora": {"r": 4},
        "eps": "2/255",
    }


@pytest.mark.parametrize("setting", ["seed", "=3", ""])
def test_set_needs_a_key_and_a_value(setting):
    with pytest.raises(CardError, match="no '='"):
        overrides.override({}, [setting])


def test_set_does_not_enter_a_number():
    with pytest.raises(CardError, match="'seed' is not a table"):
        overrides.override({"seed": 0}, ["seed.deep=1"])


@pytest.mark.parametrize(
    ("text", "norm", "value"),
    [
        ("2", "linf", Fraction(2, 255)),
        ("2/255", "linf", Fraction(2, 255)),
        (" 2/255 ", "linf", Fraction(2, 255)),
        ("4/255", "linf", Fraction(4, 255)),
        ("1/255", "linf", Fraction(1, 255)),
        ("1/510", "linf", Fraction(1, 510)),
        ("0.0314", "linf", Fraction(314, 10_000)),  # 2.7e-5 from 8/255
        ("0.03137", "linf", Fraction(8, 255)),
        ("0.031373", "linf", Fraction(8, 255)),
        ("0.015686", "linf", Fraction(4, 255)),
        ("0.1254", "linf", Fraction(1254, 10_000)),  # just below 32/255
        ("0.03", "linf", Fraction(3, 100)),
        ("128/255", "linf", Fraction(128, 255)),
        ("255", "linf", Fraction(1)),
        ("1/1", "linf", Fraction(1)),
        ("2", "l2", Fraction(2)),
        ("0.5", "l2", Fraction(1, 2)),
        ("128/255", "l2", Fraction(128, 255)),
        ("1.5", "l2", Fraction(3, 2)),
    ],
)
def test_eps(text, norm, value):
    assert parse_eps(text, norm) == value


@pytest.mark.parametrize(
    ("text", "norm", "says"),
    [
        ("1.5", "linf", "ambiguous"),
        ("1e999999999", "linf", "not a number"),
        ("0.2", "linf", "N/255"),
        ("0.126", "linf", "N/255"),
        ("256", "linf", "at most 255"),
        ("256/255", "linf", "pixel range"),
        ("0", "linf", "not positive"),
        ("0/255", "linf", "not positive"),
        ("-2/255", "linf", "not positive"),
        ("-1", "l2", "not positive"),
        ("two", "linf", "not a number"),
        ("2/0", "linf", "not a number"),
        ("nan", "linf", "not a number"),
        ("inf", "l2", "not a number"),
        ("", "linf", "not a number"),
    ],
)
def test_eps_refused(text, norm, says):
    with pytest.raises(InputError, match=says):
        parse_eps(text, norm)


@given(st.integers(1, 32))
def test_eps_has_one_meaning_in_every_spelling(n):
    value = Fraction(n, 255)
    assert parse_eps(str(n)) == parse_eps(f"{n}/255") == value
    for digits in (6, 9, 17):
        assert parse_eps(f"{n / 255:.{digits}f}") == value
    assert parse_eps(str(Threat("linf", value)).removeprefix("linf ")) == value


@given(st.fractions(Fraction(1, 10_000), Fraction(32, 255)).filter(lambda value: value > 0))
def test_a_plain_fraction_moves_by_no_more_than_the_snap(value):
    text = f"{float(value):.9f}"
    if Fraction(text) <= Fraction(32, 255):
        assert abs(parse_eps(text) - Fraction(text)) <= SNAP


@given(
    st.one_of(
        st.from_regex(NUMBER, fullmatch=True),
        st.floats(1e-12, 300),
        st.fractions(Fraction(1, 10**9), 200).map(str),
        st.sampled_from([0.5 / 255, 0.3 / 255, 128 / 255, 0.012345, 1e-99, "0.5/255", "1e-99"]),
    ),
    st.sampled_from(["linf", "l2", "l1"]),
)
def test_a_radius_survives_its_text(typed, norm):
    try:
        eps = parse_eps(typed, norm)
    except InputError:
        return
    text = eps_text(norm, eps)
    assert parse_eps(text, norm) == eps
    assert parse_eps(typed_eps(typed), norm) == eps
    assert in_ladder(text, norm, (eps / 3, eps)) == eps


def test_a_radius_is_spelled_in_six_digits_where_they_say_it():
    assert eps_text("l2", Fraction(128, 255)) == "128/255"
    assert eps_text("linf", Fraction(12345, 10**6)) == "2469/200000"
    assert eps_text("linf", parse_eps(0.5 / 255)) == eps_text("linf", parse_eps("0.5/255")) == "0.5/255"
    assert [eps_text("l2", Fraction(text)) for text in ("1/2", "2", "0.123456")] == ["0.5", "2", "0.123456"]
    ladder = (Fraction(1, 2), Fraction(128, 255))
    assert in_ladder("0.501961", "l2", ladder) == ladder[1]  # as earlier versions spelled it
    assert in_ladder("1/2", "l2", ladder) == ladder[0]
    assert in_ladder("0.4", "l2", ladder) is in_ladder("x", "l2", ladder) is None


@given(st.text("0123456789./e-+ n", max_size=6), st.sampled_from(["linf", "l2"]))
def test_eps_is_positive_or_refused(text, norm):
    try:
        value = parse_eps(text, norm)
    except InputError:
        return
    assert value > 0
    assert norm == "l2" or value <= 1
