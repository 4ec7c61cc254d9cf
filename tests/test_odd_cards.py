"""Cards of every kind with values that no card has: each is refused in one line, by reader and command."""

import json

import pytest
from command_line import run_command
from folders import encode, noise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_fuzz import one_line

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.fields import fields
from robustbench_vlm.errors import CardError, DataError
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.training import resolve

CARDS = {
    "suites": {"name": "x", "title": "X", "datasets": ["tiny-seen"], "eps": ["4/255"]},
    "attacks": {"name": "x", "title": "X", "stage": [{"name": "s", "attack": "fgsm", "loss": "ce"}]},
    "datasets": {
        **{"name": "x", "title": "X", "folder": "wds_x", "n_classes": 2, "size": {"test": 4}},
        **{"canvas": "native", "native_px": 8, "names": ["cat", "dog"], "templates": ["a {c}"]},
        **{"licence": "none"},
    },
    "models": {
        **{"name": "x", "title": "X", "defense": "none", "base": "vlmrob-tiny", "loader": "weights"},
        **{"source": "nowhere", "file": "x.pt", "licence": "none", "trained_on": []},
    },
    "recipes": {
        **{"name": "x", "title": "X", "student": "tiny", "defense": {"name": "tecoa"}},
        **{"data": {"dataset": "tiny-seen", "template": "a {c}"}},
        **{"inner": {"eps": "4/255", "steps": 1, "step_size": "1/255"}},
        **{"optim": {"lr": 0.1, "steps": 1, "batch_size": 2}},
    },
    "protocols": {
        **{"name": "x", "title": "X", "paper": "none", "suite": "tiny", "attack": "pgd10"},
        **{"eps": ["4/255"], "n": 4, "prompts": "clip"},
    },
    "prompts": {"name": "x", "title": "X", "templates": {"tiny-seen": ["a {c}"]}},
    "studies": {
        **{"kind": "frontier", "name": "x", "title": "X", "seeds": [0], "probe": {"every": 1}},
        **{"validation": {"attack": "pgd10", "suite": "tiny-val", "n": 4}, "rule": {"fixed": "2026-01-01"}},
        **{"method": [{"name": "a", "title": "A", "recipe": "tiny-tecoa"}]},
    },
}
"""A card of each kind that is read as it is."""

TYPED = {
    "suites": "eval --model tiny --dry-run --suite FILE",
    "attacks": "eval --model tiny --dry-run --suite tiny --attack FILE",
    "datasets": "data check FILE --root data",
    "models": "--include cards show models x",
    "recipes": "train FILE --dry-run --data-root data",
    "protocols": "eval --model tiny --dry-run --protocol FILE",
    "prompts": "show prompts FILE",
    "studies": "study FILE --dry-run",
}
"""A command that reads a card of each kind."""


def value(written):
    """A TOML value; a string that begins with `RAW ` is written as it stands."""
    if isinstance(written, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {value(v)}" for k, v in written.items()) + " }"
    if isinstance(written, list):
        return "[" + ", ".join(map(value, written)) + "]"
    if isinstance(written, str) and written.startswith("RAW "):
        return written.removeprefix("RAW ")
    return json.dumps(written, ensure_ascii=False)


def toml(table):
    return "".join(f"{json.dumps(key, ensure_ascii=False)} = {value(v)}\n" for key, v in table.items())


EVERYWHERE = {
    "NaN": "RAW nan",
    "infinity": "RAW inf",
    "beyond a double": "RAW 1e999",
    "5,000 digits": f"RAW {'9' * 5000}",
    "4,000 digits": f"RAW {'9' * 4000}",
    "NUL": 'RAW "a\\u0000b"',
    "a NUL byte": 'RAW "a\0b"',
    "an escape sequence": 'RAW "\\u001b[2J"',
    "a lone surrogate": 'RAW "\\ud800"',
    "a string of 1 MB": "x" * 2**20,
    "deep lists": f"RAW {'[' * 50_000}",
    "deep tables": f"RAW {'{a=' * 50_000}",
    "40 lists inside each other": f"RAW {'[' * 40}{']' * 40}",
    "a table where text is expected": {"a": 1},
    "a date": "RAW 2020-01-01",
}
"""Values for the title of every card."""

