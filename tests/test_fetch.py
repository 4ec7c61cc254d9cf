"""What is fetched is the pinned commit, whole and verified, whatever the network does; or it is not there."""

import hashlib
import re
import time
import tomllib

import pytest
from command_line import run_command as vlmrob
from folders import NAMES, TEMPLATES, samples
from hub_server import SHA, Hub, serving

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import fetch, hub, layout, manifest, web
from robustbench_vlm.data.dataset import open_split
from robustbench_vlm.errors import DataError, Incomplete, InputError

CARD = f"""
name = "toy"
title = "Toy"
folder = "wds_toy"
n_classes = 3
size = {{ test = 24 }}
canvas = "native"
native_px = 8
names = {list(NAMES)}
templates = {list(TEMPLATES)}
licence = "none of it"
source = {{ hub = "clip-benchmark/wds_toy", revision = "REV" }}
"""


@pytest.fixture
def origin(tmp_path, monkeypatch):
    """A served repository with two shards, other files that nobody wants, and a card that points to it."""
    monkeypatch.setattr(hub, "PAUSE", 0.0)
    monkeypatch.setattr(hub, "TIMEOUT", 5.0)
    folder = tmp_path / "origin"
    layout.write_texts(folder, NAMES, TEMPLATES)
    layout.write_split(folder, "test", samples(24), 12)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.t*")}
    files = {path: content for path, content in files.items() if not path.startswith(".")}
    other = {"train/0.tar": b"x" * 999, "README.md": b"# read", "evil.py": b"boom", "test/evil.pkl": b"boom"}
    (tmp_path / "cards/datasets").mkdir(parents=True)
    (tmp_path / "cards/datasets/toy.toml").write_text(CARD.replace("REV", SHA))
    served = Hub("clip-benchmark/wds_toy", files | other)
    served.wanted = files
    reader.include([tmp_path / "cards"])
    with serving(served):
        yield served
    reader.include([])


def card():
    return DatasetCard.model_validate(tomllib.loads(CARD.replace("REV", SHA)))


def parcel(origin, root):
    return fetch.plan(card(), root, "test", hub.site(origin.url))


def fetched(origin, root):
    fetch.fetch(parcel(origin, root), root, hub.site(origin.url), lambda *_: None)
    return root / "wds_toy"


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != manifest.FILE
    }


def test_the_split_and_the_texts_come_and_nothing_else(origin, tmp_path):
    folder = fetched(origin, tmp_path / "data")
    assert contents(folder) == origin.wanted
    assert len(open_split(card(), tmp_path / "data", "test")) == 24
    known = manifest.read(folder)
    assert (known.hub, known.revision) == ("clip-benchmark/wds_toy", SHA)
    shas = {path: hashlib.sha256(content).hexdigest() for path, content in origin.wanted.items()}
    assert {path: sha for path, (_, sha) in known.files.items()} == shas
    asked = [path for _, path, _ in origin.asked]
    assert all(SHA in path for path in asked)
    assert not any("train" in path or "README" in path or "evil" in path for path in asked)


def test_size_and_licence_are_told_before_the_first_byte(origin, tmp_path, monkeypatch, capsys):
    line = ["--include", tmp_path / "cards", "data", "fetch", "toy", "--mirror", origin.url]
    root = ["--root", tmp_path / "data"]
    assert vlmrob(monkeypatch, *line, *root, "--dry-run") == 0
    said = capsys.readouterr()
    size = sum(len(content) for content in origin.wanted.values())
    assert f"\t{len(origin.wanted)}\t{size / 1e6:.1f}\t{size / 1e6:.1f}" in said.out
    assert "none of it; hub: mit" in said.out
    assert not (tmp_path / "data").exists()
    assert not any("resolve" in path for _, path, _ in origin.asked)
    assert vlmrob(monkeypatch, *line, *root) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].endswith("whole")
    assert manifest.read(tmp_path / "data/wds_toy").images == {"test": 24}
    origin.asked.clear()
    assert vlmrob(monkeypatch, *line, *root) == 0  # nothing is asked for twice, and what is there is checked
    assert origin.asked == []
    (tmp_path / "data/wds_toy" / manifest.FILE).unlink()
    assert vlmrob(monkeypatch, *line, *root, "--offline", "--dry-run") == 0
    assert not (tmp_path / "data/wds_toy" / manifest.FILE).exists()
    assert vlmrob(monkeypatch, *line, *root, "--offline") == 0


