"""Public checkpoints: their cards, what to download when they are missing, how they load when there."""

import json

import command_line
import pytest
import torch
import toys
from open_clip import pretrained
from worlds import tilted

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.model import ModelCard
from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models import openclip, public, zoo

CARD = """
name = "toy-fare"
title = "A toy"
defense = "FARE"
base = "vlmrob-tiny:random"
eps = "2/255"
loader = "weights"
source = "https://example.org/toy.pt"
file = "toy.pt"
licence = "MIT"
trained_on = ["imagenet", "unknown"]
"""


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """A card of our own and an empty place for its weights."""
    monkeypatch.setenv("VLMROB_MODELS", str(tmp_path / "weights"))
    (tmp_path / "cards" / "models").mkdir(parents=True)
    path = tmp_path / "cards" / "models" / "toy-fare.toml"
    path.write_text(CARD)
    reader.include([tmp_path / "cards"])
    yield path, tmp_path / "weights" / "toy-fare"
    reader.include([])


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert error.value.exit_code == 2
    return text


@pytest.mark.parametrize("name", reader.names("models"))
def test_every_card_is_whole_and_its_base_is_one_of_open_clip(name):
    card = reader.read("models", name, ModelCard)
    assert card.name == name
    assert card.licence
    assert card.trained_on
    assert (card.loader == "weights") == bool(card.file)
    assert not card.eps or card.eps in ("1/255", "2/255", "4/255")
    if card.base.startswith("hf-hub:"):
        assert card.base == card.source
    else:
        arch, tag = card.base.split(":")
        assert arch in openclip.architectures()
        assert pretrained.get_pretrained_cfg(arch, tag)
    if card.loader == "open_clip" and not card.source.startswith("hf-hub:"):
        assert card.source == card.base


def test_the_zoo_of_the_field_is_there():
    found = [reader.read("models", name, ModelCard) for name in reader.names("models")]
    assert len(found) >= 49
    defenses = {card.defense for card in found}
    assert {
        "FARE",
        "TeCoA",
        "LEAF",
        "Sim-CLIP",
        "TGA-ZSR",
        "PMG-AFT",
        "MMT-ARD",
        "Delta-CLIP",
        "none",
    } <= defenses
    towers = [card for card in found if card.loader == "weights" and card.base.endswith(":openai")]
    assert all("RN50" in card.base or "ViT" in card.base for card in towers)  # QuickGELU follows the tag
    assert openclip.config("ViT-L-14").get("quick_gelu") is None
    assert pretrained.get_pretrained_cfg("ViT-L-14", "openai")["quick_gelu"] is True


def test_missing_weights_say_what_to_download_to_where(listed):
    _, place = listed
    with pytest.raises(WeightsError, match="its weights are not on this machine") as error:
        zoo.load("toy-fare")
    assert f"download https://example.org/toy.pt to {place / 'toy.pt'}" in one_line(error)


def test_missing_folders_and_unpublished_weights_say_so(listed):
    with pytest.raises(WeightsError, match="hf download LEAF-CLIP/CLIP-ViT-L-rho50") as error:
        zoo.load("leaf-vit-l-14")
    assert f"--local-dir {public.folder(reader.read('models', 'leaf-vit-l-14', ModelCard))}" in one_line(
        error
    )
    with pytest.raises(WeightsError, match="its weights are not published") as error:
        zoo.load("mmt-ard-vit-b-32")
    one_line(error)


def test_a_hub_that_cannot_be_reached_is_one_line_with_the_command(listed, monkeypatch):
    def unreachable(name, *, network):
        raise WeightsError(f"model {name}", "no connection")

    monkeypatch.setattr(openclip, "load", unreachable)
    with pytest.raises(WeightsError, match="hub; hf download chs20/fare2-clip --local-dir") as error:
        zoo.load("fare2-vit-l-14")
    one_line(error)


def test_weights_that_are_there_load_with_what_their_card_says(listed):
    _, place = listed
    place.mkdir(parents=True)
    made = tilted("vlmrob-tiny", 3)
    torch.save(made.visual.state_dict(), place / "toy.pt")
    found = zoo.load("toy-fare")
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(found.model(x), made(x))
    assert (found.card.name, found.card.defense) == ("toy-fare", "FARE")
    assert found.card.trained_on == ("imagenet", "unknown")
    assert found.card.recipe["inner"] == {"eps": "2/255", "norm": "linf"}
    assert found.card.training == {"source": "https://example.org/toy.pt", "scheme": "image tower"}
    assert found.card.text_from == "vlmrob-tiny:random"


def test_the_architecture_of_a_public_checkpoint_is_known_before_its_weights_are_there(listed):
    assert zoo.arch_of("toy-fare") == "vlmrob-tiny"
    assert zoo.arch_of("fare2-vit-l-14") == "ViT-L-14"
    assert zoo.arch_of("hf-hub:chs20/tecoa2-clip") == "ViT-L-14"  # by the card that names it as its source
    assert zoo.arch_of("hf-hub:nobody/knows") == ""
    assert not listed[1].exists()


