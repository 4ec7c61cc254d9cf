"""What people type: columns of a table, models with commas, settings, folders; and what they are told."""

import json

import pytest
import toys
from command_line import run_command as vlmrob
from folders import encode, noise

from robustbench_vlm.cards import reader
from robustbench_vlm.cli.compare import _key
from robustbench_vlm.cli.images import columns_of
from robustbench_vlm.cli.options import comma_separated
from robustbench_vlm.errors import CardError, InputError
from robustbench_vlm.models.text_bank import untrained
from robustbench_vlm.training import resolve


def told(capsys):
    found = capsys.readouterr()
    return found.out + found.err


@pytest.mark.parametrize(
    ("typed", "columns"),
    [
        ("", ("", "")),
        ("image=path,label=class", ("path", "class")),
        ("label=class, image=path", ("path", "class")),
        ("label=class", ("", "class")),
        ("path,class", ("path", "class")),
    ],
)
def test_columns(typed, columns):
    assert columns_of(typed) == columns


@pytest.mark.parametrize("typed", ["path", "image=", "a=b", "image=a,image=b", "image=a,b", "a,b,c", ","])
def test_what_is_no_pair_of_columns_is_one_line(typed):
    with pytest.raises(InputError, match="image=NAME,label=NAME"):
        columns_of(typed)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_table_with_columns_of_other_names_is_exported(form, tmp_path, monkeypatch, capsys):
    rows = [{"where": f"{i}.png", "animal": name} for i, name in enumerate(("cat", "dog"))]
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(encode(noise(i, 16)))
    lines = {
        "csv": ["where,animal", *(",".join(row.values()) for row in rows)],
        "jsonl": [json.dumps(row) for row in rows],
    }[form]
    table = tmp_path / f"list.{form}"
    table.write_text("\n".join(lines) + "\n")
    words = ["data", "export", table, "--to", tmp_path / "out", "--name", "pets9"]
    assert vlmrob(monkeypatch, *words) == 2
    assert "name it: --columns image=NAME" in told(capsys)
    assert vlmrob(monkeypatch, *words, "--columns", "image=where") == 2
    assert "name it: --columns label=NAME" in told(capsys)
    assert vlmrob(monkeypatch, *words, "--columns", "image=where,label=animal", "--split", "train") == 0
    assert (tmp_path / "out/wds_pets9/train/nshards.txt").is_file()
    assert not (tmp_path / "out/wds_pets9/test").exists()
    assert reader.toml(tmp_path / "out/cards/datasets/pets9.toml")["size"] == {"train": 2}
    capsys.readouterr()
    for more in (["--data-root", tmp_path / "out"], []):
        if not more:
            monkeypatch.setenv("VLMROB_DATA", str(tmp_path / "out"))
        assert vlmrob(monkeypatch, "list", "datasets", *more) == 0
        assert "pets9" in capsys.readouterr().out
        assert vlmrob(monkeypatch, "show", "dataset", "pets9", *more) == 0
        assert json.loads(capsys.readouterr().out)["name"] == "pets9"
    reader.use_cards_of(tmp_path / "nowhere")


def test_names_with_commas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    assert comma_separated(["tiny,x", " y "]) == ("tiny", "x", "y")
    assert comma_separated(["a,b"]) == ("a,b",)
    assert comma_separated(None) == ()


def test_two_models_of_which_one_is_unknown(monkeypatch, capsys):
    assert vlmrob(monkeypatch, "eval", "--model", "tiny,tinny", "--attack", "pgd10", "--dry-run") == 2
    assert "model 'tinny': no such model" in told(capsys)


def test_a_wrong_setting_is_named_and_not_the_file_of_the_recipe():
    with pytest.raises(CardError, match=r"^--set optim.stepz=3: unknown key 'optim.stepz'; did you mean"):
        resolve.resolve("tiny-tecoa", settings=["optim.stepz=3"])
    with pytest.raises(CardError, match=r"^--set seed=1 --set optim.lr=fast: optim.lr = 'fast'; expected"):
        resolve.resolve("tiny-tecoa", settings=["seed=1", "optim.lr=fast"])


class Taught:
    """A text tower that met some words."""

    def untrained_words(self, sentences):
        known = {"a", "photo", "of", "red", "blue"}
        return [text for text in sentences if set(text.replace(".", " . ").split()) - known]


def test_words_of_the_template_are_named_once_and_not_with_every_class():
    names = ["red", "blue", "walrus"]
    assert untrained(Taught(), names, "a photo of a {c}.") == ["a photo of a {c}.", "walrus"]
    assert untrained(Taught(), names, "a photo of a {c}") == ["walrus"]
    assert untrained(Taught(), names[:2], "a {c}") == []


def test_compare_knows_a_checkpoint_folder_by_its_fingerprint(tmp_path):
    folder = toys.save_model(tmp_path / "m0")
    assert _key(str(folder)) == toys.loaded().card.sha256
    assert _key("tiny") == "tiny"