@pytest.mark.parametrize(
    "faults",
    [
        ["cut 3000"],
        ["cut 3000", "drop", "cut 1", "500", "429"],
        ["cut 3000", "no-range"],
        ["drop", "drop", "drop"],
        ["flip"],
    ],
    ids=lambda faults: "-".join(faults).replace(" ", ""),
)
def test_a_bad_connection_is_gone_on_with(origin, tmp_path, faults):
    origin.faults["test/1.tar"] = list(faults)
    if faults == ["flip"]:  # a wrong bit is found, and nothing of that name appears
        with pytest.raises(DataError, match=r"1\.tar: other bytes than the hub lists"):
            fetched(origin, tmp_path / "data")
        assert not (tmp_path / "data/wds_toy/test").exists()
    assert contents(fetched(origin, tmp_path / "data")) == origin.wanted
    ranges = [where for _, path, where in origin.asked if path.endswith("1.tar") and where]
    if faults[0] == "cut 3000":
        assert ranges[0] == "bytes=3000-"
    if faults[1:2] == ["drop"] and faults[0] != "drop":
        assert ranges[-1] == "bytes=3001-"


def test_a_dead_connection_leaves_what_the_next_command_goes_on_with(origin, tmp_path, monkeypatch, capsys):
    line = ["--include", tmp_path / "cards", "data", "fetch", "toy", "--mirror", origin.url]
    origin.faults["test/1.tar"] = ["cut 3000", *["drop"] * hub.RETRIES]
    assert vlmrob(monkeypatch, *line, "--root", tmp_path / "data") == 75
    said = capsys.readouterr()
    assert re.search(r"3000 of \d+ bytes are stored, and the same command continues", said.err)
    assert "Traceback" not in said.err
    folder = tmp_path / "data/wds_toy"
    assert not (folder / "test").exists()
    assert (folder / ".fetch/test/1.tar.part").stat().st_size == 3000
    left = parcel(origin, tmp_path / "data").left
    assert left == len(origin.files["test/1.tar"]) - 3000 + len(origin.files["test/nshards.txt"])
    origin.asked.clear()
    assert vlmrob(monkeypatch, *line, "--root", tmp_path / "data") == 0
    assert [(p.rpartition("/")[2], w) for _, p, w in origin.asked if "resolve" in p] == [
        ("1.tar", "bytes=3000-"),
        ("nshards.txt", ""),
    ]
    assert contents(folder) == origin.wanted


def test_a_wrong_part_is_fetched_once_more_from_its_first_byte(origin, tmp_path):
    part = tmp_path / "data/wds_toy/.fetch/test/0.tar.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"rubbish from another day")
    assert contents(fetched(origin, tmp_path / "data")) == origin.wanted
    ranges = [where for _, path, where in origin.asked if path.endswith("/0.tar")]
    assert ranges == ["bytes=24-", ""]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("html", r"the server sent a web page \(HTML\)"),
        ("short", r"\d+ bytes; expected \d+, as the hub lists"),
        ("long", r"\d+ bytes; expected \d+, as the hub lists"),
        ("more", r"more than \d+ bytes"),
        ("403", r"HTTP 403: it needs your permission; .*hf auth login"),
        ("404", "HTTP 404: no such repository"),
    ],
)
@pytest.mark.parametrize("path", ["test/0.tar", "classnames.txt"])
def test_what_is_not_the_file_is_never_taken_for_it(origin, tmp_path, fault, message, path):
    origin.faults[path] = [fault]
    with pytest.raises(DataError, match=message) as caught:
        fetched(origin, tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data/wds_toy/test").exists()
    assert contents(fetched(origin, tmp_path / "data")) == origin.wanted


def test_a_listing_may_come_in_pages(origin, tmp_path):
    origin.page = 2
    assert contents(fetched(origin, tmp_path / "data")) == origin.wanted
    assert sum("cursor=" in path for _, path, _ in origin.asked) >= 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("self", "the listing goes on at a page that was read"),
        ("pages", "a listing of more than 5 pages"),
        ("endless", "a page of more than 200000 bytes"),
        ("drip", r"only \d+ bytes within 1 s"),
        ("silent", "no whole answer within 1 s"),
        ("gzip", "not JSON; expected the hub's listing"),
        ("size -1", "no hash or size of"),
        ("size Infinity", "no hash or size of"),
        ("size NaN", "no hash or size of"),
        ("size 1e300", "no hash or size of"),
        ("size true", "no hash or size of"),
        ("size " + "9" * 400, "no hash or size of"),
        ("size " + "9" * 5000, "not JSON"),
        ("size " + "[" * 100_000, "not JSON"),
    ],
)
def test_a_listing_without_end_or_sense_is_one_line(origin, tmp_path, monkeypatch, fault, message):
    for bound, value in (("MOST_PAGES", 5), ("LARGEST_PAGE", 200_000), ("ANSWER", 1.0), ("LISTING", 1.0)):
        monkeypatch.setattr(hub, bound, value)
    if fault in ("self", "pages"):
        monkeypatch.setattr(hub, "LISTING", 30.0)
    origin.faults["listing"] = [fault]
    began = time.perf_counter()
    with pytest.raises((DataError, Incomplete), match=message) as caught:
        parcel(origin, tmp_path)
    assert time.perf_counter() - began < 10
    assert "\n" not in str(caught.value)


def test_too_many_files_are_refused(origin, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "MOST_FILES", 3)
    with pytest.raises(DataError, match="more than 3 files"):
        parcel(origin, tmp_path)


