"""The leaderboard is a view of cells: same cells, same bytes; what is not comparable shares no table."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from robustbench_vlm import store
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.errors import DataError, InputError
from robustbench_vlm.results import (
    columns,
    compare,
    contest,
    flags,
    grids,
    leaderboard,
    mean_interval,
    result_file,
    verdicts,
)
from robustbench_vlm.results.contest import Contest
from robustbench_vlm.results.open_table import opened

GOLDEN = Path(__file__).parent / "golden" / "leaderboard.csv"
SUITE = Suite(
    name="pair",
    title="A pair of datasets",
    version=3,
    datasets=("one", "two"),
    eps=("4/255",),
    n=10,
    means={"first": ("one",)},
)
STAGES = {"aa": ("apgd-ce", "square"), "pgd20": ("pgd20",)}


def sha(text):
    return store.fingerprint(text)


def table(dataset, clean, broken, eps="4/255", n=10, labels=None):
    """Verdicts of `n` images: the first `clean` are right; `broken` gives the stage that broke an image."""
    labels = np.array(labels or [0] * n, dtype=np.int64)
    n = len(labels)
    predictions = np.where(np.arange(n) < clean, labels, 1 - labels)
    keys = [f"{dataset}/test/s{i:07d}" for i in range(n)]
    margins = np.where(predictions == labels, 1, -1).astype(np.float32)
    found = verdicts.begin(keys, labels, [sha(key) for key in keys], predictions, margins)
    fields = {"target": -1, "restart": 0, "iteration": 2, "forwards": 3, "backwards": 3}
    fields |= {"prediction": 1, "margin": -0.1, "zero_gradients": 0, "error": "", "distance": 4 / 255}
    fields["progress"] = 0.5
    with opened(found, eps) as entries:
        for i, stage in broken.items():
            entries.enter(i, {**fields, "broken": True, "adv_sha256": sha([dataset, i])}, stage)
    return found


def cell(results, model, dataset, clean, broken, **changes):
    """A result written by hand; `changes` go to its config, `outcome` and `model_facts` to theirs."""
    outcome, facts = changes.pop("outcome", {}), changes.pop("model_facts", {})
    labels = changes.pop("labels", None)
    config = {
        **{"model": model, "model_sha256": sha(model), "bank_sha256": sha("bank"), "dataset": dataset},
        **{"dataset_version": 1, "split": "test", "n_requested": 10, "seed": 0, "canvas": "native"},
        **{"canvas_px": 32, "precision": "fp32", "engine": "native/1", "norm": "linf", "eps": "4/255"},
        **{"eps_ladder": ["4/255"], "attack": "aa", "attack_version": 1, "subset_sha256": sha(dataset)},
        **{"images_sha256": sha(["images", dataset]), "names_sha256": sha("n"), "templates_sha256": sha("t")},
    } | changes
    config["attack_sha256"] = changes.get("attack_sha256", sha(config["attack"]))
    stages = STAGES[config["attack"]]
    found = table(dataset, clean, broken, config["eps"], labels=labels)
    content = {
        "config": config,
        "outcome": {
            **{"n": len(found), "n_classes": 4, "clean_correct": clean},
            **{"robust": verdicts.robust_after(found, stages, "4/255"), "errors": 0, "majority": 0.4},
            **{"exposure": "unseen", "flags": [], "verdicts_sha256": verdicts.sha256(found)},
        }
        | outcome,
        "model": {
            **{"id": model, "arch": "vlmrob-tiny", "defense": "none", "parameters": 178_480},
            **{"train_eps": "", "train_norm": "", "trained_on": []},
        }
        | facts,
        "stages": [{"name": stage, "attack": "apgd"} for stage in stages],
    }
    path = results / "cells" / model / dataset / f"{config['attack']}-{sha(config)[:8]}.json"
    store.write(path.with_suffix(".parquet"), found.to_parquet(index=False))
    whole = {"schema": result_file.SCHEMA, "sha256": store.fingerprint(content), **content}
    store.write_json(path, whole | {"run": {"seconds": 1.5, "date": "2026-01-02T03:04:05+00:00"}})
    return path


def two_models(results):
    cell(results, "clean", "one", 9, dict.fromkeys(range(9), "apgd-ce"))
    cell(results, "clean", "two", 8, dict.fromkeys(range(7), "apgd-ce"), outcome={"flags": ["zero-gradient"]})
    cell(results, "defended", "one", 8, {0: "apgd-ce", 1: "square"}, outcome={"exposure": "seen"},
         model_facts={"defense": "mmt-ard", "train_eps": "4/255", "train_norm": "linf"})  # fmt: skip
    cell(results, "defended", "two", 7, {0: "apgd-ce", 1: "apgd-ce", 2: "square"},
         model_facts={"defense": "mmt-ard", "train_eps": "4/255", "train_norm": "linf"})  # fmt: skip


def rows(results, suite=SUITE):
    return leaderboard.table(result_file.of_suite(result_file.read(results), suite), suite)


def row(found, model, dataset, **more):
    chosen = found[(found.model_id == model) & (found.dataset == dataset)]
    for name, value in more.items():
        chosen = chosen[chosen[name] == value]
    assert len(chosen) == 1
    return chosen.iloc[0]


# --- engines -----------------------------------------------------------------------------------------------


def test_engines_modes_and_precisions_never_share_a_table_or_a_mean(tmp_path):
    two_models(tmp_path)
    others = ({"engine": "native-reference/1"}, {"precision": "bf16-find"}, {"engine": "torchattacks/x-1/1"})
    for way in others:
        cell(tmp_path, "clean", "one", 9, {0: "apgd-ce"}, **way)
    found = rows(tmp_path)
    ways = found[["engine", "precision"]].drop_duplicates()
    assert len(ways) == 4
    means = found[found.dataset == "mean"]
    assert set(zip(means.engine, means.precision, strict=True)) == {("native/1", "fp32")}
    titles = [title for title, _ in grids.grids(found)]
    assert len(set(titles)) == 4
    for way in others:
        assert sum(next(iter(way.values())) in title for title in titles) == 1
    assert row(found, "clean", "one", engine="native/1", precision="fp32").robust == "0.00"
    assert sorted("two" in grid.columns for _, grid in grids.grids(found)) == [False] * 3 + [True]


CONFIG = {
    **{"attack": "aa", "attack_sha256": "c" * 64, "norm": "l2", "eps": "1/2", "eps_ladder": ["1/4", "1/2"]},
    **{"n_requested": 10, "seed": 0, "split": "test", "engine": "native/2", "precision": "fp32"},
}


def test_a_contest_is_what_the_configuration_says_in_any_spelling():
    found = Contest.of(CONFIG)
    assert found == Contest.of(CONFIG | {"eps": "0.5", "eps_ladder": ["0.25", "0.50"], "protocol": ""})
    assert (found.columns["eps"], found.columns["eps_ladder"]) == ("0.5", "0.25 0.5")
    assert found.title == "aa l2 0.5 after 0.25 n=10"
    linf = Contest.of(CONFIG | {"norm": "linf", "eps": "1/51", "eps_ladder": ["2/255", "1/51"]})
    assert (linf.columns["eps"], linf.columns["eps_ladder"]) == ("5/255", "2/255 5/255")


@pytest.mark.parametrize("changed", [name for name in CONFIG if name != "norm"] + ["protocol", "subset"])
def test_every_field_of_a_contest_keeps_results_apart(changed):
    other = {"eps": "2", "eps_ladder": ["1/2"], "n_requested": 0, "seed": 1}.get(changed, "other")
    found, apart = Contest.of(CONFIG), Contest.of(CONFIG | {changed: other})
    assert found != apart
    of_the_attack = changed in ("attack", "attack_sha256", "eps_ladder")
    assert (found.without_attack == apart.without_attack) == of_the_attack
    assert (found.columns != apart.columns) == (changed != "subset")  # a suite has one list of images


def test_a_contest_stands_in_columns_of_the_table():
    assert set(contest.COLUMNS) == set(Contest.of(CONFIG).columns) <= set(columns.names(()))
    assert set(contest.TITLE) < set(contest.COLUMNS)


# --- bytes -------------------------------------------------------------------------------------------------


def test_the_csv_has_the_golden_bytes_and_has_them_twice(tmp_path):
    two_models(tmp_path / "results")
    _, files = leaderboard.render(tmp_path / "results", SUITE, tmp_path / "a")
    _, again = leaderboard.render(tmp_path / "results", SUITE, tmp_path / "b")
    assert [path.name for path in files] == ["pair.csv", "pair.md", "pair.html"]
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in again]
    assert files[0].read_bytes() == GOLDEN.read_bytes()


def test_when_and_where_it_ran_changes_no_byte(tmp_path):
    two_models(tmp_path)
    before = leaderboard.csv(rows(tmp_path))
    for path in tmp_path.rglob("*.json"):
        content = json.loads(path.read_text())
        store.write_json(path, content | {"run": {"seconds": 99, "device": "another", "date": "later"}})
    assert leaderboard.csv(rows(tmp_path)) == before


def test_the_table_for_people_has_every_model_and_dataset(tmp_path):
    two_models(tmp_path)
    text = grids.markdown(rows(tmp_path), SUITE).decode()
    assert "## aa · linf 4/255 · n = 10" in text
    lines = [line for line in text.split("\n") if line.startswith("| ")]
    assert lines[0] == "| model | rank | mean | mean:first | mean:unseen | one | two |"
    assert lines[1].startswith("| defended")
    assert " | 1, a | " in lines[1]
    assert " | 2, b | " in lines[2]
    assert "`rank`: the ranks that a model may have" in text
    assert [line.split(" (")[0] for line in lines[1:]] == ["| defended", "| clean"]  # most robust first
    assert "| 90.00 / 0.00 | 80.00 / 10.00 ! |" in lines[2]
    clean = row(rows(tmp_path), "clean", "mean")
    assert f"| {clean.clean} / {clean.robust} [{clean.ci_low}, {clean.ci_high}] ! |" in lines[2]
    flag = row(rows(tmp_path), "clean", "two").flag
    assert f"- {flag} (clean on two): {flags.WORDS[flag]}" in text


def test_models_stand_in_one_order_and_n_is_as_drawn(tmp_path):
    two_models(tmp_path)
    for model, robust in (("clean", {}), ("defended", {0: "apgd-ce"})):  # the other way round in one contest
        for dataset in SUITE.datasets:
            cell(tmp_path, model, dataset, 9, robust, eps_ladder=["2/255", "4/255"], n_requested=50)
    found = dict(grids.grids(rows(tmp_path)))
    assert len(found) == 2
    assert len({tuple(grid.index) for grid in found.values()}) == 1
    assert any("n = 10 (of 50 asked for)" in title for title in found)


def test_two_tables_of_one_radius_are_explained_in_one_sentence(tmp_path):
    two_models(tmp_path)
    assert list(grids.ladder_notes(rows(tmp_path))) == []
    for model in ("clean", "defended"):  # the same radius, after 2/255
        for dataset in SUITE.datasets:
            cell(tmp_path, model, dataset, 9, {0: "apgd-ce"}, eps_ladder=["2/255", "4/255"])
    (note,) = grids.ladder_notes(rows(tmp_path))
    assert note.startswith("aa at linf 4/255 has 2 tables, for the radii (2/255, 4/255) and (4/255): an ")
    lines = grids.markdown(rows(tmp_path), SUITE).decode().split("\n")
    assert [line for line in lines if "2 tables" in line] == [f"{note}."]
    cell(tmp_path, "clean", "one", 9, {}, attack_sha256="a" * 64, eps_ladder=["1/255", "4/255"])
    assert len(list(grids.ladder_notes(rows(tmp_path)))) == 1  # another chain is another reason


def test_facts_are_told_apart_from_failed_checks(tmp_path):
    two_models(tmp_path)
    table = rows(tmp_path)
    table.loc[(table.dataset == "one") & (table.model_id == "clean"), "flag"] = "tied-classes"
    table.loc[(table.dataset == "two") & (table.model_id == "clean"), "flag"] = "random-output;tied-classes"
    found = grids.markdown(table, SUITE).decode()
    _, failed, facts = found.split("\n\n- ")
    assert failed.startswith("random-output (clean on two): ")
    assert failed.endswith("Facts about what was measured:")
    assert facts.startswith("tied-classes (clean on one, clean on two): ")
    (line,) = [line for line in found.split("\n") if line.startswith("| clean")]
    one, two = line.split(" | ")[-2:]
    assert "!" not in one
    assert two.endswith("! |")
    assert set(flags.FACTS) <= set(flags.WORDS)
    assert flags.failed("tied-classes;unheard-of") == ["unheard-of"]


def test_json_has_numbers_as_numbers(tmp_path):
    two_models(tmp_path)
    typed = columns.typed(row(rows(tmp_path), "defended", "one").to_dict())
    assert (typed["clean"], typed["ci_low"], typed["n"], typed["pgd_only"]) == (80.0, 31.27, 10, None)
    assert (typed["robust_apgd-ce"], typed["eps"], typed["flag"]) == (70.0, "4/255", "")
    assert not columns.TEXTS - {*columns.BEFORE_STAGES, *columns.AFTER_STAGES}


# --- numbers -----------------------------------------------------------------------------------------------


def test_a_row_counts_by_hand(tmp_path):
    two_models(tmp_path)
    found = row(rows(tmp_path), "defended", "one")
    assert (found.clean, found["robust_apgd-ce"], found.robust_square, found.robust) == (
        *("80.00", "70.00", "60.00", "60.00"),
    )
    assert (found.ci_low, found.ci_high) == ("31.27", "83.18")  # Wilson, 6 of 10
    assert (found.eps, found.eps_ladder, found.params_m) == ("4/255", "4/255", "0.178")
    assert (found.status, found.metric, found.pgd_only) == ("measured", "top1", "")


def test_means_are_unweighted_and_unseen_ones_follow_the_model(tmp_path):
    two_models(tmp_path)
    found = rows(tmp_path)
    assert row(found, "defended", "mean").robust == "50.00"
    assert row(found, "defended", "mean:first").robust == "60.00"
    assert row(found, "defended", "mean:unseen").robust == "40.00"  # it was trained on dataset one
    assert row(found, "clean", "mean").flag == "zero-gradient"
    assert not ((found.model_id == "clean") & (found.dataset == "mean:unseen")).any()  # all of it is unseen


def test_an_unknown_training_list_has_no_unseen_mean(tmp_path):
    for dataset in SUITE.datasets:
        cell(tmp_path, "stranger", dataset, 9, {}, outcome={"exposure": "unknown"})
    assert "mean:unseen" not in set(rows(tmp_path).dataset)
    with pytest.raises(ValueError, match="unseen"):
        Suite(name="x", title="x", datasets=("one",), eps=("1",), means={"unseen": ("one",)})


def test_no_mean_over_a_hole(tmp_path):
    cell(tmp_path, "clean", "one", 9, {})
    assert set(rows(tmp_path).dataset) == {"one", "mean:first"}


def test_the_interval_of_a_mean_combines_those_of_its_rows(tmp_path):
    two_models(tmp_path)
    found = rows(tmp_path)
    mean, one, two = (row(found, "defended", name) for name in ("mean", "one", "two"))
    assert (one.robust, two.robust) == ("60.00", "40.00")
    limits = mean_interval.mean_interval([(6, 10), (4, 10)])
    assert (mean.ci_low, mean.ci_high) == (f"{100 * limits.low:.2f}", f"{100 * limits.high:.2f}")
    assert (mean.leave_one_out_low, mean.leave_one_out_high) == ("40.00", "60.00")
    assert (one.leave_one_out_low, one.leave_one_out_high) == ("", "")
    assert float(row(found, "clean", "mean:first").ci_high) > 25  # none of ten is not a certainty


def test_what_pgd_alone_broke_is_counted_and_flagged(tmp_path):
    cell(tmp_path, "m", "one", 9, {0: "apgd-ce", 1: "square"})
    cell(tmp_path, "m", "one", 9, {0: "pgd20", 5: "pgd20", 6: "pgd20"}, attack="pgd20")
    found = row(rows(tmp_path), "m", "one", attack="aa")
    assert (found.pgd_only, found.flag) == (2, "pgd-beats-chain")
    assert found.robust == "70.00"  # counted, never merged
    assert row(rows(tmp_path), "m", "one", attack="pgd20").pgd_only == ""


def test_what_pgd_broke_under_a_protocol_says_nothing_about_a_chain_outside_it(tmp_path):
    under = {"protocol": "own/1", "canvas": "model", "canvas_px": 224}
    cell(tmp_path, "m", "one", 9, {0: "apgd-ce", 1: "square"})
    cell(tmp_path, "m", "one", 9, {5: "pgd20", 6: "pgd20"}, attack="pgd20", **under)
    found = row(rows(tmp_path), "m", "one", attack="aa")
    assert (found.pgd_only, found.flag) == ("", "")
    cell(tmp_path, "m", "one", 9, {5: "square"}, **under)
    found = row(rows(tmp_path), "m", "one", attack="aa", protocol="own/1")
    assert found.pgd_only == 1


def test_whether_a_chain_is_plain_pgd_is_a_field_of_its_card_and_not_its_name(tmp_path, monkeypatch):
    monkeypatch.setitem(STAGES, "pgd-mine", ("apgd-ce",))
    cell(tmp_path, "m", "one", 9, {0: "apgd-ce"})
    cell(tmp_path, "m", "one", 9, {5: "apgd-ce"}, attack="pgd-mine")
    assert row(rows(tmp_path), "m", "one", attack="aa").pgd_only == ""  # no card says that it is
    for name in ("aa", "pgd-mine"):
        stage = '[[stage]]\nname = "s"\nattack = "pgd"\n'
        plain = "plain_pgd = true\n" if name == "pgd-mine" else ""
        store.write(
            tmp_path / "cards" / "attacks" / f"{name}.toml",
            f'name = "{name}"\ntitle = "{name}"\n{plain}{stage}'.encode(),
        )
    reader.include([tmp_path / "cards"])
    try:
        assert row(rows(tmp_path), "m", "one", attack="aa").pgd_only == 1
    finally:
        reader.include([])


def test_a_chain_that_covers_pgd_is_not_flagged(tmp_path):
    cell(tmp_path, "m", "one", 9, {0: "apgd-ce", 1: "square"})
    cell(tmp_path, "m", "one", 9, {1: "pgd20"}, attack="pgd20")
    found = row(rows(tmp_path), "m", "one", attack="aa")
    assert (found.pgd_only, found.flag) == (0, "")


def test_datasets_whose_makers_report_the_mean_over_classes_have_both_numbers(tmp_path):
    """Ten images: labels 0 for six, 1 for four. Right when clean: all 0s, one 1; robust: four 0s, no 1."""
    flowers = Suite(name="flowers", title="Flowers", datasets=("flowers102", "food101"), eps=("4/255",), n=10)
    labels = [0] * 6 + [1] * 4
    broken = {4: "apgd-ce", 5: "square", 6: "square"}
    for dataset in flowers.datasets:
        cell(tmp_path, "m", dataset, 7, broken, labels=labels)
    found = rows(tmp_path, flowers)
    first, second, mean = (row(found, "m", name) for name in (*flowers.datasets, "mean"))
    assert (first.metric, first.clean, first.robust) == ("mean-per-class", "70.00", "40.00")
    assert first.clean_per_class == f"{100 * (1 + 1 / 4) / 2:.2f}"
    assert first.robust_per_class == f"{100 * (4 / 6 + 0) / 2:.2f}"
    for other in (second, mean):
        assert (other.metric, other.clean_per_class, other.robust_per_class) == ("top1", "", "")
    text = grids.markdown(found, flowers).decode()
    assert "The makers of flowers102 report the mean over classes" in text


# --- what must not share a table ---------------------------------------------------------------------------


def test_other_images_of_one_dataset_are_refused_by_name(tmp_path):
    two_models(tmp_path)
    other = cell(tmp_path, "zebra", "two", 9, {}, subset_sha256=sha("other"))
    with pytest.raises(DataError, match="subset_sha256") as caught:
        rows(tmp_path)
    assert str(other) in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("changes", [{"canvas": "model", "canvas_px": 64}, {"canvas_px": 64}])
def test_other_canvases_of_one_dataset_are_refused_by_name(tmp_path, changes):
    two_models(tmp_path)
    cell(tmp_path, "zebra", "two", 9, {}, **changes)
    with pytest.raises(DataError, match="canvas"):
        rows(tmp_path)


def test_models_may_have_sizes_of_their_own_on_the_model_canvas(tmp_path):
    for model, side in (("a", 32), ("b", 64)):
        cell(tmp_path, model, "one", 9, {}, canvas="model", canvas_px=side)
    assert {*rows(tmp_path).model_id} == {"a", "b"}


def test_two_results_of_one_row_are_refused_with_what_differs(tmp_path):
    two_models(tmp_path)
    cell(tmp_path, "clean", "one", 3, {}, dataset_version=2)
    with pytest.raises(DataError, match=r"second result of clean on one .* in dataset_version") as caught:
        rows(tmp_path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("what", ["seed", "split"])
def test_cells_of_another_draw_do_not_belong_to_the_suite(tmp_path, what):
    two_models(tmp_path)
    before = rows(tmp_path)
    cell(tmp_path, "other", "one", 9, {}, **{what: {"seed": 7, "split": "train"}[what]})
    pd.testing.assert_frame_equal(rows(tmp_path), before)


def test_another_ladder_is_another_row_and_another_table(tmp_path):
    two_models(tmp_path)
    cell(tmp_path, "clean", "one", 9, {0: "apgd-ce"}, eps_ladder=["2/255", "4/255"])
    found = rows(tmp_path)
    assert row(found, "clean", "one", eps_ladder="4/255").robust == "0.00"
    assert row(found, "clean", "one", eps_ladder="2/255 4/255").robust == "80.00"
    titles = [title for title, _ in grids.grids(found)]
    assert len(titles) == len(set(titles)) == 2
    assert any(title.endswith("radii 2/255 4/255") for title in titles)


@pytest.mark.parametrize("block", ["config", "outcome", "model", "stages"])
def test_a_changed_file_is_refused(tmp_path, block):
    path = cell(tmp_path, "m", "one", 9, {})
    content = json.loads(path.read_text())
    changes = {
        **{"config": {"eps": "1/255"}, "outcome": {"clean_correct": 10}, "model": {"defense": "mmt-ard"}},
    }
    content[block] = [] if block == "stages" else content[block] | changes[block]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="does not match its fingerprint") as caught:
        result_file.read(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{}", '{"schema": "vlmrob-cell/1"}', "not json"])
def test_a_file_that_is_no_cell_is_refused(tmp_path, content):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "x.json").write_text(content)
    with pytest.raises(InputError, match=r"x\.json"):
        result_file.read(tmp_path)


@pytest.mark.parametrize("damage", ["changed", "gone", "torn"])
def test_other_verdicts_than_were_counted_are_refused(tmp_path, damage):
    cell(tmp_path, "m", "one", 9, {}, attack="pgd20")
    path = cell(tmp_path, "m", "one", 9, {}).with_suffix(".parquet")
    if damage == "changed":
        path.write_bytes(table("one", 9, {0: "square"}).to_parquet(index=False))
    elif damage == "torn":
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.unlink()
    with pytest.raises(DataError, match=r"\.parquet"):
        rows(tmp_path)


def test_nothing_to_render_says_what_to_type(tmp_path):
    with pytest.raises(DataError, match="vlmrob eval --suite pair"):
        leaderboard.render(tmp_path, SUITE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- compare -----------------------------------------------------------------------------------------------


def cells(results):
    return result_file.of_suite(result_file.read(results), SUITE)


def test_the_paired_test_by_hand(tmp_path):
    two_models(tmp_path)
    lines = compare.compare(cells(tmp_path), "defended", "clean")
    assert [line.dataset for line in lines] == ["one", "two", compare.POOLED, compare.MEAN]
    assert {line.attack for line in lines} == {"aa linf 4/255 n=10"}
    one = lines[0]
    # one: defended stands on images 2 to 7, clean on none: 6 against 0
    assert (one.robust.only_a, one.robust.only_b, one.robust.n) == (6, 0, 10)
    assert one.robust.p == pytest.approx(2 / 2**6)
    assert (one.clean.only_a, one.clean.only_b) == (0, 1)
    # two: defended on 3 to 6, clean on 7: 4 against 1; together 10 against 1
    assert (lines[1].robust.only_a, lines[1].robust.only_b) == (4, 1)
    assert (lines[2].robust.only_a, lines[2].robust.only_b, lines[2].robust.n) == (10, 1, 20)
    assert lines[2].robust.p == pytest.approx(2 * (1 + 11) / 2**11)
    # mean: (6 + 3) / 20; less one image of ten, over the root of 6 + 5 + 1 images
    assert lines[3].robust.difference == pytest.approx(0.45)
    assert lines[3].robust.p == pytest.approx(math.erfc((9 - 1) / math.sqrt(12) / math.sqrt(2)))
    assert "+45.00 points robust" in compare.conclusion(lines, "defended", "clean")[0]
    mirrored = compare.compare(cells(tmp_path), "clean", "defended")
    assert mirrored[2].robust.p == lines[2].robust.p
    assert mirrored[2].robust.difference == -lines[2].robust.difference


def test_ladders_are_not_pooled(tmp_path):
    two_models(tmp_path)
    for model in ("clean", "defended"):
        cell(tmp_path, model, "one", 9, {0: "apgd-ce"}, eps_ladder=["2/255", "4/255"])
    lines = compare.compare(cells(tmp_path), "defended", "clean")
    pooled = [line for line in lines if line.dataset == compare.POOLED]
    assert [line.robust.n for line in pooled] == [20]
    assert "aa linf 4/255 after 2/255 n=10" in {line.attack for line in lines}


def test_models_may_be_named_by_fingerprint(tmp_path):
    two_models(tmp_path)
    by_name = compare.compare(cells(tmp_path), "defended", "clean")
    assert compare.compare(cells(tmp_path), sha("defended")[:9], sha("clean")[:9]) == by_name


def test_an_unknown_model_is_refused_with_the_known_ones(tmp_path):
    two_models(tmp_path)
    with pytest.raises(InputError, match=r"did you mean 'defended'.*known: clean, defended"):
        compare.compare(cells(tmp_path), "defnded", "clean")


def test_one_name_of_two_models_is_refused_with_their_fingerprints(tmp_path):
    two_models(tmp_path)
    cell(tmp_path / "more", "clean", "one", 9, {}, model_sha256=sha("retrained"))
    found = [*cells(tmp_path), *cells(tmp_path / "more")]
    with pytest.raises(InputError, match=sha("retrained")[:8]):
        compare.compare(found, "defended", "clean")


def test_contests_with_one_title_are_told_apart(tmp_path):
    """In bf16 the two models change places, and there is a sentence for each precision."""
    for precision, broken in (("fp32", ({}, {0: "apgd-ce"})), ("bf16-find", ({0: "apgd-ce"}, {}))):
        for model, found in zip("ab", broken, strict=True):
            cell(tmp_path, model, "one", 9, found, precision=precision)
    lines = compare.compare(cells(tmp_path), "a", "b")
    assert len({line.attack for line in lines}) == 2
    assert len(compare.conclusion(lines, "a", "b")) == 2
    assert {precision for line in lines for precision in ("fp32", "bf16-find") if precision in line.attack}


def test_models_without_a_contest_in_common_are_refused(tmp_path):
    cell(tmp_path, "a", "one", 9, {})
    cell(tmp_path, "b", "two", 9, {})
    with pytest.raises(InputError, match="in common"):
        compare.compare(cells(tmp_path), "a", "b")
