"""The page of a suite: what it holds, how large it is, and that its script computes as the package does.

The arithmetic of the script runs in node; tests/test_page_browser.py looks at the page in a browser.
"""

import base64
import json
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from scipy.special import ndtri
from scipy.stats import beta, binomtest
from test_leaderboard import SUITE, cell, two_models

from robustbench_vlm import store
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.errors import DataError
from robustbench_vlm.results import leaderboard, mean_interval, ranks, result_file, stats, verdicts
from robustbench_vlm.results.page import command, pack, render
from robustbench_vlm.results.result_file import Content, Result

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(
    NODE is None, reason="node is not installed: the script's arithmetic needs it"
)
PURE = ("numbers.js", "ranking.js")


def compute(expression, given=None):
    """The value of an expression of the script's pure functions; `given` is what they are called with."""
    code = "\n".join(render._file(name) for name in PURE)
    code += "\nconst given = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
    code += f"\nconsole.log(JSON.stringify({expression}));"
    done = subprocess.run(
        [NODE, "-e", code], input=json.dumps(given), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def page(folder, suite=SUITE, **options):
    found = result_file.of_suite(result_file.read(folder), suite)
    return render.html(found, suite, leaderboard.table(found, suite), **options)


def content(html):
    text = html.decode().split('<script type="application/json" id="data">')[1].split("</script>")[0]
    return json.loads(text)


def unpacked(text, n):
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), bitorder="little")
    return bits[:n].astype(bool)


# --- arithmetic --------------------------------------------------------------------------------------------


@needs_node
def test_a_thousand_p_values_are_those_of_scipy():
    draw = np.random.default_rng(14)
    sizes = [1, 2, 3, 10, 100, 1000, 17_000]
    pairs = [(int(k), int(m - k)) for m in draw.choice(sizes, 500) for k in [draw.binomial(m, 0.5)]]
    pairs += [(int(draw.integers(m + 1)), int(m)) for m in draw.integers(1, 3000, 500)]
    found = compute("given.map(([a, b]) => mcnemar(a, b))", pairs)
    for (a, b), p in zip(pairs, found, strict=True):
        expected = binomtest(a, a + b).pvalue
        assert p == pytest.approx(expected, rel=1e-9, abs=1e-12), (a, b)
        assert abs(p - expected) <= 1e-12, (a, b)
    assert compute("[mcnemar(0, 0), mcnemar(5, 5), mcnemar(3, 4)]") == [1, 1, 1]


