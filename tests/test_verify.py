"""Planted cheats: each is made with fitting counts and hashes, and each is named by `vlmrob verify`."""

import json
import math
import re
import shutil

import command_line
import forgeries
import numpy as np
import pandas as pd
import pytest
import torch
from forgeries import bundle_of, forge, relabel_model, survive, unpacked

from robustbench_vlm import store
from robustbench_vlm.cards import reader
from robustbench_vlm.errors import DataError, InputError
from robustbench_vlm.evaluation import reattack
from robustbench_vlm.evaluation.verify import AtHand, Verifier
from robustbench_vlm.evaluation.verify_folder import Target, verify
from robustbench_vlm.results import (
    evidence,
    leaderboard,
    packing,
    result_file,
    row_check,
    submission,
    verification,
)

EVAL = "--attack aa --suite toys --device cpu --save-evidence"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return forgeries.make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def honest(home, tmp_path_factory):
    """Results of two models at 4/255, and of one at 2/255, with their evidence."""
    root = tmp_path_factory.mktemp("honest")
    with pytest.MonkeyPatch.context() as patch:
        models = ["--model", f"{home}/models/m0,{home}/models/m1"]
        for eps, typed in (("4", models), ("2", [models[0], f"{home}/models/m0"])):
            words = [*typed, *EVAL.split(), "--eps", eps, "--data-root", home / "data", "--out", root / eps]
            code = command_line.run_command(patch, "--include", home / "cards", "eval", *words)
            assert code == 0
    return root


@pytest.fixture
def results(honest, tmp_path):
    """A copy that may be forged."""
    return forgeries.copied(honest / "4", tmp_path / "results")


@pytest.fixture(scope="module")
def at_hand():
    """Models and datasets that were read once, for all tests."""
    return AtHand()


@pytest.fixture
def check(home, tmp_path, at_hand):
    """Verify a path: the report, with 100 % of the survivors attacked again if asked for."""
    reader.include([home / "cards"])

    def run(path, share=None, results=None):
        scratch = tmp_path / "scratch"
        scratch.mkdir(exist_ok=True)
        models = (f"{home}/models/m0", f"{home}/models/m1")
        verifier = Verifier(home / "data", scratch, torch.device("cpu"), models, lambda *_: None, at_hand)
        return verify(Target.of(path, results or path), verifier, share, 5, lambda *_: None)

    yield run
    reader.include([])


def named(report):
    """Names of the claims that do not hold."""
    return {claim.name for cell in report.cells for claim in cell.faults}


# --- honest results ----------------------------------------------------------------------------------------


def test_honest_results_pass_and_survive_a_second_attack(results, check):
    report = check(results, share=1.0)
    assert report.faults() == []
    assert report.drawn.count == report.drawn.survivors == sum(len(cell.survivors) for cell in report.cells)
    assert {cell.status for cell in report.cells} == {"re-attacked"}
    assert all(set(cell.kinds) <= {*packing.KINDS} for cell in report.cells)
    assert any(cell.kinds for cell in report.cells)


def test_a_stopped_evaluation_is_verified(home, check, tmp_path, vlmrob):
    words = ["--model", f"{home}/models/m0", *EVAL.split(), "--eps", "4", "--until", "20"]
    vlmrob("--include", home / "cards", "eval", *words, "--data-root", home / "data", "--out", tmp_path / "r")
    reader.include([home / "cards"])  # the command has left none
    report = check(tmp_path / "r")
    assert report.faults() == []
    assert all(cell.result.contest.stop_rule.startswith("until 20 points") for cell in report.cells)


def test_one_bundle_alone_is_enough(honest, check, tmp_path):
    alone = tmp_path / f"anything{evidence.SUFFIX}"
    shutil.copyfile(bundle_of(honest / "4"), alone)
    report = check(alone)
    assert [cell.status for cell in report.cells] == ["verified"]