def test_a_file_that_drips_is_given_up_and_gone_on_with_later(origin, tmp_path, monkeypatch):
    monkeypatch.setattr(web, "WINDOW", 0.2)
    origin.faults["test/1.tar"] = ["drip"] * hub.RETRIES
    with pytest.raises(Incomplete, match=r"\d+ bytes in 0 s; \d+ of \d+ bytes are stored"):
        fetched(origin, tmp_path / "data")
    assert contents(fetched(origin, tmp_path / "data")) == origin.wanted


def test_a_file_that_comes_in_ever_so_small_pieces_is_given_up(origin, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "POOR", 10)
    origin.faults["test/1.tar"] = ["cut 1"] * 100
    with pytest.raises(Incomplete, match=r"10 of \d+ bytes are stored"):
        fetched(origin, tmp_path / "data")


@pytest.mark.parametrize("path", ["../evil.txt", "test/../../evil.txt", "/etc/evil.txt", "..txt", "-rf.txt"])
def test_paths_that_would_leave_the_folder_are_not_fetched(origin, tmp_path, path):
    origin.files[path] = b"boom"
    assert contents(fetched(origin, tmp_path / "data")) == origin.wanted
    assert not list(tmp_path.rglob("*evil*"))


def test_nothing_that_is_there_is_overwritten(origin, tmp_path):
    folder = tmp_path / "data/wds_toy"
    layout.write_texts(folder, NAMES, ["another {c}"])
    with pytest.raises(DataError, match=r"templates\.txt: another file than that of clip-benchmark/wds_toy"):
        fetched(origin, tmp_path / "data")
    assert (folder / "zeroshot_classification_templates.txt").read_text() == "another {c}\n"
    (folder / "miniature.txt").write_text("generated\n")
    with pytest.raises(DataError, match="a miniature with generated images"):
        parcel(origin, tmp_path / "data")
    (folder / "miniature.txt").unlink()
    (folder / "test/red").mkdir(parents=True)
    with pytest.raises(DataError, match="files that no fetch has finished"):
        parcel(origin, tmp_path / "data")


def test_a_card_without_a_commit_takes_the_newest_and_keeps_to_it(origin, tmp_path, monkeypatch, capsys):
    (tmp_path / "cards/datasets/toy.toml").write_text(CARD.replace("REV", ""))
    line = ["--include", tmp_path / "cards", "data", "fetch", "toy", "--mirror", origin.url]
    origin.faults["test/1.tar"] = ["drop"] * hub.RETRIES
    assert vlmrob(monkeypatch, *line, "--root", tmp_path / "data") == 75
    assert "the card names no commit, so the newest one is fetched" in capsys.readouterr().err
    assert any(path.endswith("/revision/main") for _, path, _ in origin.asked)
    origin.asked.clear()
    assert vlmrob(monkeypatch, *line, "--root", tmp_path / "data") == 0
    assert origin.asked[0][1].endswith(f"/revision/{SHA}")  # the branch may have moved meanwhile


def test_a_server_that_is_no_hub(origin, tmp_path, monkeypatch):
    origin.faults["revision"] = ["html"]
    with pytest.raises(DataError, match="a web page"):
        parcel(origin, tmp_path)
    origin.faults["revision"] = ["404"]
    with pytest.raises(DataError, match="HTTP 404"):
        parcel(origin, tmp_path)
    origin.faults["revision"] = ["503"] * 9
    with pytest.raises(Incomplete, match=r"HTTP 503; .*--mirror.*--offline"):
        parcel(origin, tmp_path)
    with pytest.raises(Incomplete, match="refused"):
        fetch.plan(card(), tmp_path, "test", hub.Site("http://127.0.0.1:9"))
    for address in ("ftp://host", "host", "file:///etc", "https://"):
        with pytest.raises(InputError, match="not a web address"):
            hub.site(address)


def test_the_token_goes_to_the_hub_alone(origin, tmp_path, monkeypatch):
    fetch.plan(card(), tmp_path, "test", hub.Site(origin.url, "secret"))
    assert all(headers["Authorization"] == "Bearer secret" for headers in origin.headers)
    origin.headers.clear()
    monkeypatch.setenv("HF_TOKEN", "secret")
    parcel(origin, tmp_path)  # by --mirror
    assert origin.headers
    assert not any("Authorization" in headers for headers in origin.headers)


def test_offline_says_what_is_lacking_and_asks_nobody(origin, tmp_path, monkeypatch, capsys):
    line = ["--include", tmp_path / "cards", "data", "fetch", "toy", "--mirror", origin.url, "--offline"]
    assert vlmrob(monkeypatch, *line, "--root", tmp_path / "data") == 2
    assert "vlmrob data fetch toy" in capsys.readouterr().err
    assert origin.asked == []


def test_a_full_disk_is_told_before_the_first_byte(origin, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MARGIN", 10**18)
    with pytest.raises(DataError, match=r"GB free; expected 1000000000\.0 GB"):
        fetch.require_space([parcel(origin, tmp_path)], tmp_path / "data")