@needs_node
def test_the_stratified_test_is_that_of_the_package():
    draw = np.random.default_rng(3)
    n = np.array([20, 1000, 100])
    only = [[(int(a), int(b)) for a, b in draw.integers(0, n[:, None] // 2, (3, 2))] for _ in range(200)]
    only += [[(0, 0), (0, 0), (0, 0)], [(0, 0), (1, 0), (0, 0)], [(10, 0), (400, 2), (50, 0)]]
    sets = [[[a, b, int(size)] for (a, b), size in zip(pair, n, strict=True)] for pair in only]
    counts = np.array(only)
    expected = stats.stratified_p(counts[..., 0], counts[..., 1], n)
    assert compute("given.map(pairedTest)", sets) == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-12)


@needs_node
def test_intervals_are_those_of_the_package():
    draw = np.random.default_rng(5)
    counts = [[[int(draw.integers(0, n + 1)), int(n)] for n in draw.choice([10, 100, 1000], k)]
              for k in draw.integers(1, 18, 60)]  # fmt: skip
    counts += [[[0, 10], [0, 100]], [[10, 10], [100, 100]], [[0, 10], [100, 100]], [[0, 7]], [[7, 7]]]
    for confidence in (0.95, 0.995):
        level = (1 + confidence) / 2
        given = {"counts": counts, "contest": {"level": level, "z": float(ndtri(level))}}
        found = compute("given.counts.map((one) => meanOf(one, given.contest))", given)
        for one, value in zip(counts, found, strict=True):
            expected = mean_interval.mean_interval(one, confidence)
            assert value["mean"] == pytest.approx(sum(h / n for h, n in one) / len(one), abs=1e-15)
            assert value["low"] == pytest.approx(expected.low, abs=1e-9), one
            assert value["high"] == pytest.approx(expected.high, abs=1e-9), one


@needs_node
def test_the_beta_distribution_is_that_of_scipy():
    draw = np.random.default_rng(8)
    given = [[float(x), float(a), float(b)] for a, b in draw.uniform(0.1, 17_000, (200, 2))
             for x in [beta.rvs(a, b, random_state=draw)]]  # fmt: skip
    expected = [beta.cdf(*one) for one in given]
    assert compute("given.map(([x, a, b]) => beta(x, a, b))", given) == pytest.approx(expected, abs=1e-10)


@needs_node
@pytest.mark.parametrize("datasets", [1, 4])
def test_rank_sets_and_tie_groups_are_those_of_the_package(datasets):
    draw = np.random.default_rng(datasets)
    bits = [
        draw.random((30, n)) < np.linspace(0.2, 0.8, 30)[:, None] for n in [200, 37, 500, 1000][:datasets]
    ]
    packed = [[pack.bits(row) for row in part] for part in bits]
    means = np.mean([part.mean(axis=1) for part in bits], axis=0).tolist()
    given = {"packed": packed, "n": [part.shape[1] for part in bits], "means": means}
    run = "standings(given.means, adjustedPairs(given.packed.map((s) => s.map(words)), given.n, 30))"
    expected = [{"low": s.low, "high": s.high, "group": s.group} for s in ranks.standings(bits)]
    assert compute(run, given) == expected
    assert len({s["group"] for s in expected}) > 3  # there is something to be told apart


@needs_node
def test_the_suite_of_fifty_models_is_ranked_in_less_than_200_ms():
    draw = np.random.default_rng(0)
    strength = np.linspace(0.3, 0.45, 50)[:, None]
    packed = [[pack.bits(row) for row in draw.random((50, 1000)) < strength] for _ in range(17)]
    hits = [[int(unpacked(text, 1000).sum()) for text in part] for part in packed]
    run = """(() => {
      const contest = { level: 0.975, z: 1.959963984540054 }, n = given.packed.map(() => 1000);
      const bits = given.packed.map((part) => part.map(words)), times = [];
      for (let i = 0; i < 3; i++) {
        known.clear();
        const began = performance.now();
        const counts = given.packed[0].map((_, row) => given.hits.map((h) => [h[row], 1000]));
        const means = counts.map((one) => meanOf(one, contest).mean);
        standings(means, adjustedPairs(bits, n, 50));
        times.push(performance.now() - began);
      }
      return Math.min(...times);
    })()"""
    assert compute(run, {"packed": packed, "hits": hits}) < 200


# --- content -----------------------------------------------------------------------------------------------


def test_the_verdicts_in_the_page_are_those_of_the_results(tmp_path):
    two_models(tmp_path)
    held = content(page(tmp_path))
    contest = held["contests"][0]
    assert (contest["n"], contest["title"]) == ([10, 10], "aa linf 4/255 n=10")
    for row in contest["rows"]:
        name = held["models"][row["model"]]["id"]
        for i, dataset in enumerate(held["sets"]):
            (result,) = [r for r in result_file.read(tmp_path) if r.model[0] == name and r.dataset == dataset]
            table = result.verdicts().sort_values("key")
            clean, robust = (unpacked(held["bits"][number], 10) for number in row["bits"][i])
            assert clean.tolist() == table.clean_correct.tolist()
            assert robust.tolist() == verdicts.standing(table).tolist()
            common, rest = held["images"][contest["images"][i]]
            assert [common + end for end in rest.split("\n")] == table.key.tolist()
            assert row["cells"][i][0] == clean.sum()
            assert row["cells"][i][0] - sum(row["cells"][i][1:]) == robust.sum()
            assert row["sha256"][i] == result.content.sha256[:16]
    clean = next(row for row in contest["rows"] if held["models"][row["model"]]["id"] == "clean")
    assert clean["cells"] == [[9, 0, 9, 0], [8, 0, 7, 0]]
    assert [held["flags"][number][0] for number in clean["flags"]["1"]] == ["zero-gradient"]
    assert clean["iterations"] == [[[0, 0, 9], []], [[0, 0, 7], []]]  # iteration 2 is in the bin 2 to 3
    assert clean["exposure"] == "uu"
    assert clean["evidence"] == ["verdicts"]


def test_an_image_broken_at_a_smaller_radius_is_not_counted_to_a_stage(tmp_path):
    path = cell(tmp_path, "m", "one", 9, {0: "apgd-ce"}, eps_ladder=["2/255", "4/255"])
    table = pd.read_parquet(path.with_suffix(".parquet"))
    table.loc[1, ["broken_by", "broken_at_eps", "iteration"]] = ["square", "2/255", 7]
    store.write(path.with_suffix(".parquet"), table.to_parquet(index=False))
    whole = json.loads(path.read_text())
    whole["outcome"] |= {"robust": verdicts.robust_after(table, ("apgd-ce", "square"), "4/255")}
    whole["outcome"]["verdicts_sha256"] = verdicts.sha256(table)
    blocks = {name: whole[name] for name in result_file.HASHED}
    store.write_json(path, whole | {"sha256": store.fingerprint(blocks)})
    row = content(page(tmp_path))["contests"][0]["rows"][0]
    assert row["cells"] == [[9, 1, 1, 0], 0]
    assert row["iterations"] == [[[0, 0, 1], [0, 0, 0, 1]], 0]


def test_the_same_results_give_the_same_bytes_wherever_they_were_measured(tmp_path):
    two_models(tmp_path)
    before = page(tmp_path)
    for path in tmp_path.rglob("*.json"):
        store.write_json(path, json.loads(path.read_text()) | {"run": {"seconds": 99, "device": "another"}})
    assert page(tmp_path) == before


def test_the_command_writes_the_page_beside_the_tables(tmp_path):
    two_models(tmp_path / "results")
    _, files = leaderboard.render(tmp_path / "results", SUITE, tmp_path / "out")
    assert [path.name for path in files] == ["pair.csv", "pair.md", "pair.html"]
    assert files[2].read_bytes() == page(tmp_path / "results")
    leaderboard.render(tmp_path / "results", SUITE, tmp_path / "out", with_bits=False)
    assert content(files[2].read_bytes())["bits"] == []


def test_a_page_that_grows_too_large_leaves_the_verdicts_out(tmp_path, monkeypatch):
    two_models(tmp_path)
    monkeypatch.setattr(render, "MOST_BYTES", 1000)
    made = page(tmp_path)
    assert made == page(tmp_path, with_bits=False)
    assert b"no verdicts of single images" in made


def test_checks_stand_with_the_dataset_where_they_were_worst(tmp_path):
    two_models(tmp_path)
    for path in tmp_path.rglob("*.json"):
        level = "fail" if "two" in path.parts else "pass"
        check = {"name": "saturated", "level": level, "value": 0.125, "bound": 0.01, "sentence": "it is"}
        unknown = check | {"name": "no-gradient", "level": "pass", "value": None}
        whole = json.loads(path.read_text()) | {"checks": {"checks": [check, unknown], "forwards": 3}}
        store.write_json(path, whole)
    for row in content(page(tmp_path))["contests"][0]["rows"]:
        assert row["checks"] == [["saturated", "fail", "0.125", "0.01", "it is", "two"],
                                 ["no-gradient", "pass", "", "0.01", "it is", "one"]]  # fmt: skip
    store.write_json(path, whole | {"checks": {"checks": [{"name": 3}]}})
    with pytest.raises(
        DataError, match=f"{path.name}: checks of another kind; expected those of an evaluation"
    ):
        page(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "vlmrob eval --suite pair --model MODEL --attack aa --norm linf --eps 4/255 --n 10"),
        ({"protocol": "fare/1"}, "vlmrob eval --suite pair --model MODEL --protocol fare"),
        ({"engine": "native-reference/1", "precision": "bf16-find"},
         "vlmrob eval --suite pair --model MODEL --attack aa --norm linf --eps 4/255 --n 10 --mode reference "
         "--precision bf16"),
        ({"engine": "torchattacks/x-1/1", "norm": "l2", "eps": "1/2", "eps_ladder": ["1/4", "1/2"]},
         "vlmrob eval --suite pair --model MODEL --attack aa --norm l2 --eps 0.25,0.5 --n 10 "
         "--engine torchattacks"),
        ({"precision": "fp32+tf32+compiled"},
         "vlmrob eval --suite pair --model MODEL --attack aa --norm linf --eps 4/255 --n 10 --tf32 "
         "--compile"),
        ({"stop_rule": "until 2.5 points or 500 images; 9 looks of 16"},
         "vlmrob eval --suite pair --model MODEL --attack aa --norm linf --eps 4/255 --until 2.5 --n 500"),
        ({"stop_rule": "until 2 points or all images; 9 looks of 16"},
         "vlmrob eval --suite pair --model MODEL --attack aa --norm linf --eps 4/255 --until 2 --n 0"),
    ],
)  # fmt: skip
def test_the_command_to_repeat_a_row(changes, words):
    config = {
        **{
            "attack": "aa",
            "attack_sha256": "c" * 64,
            "norm": "linf",
            "eps": "4/255",
            "eps_ladder": ["4/255"],
        },
        **{"n_requested": 10, "seed": 0, "split": "test", "engine": "native/2", "precision": "fp32"},
    }
    before, after = command.parts(result_file.Contest.of(config | changes), "pair")
    assert f"{before} MODEL {after}" == words