def test_every_radius_of_a_protocol_on_another_canvas_passes(vlmrob, home, check, tmp_path):
    facts = {"name": "own", "title": "Own", "paper": "none", "suite": "toys", "attack": "aa", "n": 6}
    facts |= {"eps": ["2/255", "4/255"], "prompts": "clip", "canvas": "model", "antialias": False}
    (home / "cards" / "protocols").mkdir(exist_ok=True)
    (home / "cards" / "protocols" / "own.toml").write_text(forgeries.toys.toml(facts))
    words = ["--protocol", "own", "--save-evidence", "--dataset", "toy", "--out", tmp_path / "r"]
    assert vlmrob("eval", *words, "--model", f"{home}/models/m0", *models(home)[2:])[0] == 0
    reader.include([home / "cards"])
    report = check(tmp_path / "r")
    assert report.faults() == []
    assert [str(cell.result.threat) for cell in report.cells] == ["linf 2/255", "linf 4/255"]
    assert report.cells[1].result.config["canvas_px"] == 32

    def other_radius(parts):
        parts.blocks["config"]["eps_ladder"] = ["1/255", "4/255"]

    path = forge(report.cells[1].path, other_radius)
    assert named(check(path)) == {"configuration"}


# --- what forward passes show ------------------------------------------------------------------------------


def outside(parts, home):
    key = next(iter(parts.images))
    adv = forgeries.image_of(home, parts, key)
    clean = forgeries.clean_of(home, key)
    moved = np.clip(clean + 3 * (adv - clean), 0, 1).astype(np.float32)
    parts.images[key] = packing.pack("exact", moved, clean)


def unharmed(parts, home):
    key = next(iter(parts.images))
    clean = forgeries.clean_of(home, key)
    parts.images[key] = packing.pack("exact", clean, clean)


def other_image(parts, home):
    parts.table.loc[0, "image_sha256"] = "0" * 64


def other_label(parts, home):
    i = parts.table.index[parts.table.broken_by == ""][0]
    label = (parts.table.label[i] + 1) % 6
    parts.table.loc[i, ["label", "clean_prediction", "adv_prediction"]] = label


def without_evidence(parts, home):
    parts.images.pop(next(iter(parts.images)))


def too_much_evidence(parts, home):
    key = parts.table.key[parts.table.broken_by == ""].iloc[0]
    parts.images[key] = next(iter(parts.images.values()))


def cut_evidence(parts, home):
    key = next(iter(parts.images))
    parts.images[key] = packing.Packed("corners", b"\0")


def larger_radius(parts, home):
    parts.table.loc[parts.table.broken_by != "", "broken_at_eps"] = "8/255"


def other_chain(parts, home):
    """The name of a known chain with fewer steps in every place where its numbers stand."""
    for stages in (parts.chain["stage"], parts.blocks["stages"]):
        stages[0]["steps"] = 1


def other_training(parts, home):
    parts.blocks["model"] |= {"train_eps": "4/255", "train_norm": "linf", "defense": "tecoa"}


def fewer_images(parts, home):
    worst = parts.table.index[parts.table.broken_by != ""]
    for key in parts.table.key[worst]:
        parts.images.pop(key)
    parts.table = parts.table.drop(worst).reset_index(drop=True)


def one_image_twice(parts, home):
    """The hash of a robust image stands for a broken one, too."""
    robust = parts.table.index[parts.table.broken_by == ""][0]
    broken = parts.table.index[parts.table.broken_by != ""][0]
    survive(parts, broken)
    for name in ("label", "image_sha256", "clean_prediction", "adv_prediction"):
        parts.table.loc[broken, name] = parts.table.loc[robust, name]


def one_row_twice(parts, home):
    robust = parts.table.index[parts.table.broken_by == ""][0]
    parts.table.loc[len(parts.table)] = parts.table.loc[robust]


def other_suite(parts, home):
    parts.suite["sample"] = "stratified"


def other_protocol_numbers(parts, home):
    parts.blocks["config"]["canvas_px"] = 8


CHEATS = {
    outside: "inside the ball",
    unharmed: "misclassified",
    other_image: "image files",
    other_label: "labels",
    without_evidence: "evidence",
    too_much_evidence: "evidence",
    cut_evidence: "evidence",
    larger_radius: "radius",
    other_chain: "chain",
    other_training: "model",
    fewer_images: "published subset",
    one_image_twice: "distinct images",
    one_row_twice: "bundle",
    other_suite: "suite",
    other_protocol_numbers: "configuration",
}


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.__name__)
def test_a_forged_bundle_is_named(cheat, results, check, home):
    path = forge(bundle_of(results), lambda parts: cheat(parts, home))
    report = check(path)
    assert CHEATS[cheat] in named(report)
    assert report.cells[0].status == "failed"