OWN = {
    "suite without datasets": ("suites", {"datasets": []}, "datasets must name one dataset"),
    "suite with a dataset twice": ("suites", {"datasets": ["dtd", "dtd"]}, "none twice"),
    "suite without eps": ("suites", {"eps": []}, "eps is empty"),
    "suite with words for eps": ("suites", {"eps": ["four"]}, "'four': not a number"),
    "rows of a hundred million": ("attacks", {"rows": 10**8}, "rows = 100000000; expected less than"),
    "no rows": ("attacks", {"rows": 0}, "rows = 0"),
    "stages that are no tables": ("attacks", {"stage": ["pgd"]}, "stage.0"),
    "no class": ("datasets", {"n_classes": 0, "names": []}, "n_classes = 0"),
    "names that are a number": ("datasets", {"names": 3}, "names = 3"),
    "a file of another folder": ("models", {"file": "../../x.pt"}, "file must be the name of a file"),
    "a defense that is a number": ("recipes", {"defense": 3}, "defense = 3"),
    "a defense without a name": ("recipes", {"defense": {}}, "defense has no name"),
    "teachers that are a list": ("recipes", {"teachers": []}, r"teachers = \[\]"),
    "no data": ("recipes", {"data": None}, "no key data"),
    "data that is text": ("recipes", {"data": "tiny-seen"}, "data = 'tiny-seen'"),
    "a template without a place": ("recipes", {"data": {"dataset": "d", "template": "a"}}, "contains {c}"),
    "protocol without eps": ("protocols", {"eps": []}, "eps is empty"),
    "templates that are a list": ("prompts", {"templates": ["a {c}"]}, "templates = "),
    "a study without methods": ("studies", {"method": []}, "there must be one"),
    "a key of 1 MB": ("suites", {"k" * 2**20: 1}, "text of 1048576 characters"),
    "a key of 100,000 parts": ("suites", {"RAW": f"RAW 1\n{'a.' * 100_000}a = 1"}, "too many parts"),
}
CASES = {
    **{
        f"{kind}, {name}": (kind, CARDS[kind] | {"title": odd}, "")
        for kind in CARDS
        for name, odd in EVERYWHERE.items()
    },
    **{name: (kind, CARDS[kind] | change, says) for name, (kind, change, says) in OWN.items()},
}


def written(folder, kind, table):
    file = folder / "cards" / reader.FOLDERS[kind][0] / "x.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = toml({key: v for key, v in table.items() if v is not None})
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    return file


def load(kind, file):
    """The card, as far as the command that takes it builds what it names."""
    card = reader.read(kind, str(file), reader.FOLDERS[kind][1])
    if kind == "attacks":
        Chain.named(str(file))
    if kind == "recipes":
        from robustbench_vlm.training import prepare

        prepare.build_defense(resolve.resolve(str(file)))
    return card


@pytest.mark.parametrize("kind", CARDS)
def test_the_cards_of_this_file_are_read(kind, tmp_path):
    assert load(kind, written(tmp_path, kind, CARDS[kind])).name == "x"


@pytest.mark.parametrize("case", CASES)
def test_the_reader_refuses_it_in_one_line(case, tmp_path):
    kind, table, says = CASES[case]
    file = written(tmp_path, kind, table)
    with pytest.raises(CardError, match=says or "x.toml") as caught:
        load(kind, file)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 800
    assert "x.toml" in text or "recipe x" in text