def test_names_are_packed_without_what_they_share():
    assert pack.names(["a/b/s01", "a/b/s02"]) == ["a/b/s0", "1\n2"]
    assert pack.names(["x\ny", "x\u202ez"]) == ["x\\", "ny\nu202ez"]
    assert pack.names(["one"]) == ["one", ""]
    bits = np.arange(1001) % 3 == 0
    assert (unpacked(pack.bits(bits), 1001) == bits).all()
    assert [pack.octave(i) for i in (0, 1, 2, 3, 4, 100)] == [0, 1, 2, 2, 3, 7]


# --- the file ----------------------------------------------------------------------------------------------


def test_nothing_in_the_page_asks_for_another_file(tmp_path):
    two_models(tmp_path)
    text = page(tmp_path).decode()
    assert len(render.script().encode()) < 40_000
    assert text.count("<script") == 2
    assert text.count("<style>") == 1
    for sign in ("http://", "https://", "url(", "@import", "<iframe", "<object", "<embed"):
        assert sign not in text.replace('"http://www.w3.org/2000/svg"', ""), sign
    assert "default-src 'none'" in text


def test_no_line_of_the_script_has_a_template_inside_a_template():
    for name in render.SCRIPTS:  # blanks are taken out of lines without quotes only
        for line in render._file(name).split("\n"):
            assert line.count("`") % 2 == 0, f"{name}: {line}"