def test_a_wrong_image_claimed_to_be_right(results, check):
    """A clean error of m1 is claimed to be right and robust."""

    def change(parts):
        i = parts.table.index[~parts.table.clean_correct][0]
        parts.table.loc[i, ["clean_prediction", "adv_prediction"]] = parts.table.label[i]
        parts.table.loc[i, "clean_correct"] = True

    path = forge(bundle_of(results, "random1"), change)
    assert named(check(path)) == {"clean predictions"}


def test_the_result_of_another_model(results, check):
    other = unpacked(bundle_of(results, "random1"))
    path = forge(bundle_of(results), lambda parts: relabel_model(parts, other))
    assert named(check(path)) & {"clean predictions", "misclassified"}


def test_two_results_with_their_models_swapped(results, check):
    paths = [bundle_of(results, "random0"), bundle_of(results, "random1")]
    parts = [unpacked(path) for path in paths]
    kept = [unpacked(path) for path in paths]
    for one, other, path in zip(parts, reversed(kept), paths, strict=True):
        relabel_model(one, other)
        forgeries.rewrite(path, one)
    report = check(results)
    failed = [cell for cell in report.cells if cell.status == "failed"]
    assert {cell.result.dataset for cell in failed} == {"toy"}
    assert len(failed) == 2


def test_the_name_of_a_model_with_other_weights(results, check):
    """The fingerprint is left as it is, and the name is that of another model at hand."""
    path = forge(bundle_of(results), lambda parts: parts.blocks["config"].update(model="random1"))
    assert "model" in named(check(path))


@pytest.mark.parametrize("stated", [[], ["error-rows"]])
def test_flags_that_were_emptied_or_replaced(stated, results, check):
    path = bundle_of(results, dataset="tied")
    assert unpacked(path).blocks["outcome"]["flags"] == ["tied-classes"]
    forge(path, lambda parts: parts.blocks["outcome"].update(flags=stated))
    report = check(path)
    assert named(report) == {"flags"}
    assert "tied-classes" in report.faults()[0]


def test_a_flag_beside_those_found_here_is_no_fault(results, check):
    """An attack raises flags that a forward pass cannot: a result may have more of them, and not fewer."""
    path = forge(
        bundle_of(results, dataset="tied"), lambda parts: parts.blocks["outcome"]["flags"].insert(0, "blind")
    )
    assert check(path).faults() == []


# --- what only a second attack shows -----------------------------------------------------------------------


def test_survivors_that_nobody_attacked(results, check):
    def change(parts):
        survive(parts, parts.table.index[parts.table.broken_by != ""][0])

    path = forge(bundle_of(results), change)
    assert check(path).faults() == []  # that is what forward passes cannot know
    report = check(path, share=1.0)
    assert named(report) == {"survivors"}
    assert "1 of " in report.faults()[0]


def at_four(parts):
    """The configuration of a result at 2/255 as one at 4/255."""
    parts.blocks["config"] |= {"eps": "4/255", "eps_ladder": ["4/255"]}
    parts.blocks["threat"] |= {"eps": "4/255", "eps_ladder": "4/255"}


def test_verdicts_of_a_smaller_radius_are_not_of_the_ladder(honest, check, tmp_path):
    results = forgeries.copied(honest / "2", tmp_path / "small")
    path = forge(bundle_of(results), at_four)
    assert "radius" in named(check(path))


def test_verdicts_of_a_smaller_radius_that_claim_the_larger_one(honest, check, tmp_path):
    results = forgeries.copied(honest / "2", tmp_path / "small")

    def change(parts):
        at_four(parts)
        parts.table.loc[parts.table.broken_by != "", "broken_at_eps"] = "4/255"

    path = forge(bundle_of(results), change)
    assert "survivors" in named(check(path, share=1.0))


def test_the_draw_is_a_function_of_the_seed_and_its_power_is_hypergeometric(results, check):
    reports = check(results).cells
    first, again, other = (reattack.draw(reports, 0.2, seed).keys for seed in (1, 1, 2))
    assert first == again != other
    total = sum(len(report.survivors) for report in reports)
    assert reattack.draw(reports, 0.2, 1).count == math.ceil(0.2 * total)
    # one forged of 10, 3 drawn: 3/10; two forged of 5, 2 drawn: 1 - (3/5 * 2/4)
    assert reattack.detection(10, 3, 0.1) == pytest.approx(0.3)
    assert reattack.detection(5, 2, 0.4) == pytest.approx(0.7)
    assert reattack.detection(0, 0, 0.1) == 0