@pytest.mark.parametrize("case", [*OWN, *(f"{kind}, 5,000 digits" for kind in CARDS)])
def test_the_command_refuses_it_in_one_line(case, tmp_path, monkeypatch, capsys):
    kind, table, _ = CASES[case]
    file = written(tmp_path, kind, table)
    monkeypatch.chdir(tmp_path)
    words = [str(file) if word == "FILE" else word for word in TYPED[kind].split()]
    assert run_command(monkeypatch, *words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert len(errors[0]) < 800


plain = st.one_of(
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12),
    st.sampled_from(
        ["RAW nan", "RAW inf", "4/255", "@x", "../x", "tiny-seen", "RAW 2020-01-01", 'RAW "\\u0000"']
    ),
)
values = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("abc.-é", max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(sorted(CARDS)), data=st.data())
def test_small_random_tables_are_read_or_refused(kind, data, tmp_path):
    keys = [field.key for field in fields(reader.FOLDERS[kind][1])]
    changed = data.draw(st.dictionaries(st.sampled_from(keys), values, max_size=4))
    table = CARDS[kind] | changed if data.draw(st.booleans()) else changed
    file = written(tmp_path, kind, table)
    one_line(lambda: load(kind, file))


# --- lists of images -------------------------------------------------------------------------------------

LISTED = {
    "an image twice": ('{"image": "0.png", "label": 0}\n{"image": "0.png", "label": 1}', "occurs twice"),
    "an image twice, spelled in two ways": (
        '{"image": "0.png", "label": 0}\n{"image": "./0.png", "label": 1}',
        "occurs twice",
    ),
    "NaN": ('{"image": "0.png", "label": NaN}', "label nan"),
    "infinity": ('{"image": "0.png", "label": -Infinity}', "label -inf"),
    "a list": ('{"image": "0.png", "label": [0]}', r"label \[0\]"),
    "true": ('{"image": "0.png", "label": true}', "label True"),
    "half": ('{"image": "0.png", "label": 0.5}', "label 0.5"),
    "negative": ('{"image": "0.png", "label": -1}', "label -1"),
    "a time": ('{"image": "0.png", "label": 1700000000}', "label 1700000000"),
    "many digits": (f'{{"image": "0.png", "label": {"9" * 4000}}}', "label of more than 64 bits"),
    "too many digits for Python": (f'{{"image": "0.png", "label": {"9" * 5000}}}', "a JSON object"),
    "text of a large number": ('{"image": "0.png", "label": "9999999"}', "label 9999999"),
    "text of a megabyte": (json.dumps({"image": "0.png", "label": "x" * 10**6}), "label 'xxx"),
    "a number as image": (f'{{"image": {"9" * 4000}, "label": 0}}', "image of more than 64 bits"),
    "a long path": (json.dumps({"image": "x" * 5000, "label": 0}), "no image 'xxx"),
    "NUL in a path": ('{"image": "a\\u0000b", "label": 0}', "image 'a"),
    "half a character": ('{"image": "\\ud800", "label": 0}', "image "),
    "deep": ("[" * 100_000, "a JSON object"),
}


@pytest.mark.parametrize("case", LISTED)
def test_lists_of_images_are_refused_in_one_line(case, tmp_path, monkeypatch, capsys):
    (tmp_path / "0.png").write_bytes(encode(noise(0, 16)))
    lines, says = LISTED[case]
    (tmp_path / "list.jsonl").write_text(lines + "\n")
    words = ["data", "export", tmp_path / "list.jsonl", "--to", tmp_path / "out", "--name", "odd"]
    assert run_command(monkeypatch, *words) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) < 800
    from robustbench_vlm.data import sources

    with pytest.raises(DataError, match=says):
        sources.open_images(tmp_path / "list.jsonl")


def test_labels_that_are_text_are_names_and_numbers_as_text_are_indices(tmp_path):
    from robustbench_vlm.data import sources

    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(encode(noise(i, 16)))

    def read(*labels):
        rows = [{"image": f"{i}.png", "label": label} for i, label in enumerate(labels)]
        (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = sources.open_images(tmp_path / "list.jsonl")
        return found.names, [label for *_, label in found.items()]

    assert read("dog", "cat") == (("cat", "dog"), [1, 0])
    assert read("1", 0) == (("0", "1"), [1, 0])