def test_other_bytes_than_the_card_names_are_refused(listed):
    path, place = listed
    path.write_text(CARD + f'sha256 = "{"0" * 64}"\n')
    place.mkdir(parents=True)
    torch.save(tilted("vlmrob-tiny", 3).visual.state_dict(), place / "toy.pt")
    with pytest.raises(WeightsError, match="expected 000000000000 as in its card; download") as error:
        zoo.load("toy-fare")
    one_line(error)


# At the door


@pytest.fixture
def vlmrob(listed, tmp_path, monkeypatch, capsys):
    """Runs a command line; gives back (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(line):
        code = command_line.run_command(monkeypatch, "--include", tmp_path / "cards", *line.split())
        return code, *capsys.readouterr()

    return run


def test_the_list_tells_defense_architecture_radius_source_and_licence(vlmrob):
    code, out, _ = vlmrob("list models --json")
    row = next(row for row in json.loads(out) if row["name"] == "fare4-vit-l-14")
    assert code == 0
    assert row["defense"] == "FARE"
    assert row["architecture"] == "ViT-L-14:openai"
    assert (row["eps"], row["source"], row["licence"]) == ("4/255", "hf-hub:chs20/fare4-clip", "MIT")
    assert row["weights"] == "not here"
    code, out, _ = vlmrob("show model toy-fare")
    assert json.loads(out)["fetch"].startswith("download https://example.org/toy.pt to ")


@pytest.fixture
def here(tmp_path, vlmrob):
    """Two datasets, a short attack, and the tower of `toys.model(1)` as another program saves it."""
    datasets = [toys.dataset_card("imagenet", ("cat", "dog")), toys.dataset_card("pair", ("cat", "dog"))]
    for card in datasets:
        toys.write(card, tmp_path / "data", seed=1)
    toys.write_include(tmp_path / "cards", datasets, [toys.pgd("short")])
    reader.include([tmp_path / "cards"])
    torch.save({"vision_encoder_state_dict": toys.model(1).visual.state_dict()}, tmp_path / "t.pth.tar")
    return "--attack short --suite toys --data-root data --device cpu --json"


def exposures(answer):
    code, out, err = answer
    assert code == 0, err
    return {row["dataset"]: row["exposure"] for row in json.loads(out) if row["cell_sha256"]}


def test_a_weights_file_is_evaluated_on_the_model_that_it_was_made_from(vlmrob, here):
    answer = vlmrob(f"eval --model t.pth.tar --arch vlmrob-tiny:random {here}")
    assert exposures(answer) == {"imagenet@include": "unknown", "pair": "unknown"}
    rows = [row for row in json.loads(answer[1]) if row["cell_sha256"]]
    assert {row["model_id"] for row in rows} == {"t"}
    assert {float(row["clean"]) for row in rows} == {100.0}  # labelled by these very weights
    code, _, err = vlmrob(f"eval --model t.pth.tar {here}")
    assert code == 2
    assert "expected --arch ARCH:TAG" in err


def test_converted_weights_keep_what_is_known_of_their_training(vlmrob, here, tmp_path):
    line = (
        "convert t.pth.tar --arch vlmrob-tiny:random --out mine --defense TeCoA --trained-on imagenet,unknown"
    )
    code, out, err = vlmrob(line)
    assert (code, out) == (0, "mine\n"), err
    assert "image tower, vlmrob-tiny, fingerprint" in err
    assert exposures(vlmrob(f"eval --model mine {here}")) == {"imagenet@include": "seen", "pair": "unknown"}
    code, _, err = vlmrob("convert t.pth.tar --card toy-fare --out listed")
    assert code == 0, err
    made = json.loads((tmp_path / "listed" / "card.json").read_text())
    assert (made["name"], made["defense"], made["trained_on"]) == (
        "toy-fare",
        "FARE",
        ["imagenet", "unknown"],
    )
    assert made["canary"]["tolerance"] > 0
    assert made["training"]["source_sha256"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("convert t.pth.tar --out mine", "neither --arch nor --card"),
        ("convert nowhere.pt --arch vlmrob-tiny:random --out mine", "No such file"),
        ("convert t.pth.tar --card toy-fair --out mine", "did you mean 'toy-fare'"),
        (
            "convert t.pth.tar --card toy-fare --arch vlmrob-tiny:random --trained-on x --out mine",
            "--card toy-fare: --arch, --trained-on too, which its card states; leave it out",
        ),
        ("convert t.pth.tar --card toy-fare --name n --defense D --out mine", "--name, --defense too"),
        ("convert data --arch vlmrob-tiny:random --out mine", "neither weights by its name nor"),
        ("convert t.pth.tar --arch vlmrob-tiny-teacher:random --out mine", "read as image tower"),
        ("canary nobody", "no packaged checkpoint or folder"),
        ("show model toy-fair", "did you mean 'toy-fare'"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(vlmrob, here, tmp_path, line, words):
    code, out, err = vlmrob(line)
    assert (code, out) == (2, "")
    (said,) = [text for text in err.splitlines() if text.startswith("error: ")]
    assert words in said
    assert not (tmp_path / "mine").exists()


def test_a_canary_is_taken_anew_at_the_door(vlmrob, tmp_path):
    toys.save_model(tmp_path / "m")
    before = (tmp_path / "m" / "card.json").read_text()
    code, out, _ = vlmrob("canary m")
    assert (code, out) == (0, "m/card.json\n")
    assert (tmp_path / "m" / "card.json").read_text() == before
