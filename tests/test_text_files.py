"""Files of others: text as every editor writes it, and regular files alone; no list outside its folder."""

import os

import pytest

from robustbench_vlm import store, text_files
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.errors import CardError, InputError, WeightsError
from robustbench_vlm.models import checkpoint

CARD = """name = "two"
title = "Two"
folder = "wds_two"
n_classes = 2
size = { test = 4 }
canvas = "native"
native_px = 8
names = "@prompts/n.txt"
templates = ["a {c}"]
licence = "none"
"""


@pytest.fixture
def cards(tmp_path):
    """A folder of cards with one dataset whose names stand in a file."""
    for folder in ("datasets", "prompts", "lists"):
        (tmp_path / "cards" / folder).mkdir(parents=True)
    (tmp_path / "cards/datasets/two.toml").write_text(CARD)
    (tmp_path / "cards/prompts/n.txt").write_text("red\nblue\n")
    reader.include([tmp_path / "cards"])
    yield tmp_path / "cards"
    reader.include([])


def as_on_windows(path):
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


def test_byte_order_marks_and_crlf_are_read_everywhere(cards):
    plain = reader.read("datasets", "two", DatasetCard)
    as_on_windows(cards / "datasets/two.toml")
    as_on_windows(cards / "prompts/n.txt")
    assert reader.read("datasets", "two", DatasetCard) == plain
    assert plain.names == ("red", "blue")
    (cards / "names.txt").write_text("red\n\nblue\n\n")
    as_on_windows(cards / "names.txt")
    assert text_files.read_lines(cards / "names.txt") == ["red", "", "blue"]


def suite(subset):
    return Suite(name="s", title="s", datasets=("two",), eps=("2/255",), subset=subset)


def test_lists_of_images_are_split_at_the_ends_of_lines(cards):
    (cards / "lists/a.txt").write_text("apple pie/img 1.png\n\nred/2.png\n")
    as_on_windows(cards / "lists/a.txt")
    assert reader.subset(suite("lists/a.txt")) == ("apple pie/img 1.png", "red/2.png")
    (cards / "lists/a.txt").write_text("\n \n")
    with pytest.raises(CardError, match="an empty list; expected one image name a line"):
        reader.subset(suite("lists/a.txt"))
    (cards / "lists/a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CardError, match="unreadable"):
        reader.subset(suite("lists/a.txt"))


@pytest.mark.parametrize(
    "name", ["../secret.txt", "lists/../../secret.txt", "{root}/secret.txt", "lists/link.txt", "\0"]
)
def test_a_list_outside_the_folder_of_cards_is_never_read(cards, name):
    (cards.parent / "secret.txt").write_text("the first line of a secret\n")
    (cards / "lists/link.txt").symlink_to(cards.parent / "secret.txt")
    for subset in (name.format(root=cards.parent), f"file:{name.format(root=cards.parent)}"):
        with pytest.raises(CardError, match="a path below a folder of cards") as caught:
            reader.subset(suite(subset))
        assert "first line" not in str(caught.value)


def test_hidden_files_beside_cards_are_no_cards(cards):
    (cards / "datasets/._two.toml").write_bytes(b"\0\5\26\7")
    (cards / ".DS_Store.toml").write_bytes(b"\0")
    reader.include([cards])
    assert not [
        name for kind in ("datasets", "suites") for name in reader.names(kind) if name.startswith(".")
    ]


def test_cards_of_a_data_root_are_found_and_replace_none(cards, tmp_path):
    reader.include([])
    assert "two" not in reader.names("datasets")
    (cards / "datasets/cifar10.toml").write_text(CARD.replace('"two"', '"cifar10"'))
    reader.use_cards_of(tmp_path)
    try:
        assert reader.read("datasets", "two", DatasetCard).names == ("red", "blue")
        assert reader.read("datasets", "cifar10", DatasetCard).n_classes == 10
    finally:
        reader.use_cards_of(tmp_path / "nowhere")
    assert "two" not in reader.names("datasets")


def test_fifos_are_not_opened(cards, tmp_path):
    for file in (cards / "datasets/two.toml", cards / "prompts/n.txt", tmp_path / "model.safetensors"):
        file.unlink(missing_ok=True)
        os.mkfifo(file)
    with pytest.raises(CardError, match="not a regular file"):
        reader.read("datasets", "two", DatasetCard)
    with pytest.raises(WeightsError, match="not a regular file"):
        checkpoint.read_state(tmp_path / "model.safetensors")
    with pytest.raises(OSError, match="not a regular file"):
        store.file_sha256(tmp_path / "model.safetensors")


def test_a_ledger_that_is_a_link_is_refused_and_its_target_left_alone(tmp_path):
    target = tmp_path / "diary.txt"
    target.write_text("dear diary, half a line")
    (tmp_path / "ledger.jsonl").symlink_to(target)
    for write in (
        lambda: store.append(tmp_path / "ledger.jsonl", {}),
        lambda: store.mend(tmp_path / "ledger.jsonl"),
    ):
        with pytest.raises(InputError, match="a symbolic link; expected a file that vlmrob wrote; remove it"):
            write()
    assert target.read_text() == "dear diary, half a line"
