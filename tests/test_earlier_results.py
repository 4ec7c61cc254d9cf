"""Results of earlier versions are found, read and shown beside new ones; none of them is computed again.

`golden/earlier` holds three results as commit 04a5c05 wrote them: radii are `4` and `0.5` in file names and
`1/2` in the configuration, and nothing else in a file says what they are.
"""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import toys

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.results import compare, leaderboard, result_file
from robustbench_vlm.threat import eps_text

EARLIER = Path(__file__).parent / "golden" / "earlier"
SPELLED = {  # name that was given, radius as it is spelled now
    "aa2-l2-0.5-n20-1714cc246f": ("l2", "0.5"),
    "aa2-linf-4-n20-4be1129f32": ("linf", "4/255"),
    "pgd20-linf-4-n20-322b71db62": ("linf", "4/255"),
}


def test_their_radii_are_read_in_the_spelling_of_today():
    found = {result.path.stem: result for result in result_file.read(EARLIER)}
    assert found.keys() == SPELLED.keys()
    for name, (norm, eps) in SPELLED.items():
        columns = found[name].contest.columns
        assert (columns["norm"], columns["eps"]) == (norm, eps)
        assert str(found[name].threat) == f"{norm} {eps}"
    assert found["aa2-l2-0.5-n20-1714cc246f"].config["eps"] == "1/2"


def test_they_are_found_by_the_hash_at_the_end_of_their_names(tmp_path):
    for result in result_file.read(EARLIER):
        n = result.outcome["n"]
        assert result_file.path_of(EARLIER, result.config, n) == result.path
        new = result_file.path_of(tmp_path, result.config, n)  # no such file yet: the name of today
        assert new.stem.rsplit("-", 1)[1] == result.path.stem.rsplit("-", 1)[1]
    names = [result_file.path_of(tmp_path, r.config, 20).stem for r in result_file.read(EARLIER)]
    assert names == [
        "aa2-l2-0.5-n20-1714cc246f",
        "aa2-linf-4_255-n20-4be1129f32",
        "pgd20-linf-4_255-n20-322b71db62",
    ]


def test_a_leaderboard_shows_earlier_and_new_results_in_one_table(tmp_path):
    shutil.copytree(EARLIER, tmp_path / "results")
    for result in result_file.read(EARLIER):  # the same of another model, written today
        config = dict(result.config) | {"model": "other", "model_sha256": "f" * 64}
        model = dict(result.content.model) | {"id": "other"}
        content = result_file.Content(config, result.outcome, model, result.content.stages)
        path = result_file.path_of(tmp_path / "results", config, 20)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(result.path.with_suffix(".parquet"), path.with_suffix(".parquet"))
        result_file.write(path, content, {})
    suite = reader.read("suites", "tiny", Suite)
    rows, _ = leaderboard.render(tmp_path / "results", suite, tmp_path / "out")
    assert len(rows) == 6
    shared = [name for name in rows if not name.startswith(("model_id", "checkpoint", "cell_sha256"))]
    earlier, new = (rows[rows.model_id == name].reset_index(drop=True) for name in ("tiny", "other"))
    assert earlier[shared].equals(new[shared])
    assert set(zip(rows.norm, rows.eps, strict=True)) == set(SPELLED.values())
    lines = compare.compare(result_file.read(tmp_path / "results"), "tiny", "other")
    assert [(line.robust.n, line.robust.difference) for line in lines] == [(20, 0.0)] * 3


@pytest.mark.parametrize(("norm", "radii"), [("linf", ("2/255", "5/255")), ("l2", ("1/4", "1/2"))])
def test_an_evaluation_takes_what_an_earlier_version_finished(tmp_path, norm, radii):
    card = toys.dataset_card()
    what = toys.subject(card, toys.write(card, tmp_path / "data", n=6))
    order = toys.request(tmp_path / "results", toys.chain("one", "ce"), eps=radii, norm=norm)
    first = toys.run(what, order)
    for (path, content), eps in zip(first, radii, strict=True):
        text = eps_text(norm, Fraction(eps))
        assert f"-{norm}-{text.replace('/', '_')}-n6-" in path.name
        assert (content["threat"]["eps"], content["config"]["eps"]) == (text, str(Fraction(eps)))
        del content["threat"]
        path.write_text(json.dumps(content))
        for file in (path, path.with_suffix(".parquet")):
            file.rename(file.with_name(file.name.replace("_255-", "-")))  # as it was spelled
    files = sorted(path for path in (tmp_path / "results").rglob("*") if path.is_file())
    before = [path.read_bytes() for path in files]
    for ledger in (tmp_path / "results" / "ledger").rglob("*.jsonl"):
        ledger.unlink()  # so that whatever would be computed again leaves a trace
    seen = []
    again = toys.run(what, order, seen)
    assert seen == []
    assert [content for _, content in again] == [content for _, content in first]
    left = sorted(path for path in (tmp_path / "results").rglob("*") if path.is_file())
    assert left == [path for path in files if path.suffix != ".jsonl"]
    assert [path.read_bytes() for path in left] == [
        content for path, content in zip(files, before, strict=True) if path.suffix != ".jsonl"
    ]