HOSTILE = '</script><img src=x onerror=alert(1)>|=1+1\n\x1b[31m\u202e"&{{ 7*7 }}'


def test_hostile_names_end_no_element_and_reach_the_page_as_text(tmp_path):
    cell(tmp_path, HOSTILE, "one", 9, {0: "apgd-ce"}, model_facts={"arch": HOSTILE})
    made = page(tmp_path)
    assert made.count(b"<img") == 0
    assert made.count(b"</script>") == 2
    assert "\u202e".encode() not in made
    assert b"\x1b" not in made
    assert b"{{ 7*7 }}" in made  # it is no template
    shown = content(made)["models"][0]["id"]
    assert shown == HOSTILE.replace("\n", "\\n").replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")


class InMemory(Result):
    """A result whose verdicts are made when they are asked for."""

    def verdicts(self):
        return self.table


def synthetic(folder, models, datasets, radii, n):
    """Results of a large suite: four stages, names of images as in shards, twelve checks a result."""
    draw = np.random.default_rng(1)
    check = {
        "level": "pass",
        "value": 0.0123,
        "bound": 0.0100,
        "sentence": "logits differ by at most 0.0123 %",
    }
    shared = folder / "checks.json"
    store.write_json(shared, {"checks": {"checks": [{"name": f"check-{i}", **check} for i in range(12)]}})
    stages = ["apgd-ce", "apgd-t", "fab-t", "square"]
    suite = Suite(name="large", title="Large", datasets=tuple(f"dataset-{i}" for i in range(datasets)),
                  eps=tuple(radii), n=n)  # fmt: skip
    keys = {d: np.sort(draw.choice(50_000, n, replace=False)) for d in suite.datasets}
    found = []
    for model in range(models):
        for dataset in suite.datasets:
            clean, bound = draw.random(n) < 0.6 + 0.3 * draw.random(), draw.random(n)
            for k, eps in enumerate(radii):
                limits = [0.3 / (i + 1) for i in range(len(radii))]
                alive = clean & (bound < limits[k])
                before = np.array(radii)[np.argmax([bound >= limit for limit in limits], axis=0)]
                broken = clean & ~alive
                table = pd.DataFrame({
                    "key": [f"{dataset}/test/s{i:07d}" for i in keys[dataset]],
                    "clean_correct": clean, "error": "",
                    "broken_by": np.where(broken, draw.choice(stages, n, p=[0.8, 0.18, 0.01, 0.01]), ""),
                    "broken_at_eps": np.where(broken, before, ""),
                    "iteration": np.where(broken, draw.geometric(0.1, n), -1),
                    "label": 0, "image_sha256": "",
                })  # fmt: skip
                config = {
                    **{"model": f"org/vit-model-{model}", "model_sha256": store.fingerprint(model)},
                    **{"dataset": dataset, "split": "test", "n_requested": n, "seed": 0, "canvas": "model"},
                    **{"canvas_px": 224, "precision": "fp32", "engine": "native/2", "norm": "linf"},
                    **{"eps": eps, "eps_ladder": radii[: k + 1], "attack": "autoattack", "attack_version": 1},
                    **{"attack_sha256": store.fingerprint("aa"), "subset_sha256": store.fingerprint(dataset)},
                    **{"images_sha256": "", "names_sha256": "", "templates_sha256": ""},
                }
                outcome = {
                    **{"n": n, "n_classes": 10, "clean_correct": int(clean.sum()), "errors": 0, "flags": []},
                    **{"robust": verdicts.robust_after(table, stages, eps), "majority": 0.1},
                    **{"exposure": "unseen", "verdicts_sha256": store.fingerprint([model, dataset, eps])},
                }
                facts = {"id": config["model"], "arch": "ViT-B-32", "defense": "mmt-ard", "parameters": 878,
                         "train_norm": "linf", "train_eps": "4/255", "trained_on": ["imagenet"]}  # fmt: skip
                numbers = [{"name": stage, "attack": "apgd", "steps": 100} for stage in stages]
                result = InMemory(shared, Content(config, outcome, facts, numbers))
                object.__setattr__(result, "table", table)
                found.append(result)
    return found, suite


@pytest.mark.slow
def test_fifty_models_on_seventeen_datasets_at_three_radii_fit(tmp_path):
    found, suite = synthetic(tmp_path, 50, 17, ["1/255", "2/255", "4/255"], 1000)
    table = leaderboard.table(found, suite)
    whole = render.html(found, suite, table)
    small = render.html(found, suite, table, with_bits=False)
    assert len(whole) < 1_500_000
    assert len(small) < 150_000