@pytest.mark.parametrize(("typed", "share"), [("2%", 0.02), ("0.5", 0.5), ("100%", 1.0)])
def test_shares_that_can_be_typed(typed, share):
    assert reattack.share_of(typed) == pytest.approx(share)


@pytest.mark.parametrize("typed", ["", "x", "0", "-1%", "101%", "nan"])
def test_shares_that_cannot(typed):
    with pytest.raises(InputError, match="--reattack"):
        reattack.share_of(typed)


# --- files -------------------------------------------------------------------------------------------------


def test_files_edited_with_all_hashes_are_caught_beside_their_bundle_and_unproven_without(results, check):
    path = bundle_of(results)
    kept = path.read_bytes()
    forge(path, lambda parts: survive(parts, parts.table.index[parts.table.broken_by != ""][0]))
    path.write_bytes(kept)  # JSON and Parquet are forged, the evidence is not
    assert named(check(path)) == {"result beside"}
    path.unlink()
    report = check(results)
    assert report.faults() == []
    assert len([line for line in report.lacking() if "unproven" in line]) == 1


def test_counts_that_are_not_those_of_the_verdicts(results, check):
    path = evidence.result_of(bundle_of(results))
    blocks = json.loads(path.read_text())
    blocks["outcome"]["robust"]["square"] += 1
    blocks["sha256"] = forgeries.store.fingerprint({name: blocks[name] for name in result_file.HASHED})
    path.write_text(json.dumps(blocks))
    assert named(check(results)) == {"result beside"}
    bundle_of(results).unlink()
    assert named(check(results)) == {"result"}


@pytest.mark.parametrize("where", [100, 15000, -30])
def test_changed_bytes_are_caught(where, results, check):
    path = bundle_of(results)
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    assert named(check(path)) == {"bundle"}


