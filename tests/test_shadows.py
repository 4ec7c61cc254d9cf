"""A card of --include that has the name of a packaged one is shown as `NAME@include`, whatever kind it is."""

import json

import pytest
import toys
from command_line import run_command as vlmrob

from robustbench_vlm import catalogue, store
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.protocol import Protocol
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.errors import CardError
from robustbench_vlm.studies.frontier.trials import trials
from robustbench_vlm.training import resolve
from robustbench_vlm.training.folder import folder_of

PACKAGED = {
    "attacks": "pgd20",
    "datasets": "tiny-seen",
    "models": "openai-vit-b-32",
    "prompts": "clip",
    "protocols": "fare",
    "recipes": "tiny-tecoa",
    "studies": "efficiency",
    "suites": "zeroshot",
}


@pytest.fixture
def folder(tmp_path):
    """An empty folder of cards; what the test includes is forgotten afterwards."""
    yield tmp_path / "cards"
    reader.include([])
    reader.use_cards_of(tmp_path / "nowhere")


def copied(folder, kind, name, old="", new=""):
    """A packaged card in a folder of cards, with a change; the folder is included."""
    text = (reader.home() / reader.FOLDERS[kind][0] / f"{name}.toml").read_text()
    assert old in text
    store.write(folder / reader.FOLDERS[kind][0] / f"{name}.toml", text.replace(old, new, 1).encode())
    reader.include([folder])


def read(kind, name):
    return reader.read(kind, name, reader.FOLDERS[kind][1])


@pytest.mark.parametrize("kind", PACKAGED)
def test_another_content_has_another_name_and_a_copy_has_not(kind, folder):
    name = PACKAGED[kind]
    copied(folder, kind, name)
    assert read(kind, name).name == name == reader.shown(kind, name)
    with pytest.raises(CardError, match="no folder of --include has"):
        read(kind, f"{name}@include")
    copied(folder, kind, name, 'title = "', 'title = "Another. ')
    for typed in (name, f"{name}@include"):
        assert read(kind, typed).name == f"{name}@include" == reader.shown(kind, typed)
        assert read(kind, typed).title.startswith("Another. ")
        assert reader.has(kind, typed)
    listed = [shown for shown, _ in catalogue.names(kind)]
    assert f"{name}@include" in listed
    assert name not in listed
    reader.include([])
    assert read(kind, name).name == name
    with pytest.raises(CardError, match="no folder of --include has"):
        read(kind, f"{name}@include")


def test_a_packaged_card_that_names_such_a_card_is_another_one_too(folder):
    assert read("suites", "tiny").name == "tiny"
    copied(folder, "datasets", "tiny-colours", 'title = "', 'title = "Another. ')
    suite = read("suites", "tiny")
    assert suite.name == "tiny@include"
    assert "tiny-colours@include" in suite.datasets
    assert "tiny-colours" not in suite.datasets
    assert reader.suite("tiny-colours").datasets == ("tiny-colours@include",)
    assert reader.suites_with("tiny-colours@include") == ["tiny"]
    copied(folder, "prompts", read("protocols", "fare").prompts, 'title = "', 'title = "Another. ')
    assert reader.read("protocols", "fare", Protocol).name == "fare@include"
    assert reader.read("suites", "zeroshot", Suite).name == "zeroshot"


def test_a_recipe_on_such_a_dataset_is_another_recipe(folder):
    plain = resolve.resolve("tiny-tecoa")
    copied(folder, "datasets", "tiny-seen", 'title = "', 'title = "Another. ')
    found = resolve.resolve("tiny-tecoa")
    assert found.name == "tiny-tecoa@include"
    assert found.data.dataset == "tiny-seen@include"
    assert found.fingerprint != plain.fingerprint
    assert folder_of(found).name.startswith("tiny-tecoa@include-")
    study = read("studies", "efficiency")
    assert study.name == "efficiency@include"
    assert all(method.recipe.endswith("@include") for method in study.method)
    tried = [trial for method in study.method for trial in trials(study, method, folder, 0)]
    assert all(trial.recipe.name.endswith("@include") for trial in tried)


