"""What is read back is what was written: edited, planted and damaged files are refused or made again."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import toys
from safetensors.torch import load_file, save_file

from robustbench_vlm import store, tensor_files
from robustbench_vlm.errors import DataError, InputError, WeightsError
from robustbench_vlm.models.text_bank import text_bank
from robustbench_vlm.results import columns, result_file, verdicts

HASHED = ("config", "outcome", "model", "stages")


@pytest.fixture(scope="module")
def what(tmp_path_factory):
    card = toys.dataset_card()
    return toys.subject(card, toys.write(card, tmp_path_factory.mktemp("data")))


@pytest.fixture
def measured(what, tmp_path):
    """A finished result of two stages, at two radii, with its request."""
    request = toys.request(tmp_path, toys.chain("aa", "ce", "square"), eps=("1/255", "4/255"))
    return request, [path for path, _ in toys.run(what, request)]


def rewritten(path, change):
    """Change the blocks of a result, and write them with a fingerprint that fits."""
    blocks = json.loads(path.read_text())
    change(blocks)
    blocks["sha256"] = store.fingerprint({name: blocks[name] for name in HASHED})
    path.write_text(json.dumps(blocks))


COUNTS = {
    **{"n": 11, "clean_correct": 3, "errors": 2, "majority": 0.01, "largest_prediction_share": 0.5},
    **{"forwards": 1, "backwards": 1, "robust": {"ce": 12, "square": 12}, "table_sha256": "0" * 64},
}


@pytest.mark.parametrize("name", COUNTS)
def test_edited_counts_with_a_fitting_fingerprint_are_refused(measured, name):
    path = measured[1][1]
    rewritten(path, lambda blocks: blocks["outcome"].update({name: COUNTS[name]}))
    result = result_file.read_one(path)
    with pytest.raises(DataError, match=rf"{path.stem}.*run the same eval again"):
        assert result.outcome


@pytest.mark.parametrize("column", [name for name in columns.VERDICTS if name != "key"])
def test_every_column_is_hashed(measured, column):
    path = measured[1][1].with_suffix(".parquet")
    table = pd.read_parquet(path)
    old = table[column].iloc[0]
    if isinstance(old, str):
        new = "x" + old
    elif table[column].dtype == bool:
        new = not old
    else:
        new = np.float32(0.123) if table[column].dtype.kind == "f" else old + 1
    values = table[column].tolist()
    table[column] = pd.Series([new, *values[1:]], dtype=table[column].dtype)
    assert verdicts.table_sha256(table) != verdicts.table_sha256(pd.read_parquet(path))
    table.to_parquet(path, index=False)
    with pytest.raises(DataError, match=rf"{path.name}"):
        result_file.read_one(path.with_suffix(".json")).verdicts()


@pytest.mark.parametrize("column", columns.VERDICTS)
def test_columns_that_are_missing_or_of_another_kind_are_refused(measured, column):
    path = measured[1][1].with_suffix(".parquet")
    table = pd.read_parquet(path)
    other = range(len(table)) if isinstance(table[column].iloc[0], str) else "text"
    for changed, said in (
        (table.drop(columns=column), "no column"),
        (table.assign(**{column: other}), "kind"),
    ):
        changed.to_parquet(path, index=False)
        with pytest.raises(DataError, match=rf"{said}.*|column '{column}' has values of another {said}"):
            result_file.read_one(path.with_suffix(".json")).verdicts()


def test_clean_correct_of_earlier_results_is_recounted(measured):
    """Results of before `table_sha256`: the column that no hash covered follows from two that one does."""
    path = measured[1][1]
    rewritten(path, lambda blocks: blocks["outcome"].pop("table_sha256"))
    result_file.read_one(path).verdicts()
    table = pd.read_parquet(path.with_suffix(".parquet"))
    table["clean_correct"] = False
    table.to_parquet(path.with_suffix(".parquet"), index=False)
    with pytest.raises(DataError, match="clean_correct"):
        result_file.read_one(path).verdicts()


def test_a_verdict_outside_the_ball_is_refused(measured):
    path = measured[1][1]
    table = pd.read_parquet(path.with_suffix(".parquet"))
    table.loc[0, "distance"] = np.float32(0.9)
    table.to_parquet(path.with_suffix(".parquet"), index=False)
    rewritten(path, lambda blocks: blocks["outcome"].update(table_sha256=verdicts.table_sha256(table)))
    with pytest.raises(DataError, match=r"distance above the radius linf 4/255"):
        result_file.read_one(path).verdicts()


IMPOSSIBLE = {
    "model.parameters": 10**400,
    "outcome.n": 0,
    "outcome.n_classes": -1,
    "outcome.clean_correct": 1.5,
    "outcome.robust": [1, 2],
    "outcome.flags": "none",
    "config.eps": "1/0",
    "config.eps_ladder": ["9" * 5000],
    "config.model_sha256": "../../x",
    "config.n_requested": "all",
    "config.stop_rule": "1 look",
    "stages": [],
}


@pytest.mark.parametrize("key", IMPOSSIBLE)
def test_impossible_facts_are_one_line(measured, key):
    path = measured[1][0]

    def change(blocks):
        *parents, last = key.split(".")
        (blocks[parents[0]] if parents else blocks)[last] = IMPOSSIBLE[key]

    rewritten(path, change)
    with pytest.raises(DataError, match=re.escape(str(path))) as caught:
        result_file.read_one(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("damage", ["truncated", "of the smaller radius", "edited counts", "gone"])
def test_a_damaged_result_is_made_again_from_its_ledger(what, measured, damage):
    request, (smaller, path) = measured
    before = [path.read_bytes(), path.with_suffix(".parquet").read_bytes()]
    parquet = path.with_suffix(".parquet")
    if damage == "truncated":
        parquet.write_bytes(parquet.read_bytes()[:200])
    elif damage == "of the smaller radius":
        parquet.write_bytes(smaller.with_suffix(".parquet").read_bytes())
    elif damage == "gone":
        parquet.unlink()
    else:
        rewritten(path, lambda blocks: blocks["outcome"].update(clean_correct=1))
    remarks = []
    calls = [content["run"]["calls"] for _, content in remade(what, request, remarks)]
    assert parquet.read_bytes() == before[1]
    assert json.loads(path.read_text())["sha256"] == json.loads(before[0])["sha256"]
    assert set(calls[1].values()) == {0}  # everything was in the ledgers
    assert [path.stem in remark for remark in remarks] == ([] if damage == "gone" else [True])


def remade(what, request, remarks):
    from robustbench_vlm.evaluation import measure

    paths = list(measure.evaluate(what, request, lambda *_: None, remarks.append))
    return [(path, json.loads(path.read_text())) for path in paths]


def test_a_damaged_result_of_another_model_stops_no_evaluation(measured, what):
    request, (path, _) = measured
    other = request.results / "cells" / "other-00000000" / "toy" / "aa-linf-1-n12-0000000000.json"
    store.write(other, b"{")
    store.write(path.parent / "aa-linf-9-n12-1111111111.json", b"not json")
    assert len(toys.run(what, request)) == 2


def planted(line):
    """Lines that claim what did not happen."""
    return {
        "edited": {**line, "broken": not line["broken"]},
        "too far": {**line, "distance": 0.9},
        "no distance": {name: value for name, value in line.items() if name != "distance"},
        "no margin": {name: value for name, value in line.items() if name != "margin"},
        "wrong kind": {**line, "prediction": "1"},
        "a number as text": {**line, "progress": "0.1"},
        "a truth as number": {**line, "restart": False},
        "no such class": {**line, "prediction": 10_000},
    }


@pytest.mark.parametrize("kind", [*planted({"broken": 0, "distance": 0}), "text", "other ledger"])
def test_a_bad_ledger_line_is_named_and_its_image_alone_is_attacked_again(what, tmp_path, kind):
    request = toys.request(tmp_path, toys.chain("aa", "ce"))
    ((path, whole),) = toys.run(what, request)
    (ledger,) = (tmp_path / "ledger").rglob("*.jsonl")
    content = ledger.read_bytes()
    lines = content.splitlines(keepends=True)
    record = list(store.records(ledger))[3]
    if kind == "text":
        lines[3] = b"\x00\xffgarbage\n"
    elif kind == "other ledger":
        lines[3] = store.sealed(record, "other.jsonl")
    elif kind == "edited":
        lines[3] = store.canonical({**planted(record)[kind], "checksum": json.loads(lines[3])["checksum"]})
        lines[3] += b"\n"
    else:  # with a checksum that fits
        lines[3] = store.sealed(planted(record)[kind], ledger.name)
    ledger.write_bytes(b"".join(lines))
    path.unlink()
    remarks = []
    ((_, found),) = remade(what, request, remarks)
    assert found["sha256"] == whole["sha256"]
    assert len(remarks) == 1
    assert f"{ledger}, line 4:" in remarks[0]
    assert 0 < found["run"]["calls"]["gradients"] < whole["run"]["calls"]["gradients"]
    assert sorted(ledger.read_bytes().splitlines()) == sorted(content.splitlines())


def test_ledgers_of_before_checksums_are_read_and_go_on(what, tmp_path):
    request = toys.request(tmp_path, toys.chain("aa", "ce"))
    ((path, whole),) = toys.run(what, request)
    (ledger,) = (tmp_path / "ledger").rglob("*.jsonl")
    plain = [store.canonical(record) + b"\n" for record in store.records(ledger)]
    ledger.write_bytes(b"".join(plain[:5]))
    path.unlink()
    remarks = []
    assert remade(what, request, remarks)[0][1]["sha256"] == whole["sha256"]
    assert remarks == []
    with ledger.open("ab") as file:
        file.write(plain[0])  # after lines with a checksum, none is missing
    damaged = [line.damage for line in store.lines(ledger)]
    assert damaged[:-1] == [""] * (len(damaged) - 1)
    assert "no checksum" in damaged[-1]


@pytest.mark.parametrize("way", ["permuted", "flipped", "unsealed", "of another key"])
def test_a_changed_text_bank_in_the_cache_is_encoded_again(tmp_path, monkeypatch, way):
    monkeypatch.setenv("VLMROB_CACHE", str(tmp_path))
    sentences = [["a cat"], ["a dog"], ["a ship"]]
    bank = text_bank(toys.model(), sentences)
    (path,) = (tmp_path / "text").iterdir()
    found = tensor_files.read(path)
    assert torch.equal(found.tensors["bank"], bank)
    changed = {"bank": bank.flip(0) if way == "permuted" else bank + 1e-6 if way == "flipped" else bank}
    metadata = {**found.facts, "sha256": tensor_files.checksum(found.tensors, found.facts)}
    if way == "of another key":
        tensor_files.write(path, {"bank": bank.flip(0)}, {"key": "0"})
    else:
        save_file(changed, path, metadata=found.facts if way == "unsealed" else metadata)
    assert torch.equal(text_bank(toys.model(), sentences), bank)
    assert tensor_files.read(path).sealed


def test_a_tensor_file_is_held_to_its_checksum(tmp_path):
    path = tmp_path / "x.safetensors"
    values = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "c": torch.ones(2).bfloat16()}
    tensor_files.write(path, values, {"step": "7"})
    assert tensor_files.read(path).facts == {"step": "7"}
    stated = tensor_files.checksum(values, {"step": "7"})
    other_shape = {**values, "a": values["a"].reshape(3, 2)}
    for tensors, facts in ((other_shape, {"step": "7"}), (values, {"step": "99"}), ({"a": values["a"]}, {})):
        save_file(tensors, path, metadata={**facts, "sha256": stated})
        with pytest.raises(WeightsError, match="checksum"):
            tensor_files.read(path)
    save_file(values, path)
    assert not tensor_files.read(path).sealed
    assert load_file(path).keys() == values.keys()


FACTS = {"step": "7", "recipe": "ab", "größe": 'a "b" \\ \n', "d": "4", "e": "5", "f": "6"}
SAVE = """
import sys, torch
from pathlib import Path
from robustbench_vlm import tensor_files
values = {"b": torch.arange(6.0), "a": torch.ones(2).bfloat16()}
tensor_files.write(Path(sys.argv[1]), values, dict(zip(sys.argv[2::2], sys.argv[3::2])))
"""


def test_equal_content_gives_equal_bytes_in_every_process(tmp_path):
    """Safetensors has its metadata in a hash map, with another order in every call."""
    values = {"b": torch.arange(6.0), "a": torch.ones(2).bfloat16()}
    found = set()
    for i in range(8):
        facts = dict(reversed(FACTS.items())) if i % 2 else FACTS
        tensor_files.write(tmp_path / "x.safetensors", values, facts)
        found.add((tmp_path / "x.safetensors").read_bytes())
    words = [word for pair in FACTS.items() for word in pair]
    path = tmp_path / "y.safetensors"
    argv = [sys.executable, "-c", SAVE, str(path), *words]
    environment = {**os.environ, "PYTHONHASHSEED": "12"}
    assert subprocess.run(argv, check=False, env=environment).returncode == 0
    assert found == {path.read_bytes()}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    read = tensor_files.read(path)
    assert (read.facts, read.sealed) == (FACTS, True)
    assert all(torch.equal(read.tensors[name], value) for name, value in values.items())


def test_a_damaged_line_in_the_middle_of_a_log_is_one_line(tmp_path):
    path = tmp_path / "log.jsonl"
    for step in range(4):
        store.append(path, {"step": step})
    content = path.read_bytes()
    for bad in (content.replace(b'"step":1', b'"step":9'), content.replace(b'"step":1', b'"step":1e999')):
        path.write_bytes(bad)
        with pytest.raises(InputError, match=r"log\.jsonl, line 2: .*; expected a line as vlmrob wrote it"):
            list(store.records(path))


@pytest.mark.parametrize(
    "content",
    [b'{"a": NaN}', b'{"a": 1e999}', b"[" + b"9" * 5000 + b"]", b'"\\ud800"', b"[" * 100_000, b"\x00"],
)
def test_json_that_cannot_be_ours_is_one_line(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json: not JSON") as caught:
        store.read_json(path)
    assert "\n" not in str(caught.value)