def test_a_cut_bundle_is_a_fault_and_another_file_is_wrong_input(results, check, tmp_path):
    path = bundle_of(results)
    path.write_bytes(path.read_bytes()[:5000])
    assert named(check(path)) == {"bundle"}
    for name, content in (("x.json", "{}"), ("x.csv", "a,b\n1,2\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match="expected"):
            check(tmp_path / name)


def test_a_copied_result(results, check):
    path = bundle_of(results)
    copy = path.with_name(f"other{evidence.SUFFIX}")
    shutil.copyfile(path, copy)
    assert named(check(results)) == {"only copy"}


def test_the_result_of_another_dataset(results, check):
    path = forge(bundle_of(results), lambda parts: parts.blocks["config"].update(dataset="tied"))
    assert {"published subset", "configuration"} <= named(check(path))


# --- rows --------------------------------------------------------------------------------------------------


@pytest.fixture
def table(results, check):
    """The leaderboard of the results, written among them."""
    suite = reader.suite("toys")
    _, (path, *_) = leaderboard.render(results, suite, results)
    return path


def edited(path, change):
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    change(rows).to_csv(path, index=False, lineterminator="\n")
    return path


def a_number(rows):
    rows.loc[rows.dataset == "toy", "robust"] = "99.00"
    return rows


def a_flag(rows):
    rows["flag"] = ""
    return rows


def a_mean(rows):
    rows.loc[rows.dataset == "mean", "ci_low"] = "1.00"
    return rows


def a_name(rows):
    rows.loc[rows.dataset == "toy", "model_id"] = "ours"
    return rows


def a_dataset_left_out(rows):
    return rows[rows.dataset != "tied"]


def a_row_twice(rows):
    return pd.concat([rows, rows.iloc[:1]])


ROWS = {
    a_number: "robust is 99.00",
    a_flag: "flag is ",
    a_mean: "ci_low is 1.00",
    a_name: "of another model",
    a_dataset_left_out: "the row was left out",
    a_row_twice: "stands twice",
}


@pytest.mark.parametrize("change", ROWS, ids=lambda change: change.__name__)
def test_rows_edited_by_hand(change, table, results):
    report = row_check.check(edited(table, change), forgeries.read_results(results))
    assert any(ROWS[change] in fault for fault in report.faults), report


def test_rows_that_follow(table, results, check):
    report = check(table, results=results)
    assert report.faults() == []
    assert len(report.cells) == 4
    assert report.tables[0].rows == 6  # two models, two datasets and their mean


def test_a_row_without_its_result_is_unproven_and_not_wrong(table, results, check):
    for path in (results / "cells").glob("random1-*"):
        shutil.rmtree(path)
    report = check(table, results=results)
    assert report.faults() == []
    assert [line for line in report.lacking() if "random1" in line]


# --- submissions -------------------------------------------------------------------------------------------


@pytest.fixture
def submitted(results, check, tmp_path):
    out = tmp_path / "submission"
    submission.write([results], out, submission.Answers("MIT", "not public"))
    return out


def test_a_submission_is_complete_and_verified(submitted, check):
    report = check(submitted)
    assert report.faults() == []
    record = json.loads((submitted / submission.FILE).read_text())
    assert record["licence"] == "MIT"
    assert record["models"] == ["random0", "random1"]
    assert "vlmrob eval --suite toys --model random0 --attack aa" in record["commands"][0]
    cards = sorted(path.name for path in submitted.glob("MODEL-*.md"))
    assert len(cards) == 2
    assert "- licence of the weights: MIT" in (submitted / cards[0]).read_text()


def test_a_dataset_removed_from_a_submission(results, check, tmp_path):
    """The whole dataset is gone, with its rows and its means, so nothing contradicts anything."""
    for path in (results / "cells").glob("*/tied"):
        shutil.rmtree(path)
    out = tmp_path / "submission"
    submission.write([results], out, submission.Answers("MIT", "not public"))
    faults = check(out).faults()
    assert len(faults) == 2
    assert all("has no row on tied" in fault for fault in faults)


def test_a_changed_or_added_file_of_a_submission(submitted, check):
    (card, *_) = submitted.glob("MODEL-*.md")
    card.write_text("# ours\n")
    (submitted / "run.sh").write_text("")
    bundle_of(submitted).unlink()
    faults = "\n".join(check(submitted).faults())
    assert "other bytes than its hash" in faults
    assert "run.sh: not listed" in faults
    assert "missing" in faults
    assert "unproven" in faults


def test_a_submission_needs_evidence(results, check, tmp_path):
    bundle_of(results).unlink()
    with pytest.raises(InputError, match=r"no bundle of evidence.*--save-evidence"):
        submission.write([results], tmp_path / "out", submission.Answers("MIT", "not public"))
    assert not (tmp_path / "out").exists()


# --- the commands ------------------------------------------------------------------------------------------


@pytest.fixture
def vlmrob(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def typed(*words):
        code = command_line.run_command(monkeypatch, "--include", home / "cards", *words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return typed


def models(home):
    return ["--model", f"{home}/models/m0,{home}/models/m1", "--data-root", home / "data", "--device", "cpu"]


def test_verify_prints_a_table_and_its_limits(vlmrob, results, home):
    code, out, err = vlmrob("verify", results, *models(home), "--reattack", "10%", "--seed", 3)
    assert code == 0, err
    assert out.splitlines()[0].startswith("# 4 results: ")
    assert "survivors attacked again, seed 3: 1% of them forged is found with" in out
    assert err.count("not shown: ") == 3


def test_verify_exits_3_and_names_the_fault(vlmrob, results, home):
    forge(bundle_of(results), lambda parts: other_image(parts, home))
    code, out, err = vlmrob("verify", results, *models(home), "--json")
    record = json.loads(out)
    assert code == 3
    assert record["passed"] is False
    assert [cell["status"] for cell in record["cells"]].count("failed") == 1
    assert "random0 on toy, linf 4/255: image files: toy/test/" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing"], "no such file"),
        (["."], "no result, no bundle and no table"),
        (["results", "--reattack", "2%"], "--seed"),
        (["results", "--seed", "2"], "--reattack"),
    ],
)
def test_verify_refuses_wrong_input(words, said, vlmrob):
    code, out, err = vlmrob("verify", *words)
    assert (code, out) == (2, "")
    assert said in err


def test_a_model_that_is_not_at_hand_is_wrong_input(vlmrob, results, home):
    code, _, err = vlmrob("verify", results, "--data-root", home / "data", "--device", "cpu")
    assert code == 2
    assert "random0" in err


def test_submit_asks_for_licence_and_source(vlmrob, results, home):
    assert "no --licence" in vlmrob("submit", results)[2]
    assert "no --source" in vlmrob("submit", results, "--licence", "MIT")[2]
    code, out, err = vlmrob("submit", results, "--licence", "MIT", "--source", "not public", "--out", "mine")
    assert code == 0, err
    assert "mine/submission.json" in out
    code, _, err = vlmrob("submit", results, "--licence", "MIT", "--source", "not public", "--out", "mine")
    assert code == 2
    assert "exists already" in err
    assert vlmrob("verify", "mine", *models(home))[0] == 0


# --- the page says what was verified -----------------------------------------------------------------------


def levels_on_the_page(results, home):
    """The levels of evidence of the rows of the page, in its order."""
    kept = reader.included()
    reader.include([home / "cards"])
    try:
        _, files = leaderboard.render(results, reader.suite("toys"), results / "tables")
    finally:
        reader.include(kept)
    page = next(path for path in files if path.suffix == ".html").read_text()
    return [json.loads(found) for found in re.findall(r'"evidence":(\[[^]]*\])', page)]


def test_the_page_says_how_well_each_row_is_supported(results, check, home):
    assert levels_on_the_page(results, home) == [["bundle"], ["bundle"]]
    verification.write(results, check(results).checked)
    assert levels_on_the_page(results, home) == [["verified"], ["verified"]]
    verification.write(results, check(results, share=1.0).checked)
    assert levels_on_the_page(results, home) == [["re-attacked"], ["re-attacked"]]
    forge(bundle_of(results), unharmed_again)  # another file than the one that was verified
    assert levels_on_the_page(results, home) == [["bundle", "re-attacked"], ["re-attacked"]]
    for path in (results / "cells").rglob(f"*{evidence.SUFFIX}"):
        path.unlink()
    assert levels_on_the_page(results, home) == [["verdicts"], ["verdicts"]]


def unharmed_again(parts):
    parts.suite["title"] = "Another title"


def test_a_fault_is_on_the_page_too(results, home, vlmrob):
    forge(bundle_of(results), lambda parts: outside(parts, home))
    code, _, err = vlmrob("verify", results, *models(home), "--record")
    assert code == 3
    assert "written: " in err
    assert "failed" in levels_on_the_page(results, home)[0]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"schema": "vlmrob-verification/1"}',
        '{"schema": "vlmrob-verification/1", "cells": {"a": ["sure", ""]}}',
    ],
)
def test_a_record_that_is_none_is_refused(text, results, home):
    (results / verification.FILE).write_text(text)
    with pytest.raises(DataError, match=r"verification\.json"):
        levels_on_the_page(results, home)


