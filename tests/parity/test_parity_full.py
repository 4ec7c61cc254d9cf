"""The run of the full grid, small: it goes on where it was killed, and its page says what is not kept."""

import dataclasses

import full
import page
import pytest

from robustbench_vlm import store

pytestmark = pytest.mark.parity


@pytest.fixture
def small(monkeypatch):
    """One model, one norm and one radius, few images and steps."""
    for name, value in {"N": 8, "ROWS": 8, "STEPS": 3, "TARGETS": 2, "QUERIES": 6}.items():
        monkeypatch.setattr(full, name, value)
    attacks = [full.Unit("plain", "linf", 0.3, attack) for attack in (*full.ATTACKS, "chain")]
    chosen = [dataclasses.replace(unit, seed=0 if unit.attack == "chain" else -1) for unit in attacks]
    monkeypatch.setattr(full, "units", lambda: iter(chosen))
    return chosen


def test_a_killed_run_goes_on_and_the_page_tells_all(small, tmp_path):
    path = tmp_path / "parity.jsonl"
    full.make(path)
    whole = list(store.records(path))
    assert [record["unit"] for record in whole] == [unit.name for unit in small]
    assert page.broken(whole) == []
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    assert "Not compared yet" in page.rendered(list(store.records(path)), [unit.name for unit in small])
    full.make(path)
    assert list(store.records(path)) == whole
    text = page.rendered(whole, [unit.name for unit in small])
    assert "Every bound is kept" in text
    assert "Not compared yet" not in text
    assert text.count("| plain | Linf |") == len(small)


def test_what_is_not_kept_is_told(small, tmp_path):
    full.make(tmp_path / "parity.jsonl")
    records = list(store.records(tmp_path / "parity.jsonl"))
    ce, square, chain = records[0], records[4], records[5]
    flip = {"key": "plain/test/3", "broken by": "ours", "ours": -0.1, "theirs": 0.2}
    ce["equal"] -= 1
    square["other queries"] = ["plain/test/2"]
    chain["ours"] = chain["theirs"] + 2
    chain["flips"] = [{**flip, "stage": "apgd-ce", "boundary": None}]
    told = page.broken(records)
    assert [line.split(":")[0] for line in told] == [one["unit"] for one in (ce, square, chain)]
    text = page.rendered(records, [])
    assert text.count("NOT KEPT") == 3
    assert "not explained" in text
