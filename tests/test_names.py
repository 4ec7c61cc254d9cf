"""Names become neither paths nor another thing's name, and code runs only where somebody named it."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import command_line
import pytest
import torch
import toys
from test_fingerprints import subject
from test_leaderboard import cell

import robustbench_vlm
from robustbench_vlm import store
from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.cards.model import ModelCard
from robustbench_vlm.cards.recipe import Recipe
from robustbench_vlm.cards.study import Study
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.data import export, layout
from robustbench_vlm.errors import CardError, DataError
from robustbench_vlm.evaluation.cells import Cell
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.models import public
from robustbench_vlm.results import leaderboard, result_file
from robustbench_vlm.studies.frontier import files, outcomes, perform
from robustbench_vlm.training import resolve
from robustbench_vlm.training.folder import folder_of

HOSTILE = (
    *(
        "",
        ".",
        "..",
        "...",
        "/",
        "//",
        "../../x",
        "/etc/passwd",
        "a/../../b",
        "..\\..\\x",
        "C:\\x",
        "~",
        "~root",
    ),
    *("a\x00b", "a\nb", "a\r\nb", "\t", "\x1b[31mred", "\x9b31m", "a\u202eb", "\u200f", "\u2028", "\ufeffx"),
    *(
        "x" * 300,
        "\u00e9" * 200,
        "\U0001f600" * 90,
        "a/" * 150,
        "." + "x" * 200,
        ".hidden",
        "-rf",
        "- x",
        " x ",
    ),
    *(
        "x.",
        "CON",
        "nul.txt",
        "com1",
        "*?<>|\"'",
        "$(id)",
        "`id`",
        "%2e%2e%2f",
        "\ud800",
        "a;b&c",
        "#x",
        "x\x7f",
    ),
)


def require_inside(path, root):
    """The path is below the root, and each part can be made on any common file system."""
    parts = path.relative_to(root).parts
    assert parts
    for part in parts:
        assert part not in ("", ".", "..")
        assert part.isprintable()
        assert len(part.encode()) <= 220
        assert not set(part) & set('/\\\x00*?<>|"')
        assert not part.endswith((".", " "))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    path.unlink()


def test_there_are_forty_hostile_names():
    assert len(set(HOSTILE)) >= 40


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_no_writer_makes_a_path_of_a_name(name, tmp_path):
    card = toys.dataset_card()
    object.__setattr__(card, "name", name)
    what = subject(card)
    what.loaded.card.name = name
    chain = Chain.of(toys.chain("aa", "ce"))
    object.__setattr__(chain.card, "name", name)
    cell = Cell(what, chain, toys.request(tmp_path, toys.chain("aa", "ce")), (toys.Fraction(4, 255),))
    config = {**{**cell.config, "subset_sha256": ""}, "model_sha256": "c" * 64}
    printable = name.encode("utf-8", "replace").decode()  # half a character has no fingerprint
    for key in ("model", "dataset", "attack"):
        config[key] = printable
    require_inside(result_file.path_of(tmp_path, config, 10), tmp_path)
    require_inside(tmp_path / "ledger" / store.file_name(name) / "x.jsonl", tmp_path)
    recipe = SimpleNamespace(name=name, fingerprint="f" * 64)
    require_inside(folder_of(recipe), Path("runs"))
    folder = export.write_cards(tmp_path / "data", printable, "test", ("a",), 1)
    for path in folder.rglob("*.toml"):
        require_inside(path, tmp_path / "data")
    assert [p for p in tmp_path.parent.iterdir() if p.name == "x" or "passwd" in p.name] == []


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_no_further_writer_makes_a_path_of_a_name(name, tmp_path, monkeypatch, capsys):
    """Tables of studies, folders of weights, splits, and what `new` and `data export` are told to write."""
    study = reader.read("studies", "efficiency", Study).model_copy(update={"name": name})
    for path in files.write(study, perform.Places(tmp_path / "runs", tmp_path / "tables")):
        assert path.parent == tmp_path / "tables"
        assert path.is_file()
        require_inside(path.with_suffix(".other"), tmp_path)
    require_inside(outcomes.ledger(tmp_path / "tables", name), tmp_path)
    card = ModelCard.model_construct(name=name, file="x.pt", loader="weights")
    monkeypatch.setenv("VLMROB_MODELS", str(tmp_path / "models"))
    require_inside(public.folder(card), tmp_path / "models")

    before = set(tmp_path.parent.rglob("*"))
    if store.file_name(name) == name:
        layout.write_split(tmp_path / "wds", name, [("s0", b"x", "png", 0)], 1)
        require_inside(tmp_path / "wds" / name / "0.other", tmp_path)
    else:
        with pytest.raises(DataError, match="not the name of a folder"):
            layout.write_split(tmp_path / "wds", name, [("s0", b"x", "png", 0)], 1)
        assert not (tmp_path / "wds").exists()
    printable = name.encode("utf-8", "replace").decode()
    (tmp_path / "in" / "cat").mkdir(parents=True)
    for words in (["new", "suite"], ["new", "attack"], ["data", "export", str(tmp_path / "in"), "--name"]):
        if not printable.startswith("-"):  # an option, which the command line refuses itself
            out = ["--to" if words[0] == "data" else "--out", str(tmp_path / "cards")]
            assert command_line.run_command(monkeypatch, *words, printable, *out) in (0, 2)
            assert "Traceback" not in capsys.readouterr().err
    for path in {*tmp_path.parent.rglob("*")} - before:
        if path.is_file():
            require_inside(path.with_name(f"{path.name}.other"), tmp_path)


def test_a_table_is_written_where_it_was_asked_for(tmp_path):
    cell(tmp_path / "results", "m", "one", 9, {})
    suite = Suite(name="../../x", title="x", datasets=("one",), eps=("4/255",))
    _, files = leaderboard.render(tmp_path / "results", suite, tmp_path / "out")
    assert [path.suffix for path in files] == [".csv", ".md", ".html"]
    for path in files:
        assert path.parent == tmp_path / "out"
        assert path.exists()


def test_file_names_differ_where_names_do():
    made = [store.file_name(name) for name in (*HOSTILE, "x", "_", "vit-b-32", "hf-hub:a_b", "a@include")]
    assert len({name.lower() for name in made}) == len(made)
    for plain in (
        "vit-b-32",
        "tiny",
        "ViT-B-32_openai",
        "autoattack@include",
        "pgd20-linf-4_255-n20",
        "模型",
    ):
        assert store.file_name(plain) == plain


# --- code ------------------------------------------------------------------------------------------------


@pytest.fixture
def spy(tmp_path, monkeypatch):
    """A module that leaves a trace when it is imported, named by a chain and a recipe; (folder, trace)."""
    trace = tmp_path / "ran"
    (tmp_path / "evil_module.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("evil_module", None)
    chain = 'name = "evil"\ntitle = "e"\n[[stage]]\nname = "s"\nattack = "evil_module:Thing"\n'
    store.write(tmp_path / "attacks" / "evil.toml", chain.encode())
    text = reader.path("recipes", "tiny-tecoa").read_text().replace('"tecoa"', '"evil_module:Thing"')
    store.write(
        tmp_path / "recipes" / "evil-recipe.toml", text.replace('"tiny-tecoa"', '"evil-recipe"').encode()
    )
    reader.include([tmp_path])
    yield tmp_path, trace
    reader.include([])
    plugins.allow_code(False)


def test_a_file_that_names_code_is_refused_and_nothing_is_imported(spy):
    folder, trace = spy
    for call in (
        lambda: Chain.named("evil"),
        lambda: Chain.named(str(folder / "attacks" / "evil.toml")),
        lambda: resolve.resolve("evil-recipe"),
        lambda: resolve.resolve(str(folder / "recipes" / "evil-recipe.toml")),
    ):
        with pytest.raises(CardError, match=r"would import 'evil_module' and run its code.*--allow-code"):
            call()
    with pytest.raises(Exception, match="norm"):
        Chain.named("apgd-l1-only" if "apgd-l1-only" in reader.names("attacks") else "pgd20").require_norm(
            "l7"
        )
    assert not trace.exists()


def test_code_runs_when_it_was_allowed_or_typed(spy):
    _, trace = spy
    recipe = resolve.resolve("evil-recipe", settings=["defense.name=tecoa"])
    assert recipe.defense["name"] == "tecoa"
    assert resolve.resolve("tiny-tecoa", settings=["defense.name=evil_module:Thing"])
    plugins.allow_code()
    assert isinstance(resolve.resolve("evil-recipe"), Recipe)
    with pytest.raises(CardError, match="a frozen dataclass"):  # imported, and found to be no attack
        Chain.named("evil")
    assert trace.exists()


def test_python_allows_the_code_of_a_chain_file_and_takes_it_back(spy):
    folder, trace = spy
    images, labels = torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)
    files = {"chain": str(folder / "attacks" / "evil.toml")}

    def attacked():
        return robustbench_vlm.attack(lambda x: x.flatten(1), images, labels, "4/255", **files)

    with pytest.raises(CardError, match=r"robustbench_vlm.allow_code\(\)"):
        attacked()
    assert not trace.exists()
    robustbench_vlm.allow_code()
    with pytest.raises(CardError, match="a frozen dataclass"):  # imported, and found to be no attack
        attacked()
    assert trace.exists()
    robustbench_vlm.allow_code(False)
    with pytest.raises(CardError, match="would import 'evil_module'"):
        attacked()
    assert "allow_code" in dir(robustbench_vlm)


@pytest.mark.parametrize("options", [[], ["--allow-code"]])
def test_the_option_stands_before_or_after_the_command(spy, monkeypatch, capsys, options):
    folder, trace = spy
    line = [
        "eval",
        "--model",
        "tiny",
        "--attack",
        "evil",
        "--suite",
        "tiny",
        *options,
        "--include",
        str(folder),
    ]
    assert command_line.run_command(monkeypatch, *line) == 2
    assert trace.exists() == bool(options)
    assert ("--allow-code" in capsys.readouterr().err) != bool(options)


@pytest.mark.parametrize("name", ["..x:y", ":y", "x:", "x.y.:z", "a b:c", "os:path.join", "x:y:z", "\x00:a"])
def test_what_is_no_module_and_class_is_one_line(name):
    with pytest.raises(CardError, match="not the name of a module"):
        plugins.get("attacks", name)


# --- names of chains -------------------------------------------------------------------------------------


def test_a_chain_called_like_a_packaged_one_is_shown_under_another_name(tmp_path, monkeypatch, capsys):
    chain = (
        'name = "autoattack"\ntitle = "one step"\n[[stage]]\nname = "fgsm"\nattack = "fgsm"\nloss = "ce"\n'
    )
    store.write(tmp_path / "cards" / "attacks" / "autoattack.toml", chain.encode())
    card = toys.dataset_card()
    toys.write_include(tmp_path / "cards", [card])
    toys.write(card, tmp_path / "data")
    toys.save_model(tmp_path / "m0")
    try:
        line = ["--include", tmp_path / "cards"]
        typed = ["eval", "--model", tmp_path / "m0", "--attack", "standard", "--suite", "toys", "--n", "4"]
        typed += ["--data-root", tmp_path / "data", "--out", tmp_path / "r", "--device", "cpu", "--json"]
        assert command_line.run_command(monkeypatch, *map(str, line + typed)) == 0
        rows = json.loads(capsys.readouterr().out)
        assert {row["attack"] for row in rows} == {"autoattack@include"}
        (path,) = (tmp_path / "r" / "cells").rglob("*.json")
        assert path.name.startswith("autoattack@include-linf-")
        reader.include([tmp_path / "cards"])
        assert reader.read("attacks", "autoattack@include", AttackCard).title == "one step"
        assert command_line.run_command(monkeypatch, *map(str, [*line, "list", "attacks", "--json"])) == 0
        listed = [row["name"] for row in json.loads(capsys.readouterr().out)]
        assert "autoattack@include" in listed
        assert "autoattack" not in listed
    finally:
        reader.include([])


def test_a_copy_of_a_packaged_chain_keeps_its_name(tmp_path):
    text = reader.path("attacks", "pgd20").read_bytes()
    store.write(tmp_path / "copy.toml", text)
    assert Chain.named(str(tmp_path / "copy.toml")).name == "pgd20"
    store.write(tmp_path / "other.toml", text.replace(b"steps = 20", b"steps = 2"))
    assert Chain.named(str(tmp_path / "other.toml")).name == "pgd20@include"