def test_only_own_results_are_recorded(results, vlmrob):
    code, _, err = vlmrob("verify", bundle_of(results), "--record")
    assert code == 2
    assert "a folder of results" in err


def test_only_a_whole_folder_of_results_is_recorded(results, vlmrob):
    """A record inside `cells` would be taken for a result."""
    code, _, err = vlmrob("verify", results / "cells", "--record")
    assert code == 2
    assert "a folder of results" in err
    assert not (results / "cells" / verification.FILE).exists()


def test_results_of_one_model_are_found_without_their_bundles(results):
    path = bundle_of(results)
    folder = path.parent
    for bundle in folder.glob(f"*{evidence.SUFFIX}"):
        bundle.unlink()
    assert Target.of(folder, folder).bare == (evidence.result_of(path),)


def test_results_that_cannot_be_attacked_again_are_told(results, check, home, vlmrob, monkeypatch):
    monkeypatch.setattr(reattack, "refusal", lambda report: "attacked by native-reference/3")
    report = check(results, share=1.0)
    assert report.drawn.impossible
    assert [line.partition(": ")[2] for line in report.record["reattack"]["refused"]] == [
        "not attacked again: attacked by native-reference/3"
    ] * 4
    code, _, err = vlmrob("verify", results, *models(home), "--reattack", "5%", "--seed", 3)
    assert code == 2
    assert err.count("note: random") == 4
    assert "no result can be attacked again here" in err


def test_a_submission_does_not_bring_its_own_verification(submitted):
    store.write_json(submitted / verification.FILE, {"schema": verification.SCHEMA, "cells": {}})
    record = json.loads((submitted / submission.FILE).read_text())
    record["files"][verification.FILE] = store.file_sha256(submitted / verification.FILE)
    store.write_json(submitted / submission.FILE, record)
    (fault,) = submission.faults(submitted)
    assert "does not bring its own verification" in fault


def test_results_may_lie_below_a_folder_that_is_called_cells(tmp_path):
    results = tmp_path / "cells" / "run"
    (results / "cells").mkdir(parents=True)
    for path in (results / "verification.json", results / "cells" / "one.json"):
        path.write_text("{}")
    assert Target.of(results, results).bare == (results / "cells" / "one.json",)
