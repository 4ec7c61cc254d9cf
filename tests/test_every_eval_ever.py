"""`vlmrob export --to every-eval-ever`: names and kinds of schema 0.3.0, written here from its definition."""

import hashlib
import json
import re

import pytest
from command_line import run_command
from test_leaderboard import cell

from robustbench_vlm.errors import DataError
from robustbench_vlm.results import every_eval_ever, result_file, stats, verdicts
from robustbench_vlm.results.every_eval_ever import Source

LOG = {
    *("schema_version", "evaluation_id", "evaluation_timestamp", "retrieved_timestamp", "source_metadata"),
    *("eval_library", "model_info", "evaluation_results", "detailed_evaluation_results"),
}
LINE = {
    *("schema_version", "evaluation_id", "model_id", "evaluation_name", "evaluation_result_id", "sample_id"),
    *("sample_hash", "interaction_type", "input", "output", "answer_attribution", "evaluation", "metadata"),
}
UUID4 = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


@pytest.fixture
def results(tmp_path):
    cell(tmp_path, "ours", "one", 9, {0: "apgd-ce", 3: "square"})
    cell(tmp_path, "ours", "two", 8, {1: "apgd-ce"})
    cell(tmp_path, "hf-hub:org/tower", "one", 9, {2: "square"})
    return tmp_path


@pytest.fixture
def exported(results):
    """Every log with the lines of its images, by the name of the model."""
    files = every_eval_ever.write(results, results / "out", Source("lab", "makers"))
    found = {}
    for path, beside in zip(files[::2], files[1::2], strict=True):
        log = json.loads(path.read_text())
        lines = [json.loads(line) for line in beside.read_text().splitlines()]
        found[log["model_info"]["name"]] = (path, beside, log, lines)
    return found


def test_a_log_has_a_clean_and_a_robust_accuracy_of_each_dataset(results, exported):
    _, _, log, _ = exported["ours"]
    assert log.keys() == LOG
    of = {(r.model[0], r.dataset): r for r in result_file.read(results)}
    names = [found["evaluation_name"] for found in log["evaluation_results"]]
    assert names == ["vlmrob.one.clean", "vlmrob.one.robust", "vlmrob.two.clean", "vlmrob.two.robust"]
    outcome = of["ours", "one"].outcome
    robust = log["evaluation_results"][1]
    count = outcome["robust"]["square"]
    assert robust["score_details"]["score"] == count / outcome["n"]
    interval = robust["score_details"]["uncertainty"]["confidence_interval"]
    wilson = stats.wilson(count, outcome["n"])
    assert (interval["lower"], interval["upper"]) == (wilson.low, wilson.high)
    assert robust["metric_config"]["metric_parameters"]["eps"] == "4/255"
    assert log["evaluation_results"][0]["metric_config"]["metric_id"] == "accuracy"
    assert log["source_metadata"]["evaluator_relationship"] == "third_party"


def test_every_image_has_a_line_for_each_accuracy(results, exported):
    path, beside, log, lines = exported["ours"]
    for line in lines:
        assert line.keys() == LINE
        assert line["evaluation_id"] == log["evaluation_id"]
        assert line["model_id"] == log["model_info"]["id"] == "makers/ours"
        given = json.dumps(line["input"], sort_keys=True, separators=(",", ":"))
        assert line["sample_hash"] == hashlib.sha256(given.encode()).hexdigest()
    for result in result_file.read(results):
        if result.model[0] != "ours":
            continue
        table = result.verdicts()
        for kind, right in (("clean", table.clean_correct), ("robust", verdicts.standing(table))):
            own = [line for line in lines if line["evaluation_name"] == f"vlmrob.{result.dataset}.{kind}"]
            assert [line["sample_id"] for line in own] == table.key.tolist()
            assert [line["evaluation"]["is_correct"] for line in own] == right.tolist()
    said = log["detailed_evaluation_results"]
    assert said["checksum"] == hashlib.sha256(beside.read_bytes()).hexdigest()
    assert said["total_rows"] == len(lines)
    assert said["file_path"] == beside.relative_to(results / "out").as_posix()
    assert beside.name == f"{path.stem}_samples.jsonl"


def test_files_lie_where_the_data_store_wants_them(results, exported):
    for path, *_ in exported.values():
        parts = path.relative_to(results / "out").parts
        assert len(parts) == 5
        assert parts[:2] == ("data", "vlmrob")
        assert re.fullmatch(UUID4, path.stem)
    own = exported["hf-hub:org/tower"][2]
    assert own["model_info"]["id"] == "org/tower"
    assert own["model_info"]["developer"] == "org"


def test_texts_are_texts_and_the_same_results_give_the_same_bytes(results, exported):
    for path, beside, log, lines in exported.values():
        before = path.read_bytes(), beside.read_bytes()
        every_eval_ever.write(results, results / "out", Source("lab", "makers"))
        assert (path.read_bytes(), beside.read_bytes()) == before
        assert all(isinstance(text, str) for text in log["model_info"]["additional_details"].values())
        assert all(isinstance(text, str) for line in lines for text in line["metadata"].values())
    ours = every_eval_ever.write(results, results / "own", Source("lab", "lab"))
    made = [json.loads(path.read_text())["source_metadata"]["evaluator_relationship"] for path in ours[::2]]
    assert sorted(made) == ["first_party", "third_party"]


def test_no_results_and_no_organization_are_said(tmp_path, monkeypatch, capsys):
    with pytest.raises(DataError, match="no results below cells/"):
        every_eval_ever.write(tmp_path, tmp_path / "out", Source("lab", "lab"))
    assert run_command(monkeypatch, "export", tmp_path, "--to", "every-eval-ever") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "no --organization" in err


def test_the_command(results, monkeypatch, capsys):
    words = ["export", results, "--to", "every-eval-ever", "--organization", "lab", "--out", results / "out"]
    assert run_command(monkeypatch, *words) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