def test_a_model_that_teaches_first_is_called_as_it_is_shown(folder):
    text = (reader.home() / "recipes/tiny-mmt-ard.toml").read_text("utf-8")
    staged = text.replace(
        'robust = "tiny-robust-teacher"',
        'robust = { model = "tiny-robust-teacher", phases = [{ until = 0.5, model = "fare2-vit-l-14" }] }',
    ).replace('name = "tiny-mmt-ard"', 'name = "mine"')
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    (folder / "recipes/mine.toml").write_text(staged, "utf-8")
    copied(folder, "models", "fare2-vit-l-14", 'title = "', 'title = "Another. ')
    (phase,) = reader.read("recipes", "mine", Recipe).phases["robust"]
    assert phase.model == "fare2-vit-l-14@include"


def test_a_recipe_of_an_included_file_keeps_its_other_name_with_settings(folder):
    copied(folder, "recipes", "tiny-tecoa", "steps = 5", "steps = 6")
    assert resolve.resolve("tiny-tecoa", settings=["optim.steps=7"]).name == "tiny-tecoa@include"
    assert resolve.resolve("mart", "tiny-tecoa").name == "mart-with-tiny-tecoa@include"
    assert resolve.resolve("tecoa").name == "tiny-tecoa@include"
    copied(folder, "recipes", "tiny-tecoa")
    assert resolve.resolve("tiny-tecoa", settings=["optim.steps=7"]) == resolve.resolve(
        str(reader.home() / "recipes/tiny-tecoa.toml"), settings=["optim.steps=7"]
    )
    assert isinstance(resolve.resolve("tiny-tecoa"), Recipe)


def test_results_of_such_a_dataset_stand_under_its_other_name(folder, tmp_path, monkeypatch, capsys):
    """One image set, evaluated under the included card: rows, files, ledgers, tables and keys."""
    card = toys.dataset_card("cifar10")
    toys.write(card, tmp_path / "data")
    toys.write_include(folder, [card], [toys.chain("few", "ce", rows=8)])
    model = toys.save_model(tmp_path / "m0", trained_on=("cifar10",))
    line = ["--include", folder, "eval", "--model", model, "--attack", "few", "--suite", "toys"]
    more = ["--data-root", tmp_path / "data", "--out", tmp_path / "r", "--device", "cpu", "--json"]
    for words in ([], ["--dataset", "cifar10"], ["--dataset", "cifar10@include"]):
        assert vlmrob(monkeypatch, *line, *words, *more) == 0
        rows = json.loads(capsys.readouterr().out)
        assert {row["dataset"] for row in rows} == {"cifar10@include", "mean"}
        assert rows[0]["exposure"] == "seen"
    assert [path.name for path in (tmp_path / "r/cells").glob("*/*")] == ["cifar10@include"]
    assert [path.name for path in (tmp_path / "r/ledger").iterdir()] == ["cifar10@include"]
    table = ["--include", folder, "leaderboard", "--results", tmp_path / "r", "--suite", "toys"]
    assert vlmrob(monkeypatch, *table, "--out", tmp_path / "tables") == 0
    assert "cifar10@include" in (tmp_path / "tables/toys.csv").read_text()
    reader.include([folder])
    from robustbench_vlm.data.dataset import open_split

    split = open_split(reader.read("datasets", "cifar10", DatasetCard), tmp_path / "data", "test")
    assert split.keys[0].startswith("cifar10/test/")  # the name of an image does not depend on a card's


def test_a_model_card_of_that_name_has_weights_of_its_own(folder, monkeypatch):
    from robustbench_vlm.models import model_ids, public

    packaged = public.folder(read("models", "fare2-vit-l-14"))
    copied(folder, "models", "fare2-vit-l-14", 'title = "', 'title = "Another. ')
    found = public.folder(read("models", "fare2-vit-l-14"))
    assert (found.parent, found.name) == (packaged.parent, "fare2-vit-l-14@include")
    model_ids.require("fare2-vit-l-14@include")


def test_cards_beside_data_replace_none_in_the_processes_of_a_study(folder, tmp_path):
    """What a worker process is handed: the folders of --include, and the data root."""
    store.write(tmp_path / "data/cards/datasets/mine.toml", b"")
    reader.use_cards_of(tmp_path / "data")
    assert tmp_path / "data/cards" not in reader.included()
    assert tmp_path / "data/cards" in reader.card_folders()
