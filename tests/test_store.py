"""Nothing is lost or half there, whenever the process dies."""

import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from robustbench_vlm import store
from robustbench_vlm.errors import InputError

DICE = random.Random(0)


def killed(what, path):
    """Start the endless writer, let it work for some milliseconds, and kill it without warning."""
    command = [sys.executable, str(Path(__file__).with_name("endless_writer.py")), what, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(DICE.uniform(0.005, 0.06))
        process.kill()
        assert process.wait() == -9


def test_a_file_is_whole_after_every_kill(tmp_path):
    path = tmp_path / "result.json"
    for _ in range(12):
        killed("write", path)
        content = path.read_bytes()
        assert len(content) == 300_000
        assert len(set(content)) == 1
    assert [p.name for p in tmp_path.iterdir() if p.name[0] != "."] == ["result.json"]


def test_a_ledger_loses_at_most_its_last_line(tmp_path):
    path = tmp_path / "log.jsonl"
    for _ in range(8):
        before = list(store.records(path))
        killed("append", path)
        store.mend(path)
        assert path.read_bytes().endswith(b"\n")
        lines = list(store.records(path))
        assert lines[: len(before)] == before
        assert [line["i"] for line in lines[len(before) :]] == list(range(len(lines) - len(before)))
        store.append(path, {"i": -1})
        assert list(store.records(path))[-1] == {"i": -1}


@pytest.mark.parametrize("torn", [b"", b"{", b'{"i":', b'{"i":2}', '{"i": "\u00e9'.encode()[:-1]])
def test_mending_cuts_the_torn_line_only(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    store.append(path, {"i": 0})
    store.append(path, {"i": 1})
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [r["i"] for r in store.records(path)] == [0, 1]
    store.mend(path)
    assert path.read_bytes() == whole
    store.mend(path)  # nothing more to do
    assert path.read_bytes() == whole


ODD = [
    {},
    {"a": 1},
    {"z": 0.1},
    {"a": [1, {"checksum": "f" * 32}], "z": {"b": None}},
    {"a": '"checksum":"' + "0" * 32 + '",', "z": '\\"checksum\\":"'},
    {"größe": "\u2028\x00\ud7ff", "z": -0.0},
    {"a": 10**30, "b": 1e300, "c": -1e-300, "d": True, "z": ""},
]


def test_records_of_any_content_come_back(tmp_path):
    path = tmp_path / "log.jsonl"
    for record in ODD:
        store.append(path, record)
    assert [line.damage for line in store.lines(path)] == [""] * len(ODD)
    found = list(store.records(path))
    assert found == ODD
    assert [[type(value) for value in record.values()] for record in found] == [
        [type(value) for value in record.values()] for record in ODD
    ]


@pytest.mark.parametrize(
    "value", [b"1e999", b"-1e999", b"NaN", b"Infinity", b'"\\ud800"', b"9" * 5000, b"[}"]
)
def test_what_json_cannot_say_is_damage_even_with_a_checksum_of_its_bytes(tmp_path, value):
    path, rest = tmp_path / "log.jsonl", b',"z":0}'
    body = b'{"a":' + value + rest
    checksum = store.hashlib.sha256(b'["log.jsonl",' + body + b"]").hexdigest()[: store.DIGITS].encode()
    path.write_bytes(b'{"a":' + value + b',"checksum":"' + checksum + b'"' + rest + b"\n")
    (line,) = store.lines(path)
    assert line.damage
    path.write_bytes(path.read_bytes().replace(value, b"1"))
    assert "checksum" in next(store.lines(path)).damage


def test_mending_a_ledger_of_one_torn_line_or_none(tmp_path):
    path = tmp_path / "log.jsonl"
    store.mend(path)
    assert not path.exists()
    assert list(store.records(path)) == []
    path.write_bytes(b'{"i"')
    store.mend(path)
    assert path.read_bytes() == b""


def test_failing_to_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "deep" / "result.json"
    store.write(path, b"old")
    with pytest.raises(TypeError):
        store.write(path, "text")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_folder_that_cannot_be_written_is_explained_only_where_that_is_why(tmp_path):
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "data"
    refused = pytest.raises(InputError, match=r"Not a directory; .*choose another folder with --data-root")
    with refused, store.explained(folder, "--data-root"):
        store.write(folder / "x", b"")
    with pytest.raises(OSError, match="of another kind"), store.explained(tmp_path, "--data-root"):
        raise OSError("of another kind")
    with store.explained(folder, "--data-root"):  # nothing was to be written
        pass


def test_canonical_json_is_one_spelling():
    assert store.canonical({"b": [1, 2.5], "a": "\u00e9"}) == '{"a":"\u00e9","b":[1,2.5]}'.encode()
    assert store.fingerprint({"a": 1, "b": 2}) == store.fingerprint({"b": 2, "a": 1})
    assert store.fingerprint({"a": 1}) != store.fingerprint({"a": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.canonical({"a": math.nan})


def test_json_files(tmp_path):
    path = tmp_path / "x.json"
    store.write_json(path, {"b": 1, "a": [2]})
    assert path.read_text() == json.dumps({"b": 1, "a": [2]}, indent=2) + "\n"
    assert store.read_json(path) == {"b": 1, "a": [2]}
    assert store.file_sha256(path) == store.hashlib.sha256(path.read_bytes()).hexdigest()
    for content in (b"{", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"x\.json: not JSON"):
            store.read_json(path)
    with pytest.raises(InputError, match="no such file"):
        store.read_json(tmp_path / "y.json")
