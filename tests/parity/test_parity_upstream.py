"""CLIP_benchmark and ours on two small cards; and what the page must tell."""

import copy
import os
import subprocess
import sys

import pytest
import suites_page
import torch
import towers
import upstream

from robustbench_vlm import store
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard

RECORD = {
    "unit": "tiny/dtd",
    "tower": "tiny",
    "arch": "vlmrob-tiny",
    "card": "dtd",
    "images": 3,
    "input": 0.0,
    "labels equal": True,
    "lists": {"names": None, "templates": True},
    "packs": [
        {"pack": "clip", "classes": 3, "templates": 8, "sentences apart": 3, "texts equal": True, "bank": 0.0}
    ],
    "from": {"upstream": "abc", "files": "def", "versions": {"torch": "2"}, "machine": "one thread"},
}


@pytest.mark.parity
def test_clip_benchmark_says_the_same_of_every_image(tmp_path):
    records = tmp_path / "small.jsonl"
    asked = [sys.executable, upstream.__file__, "--work", str(tmp_path / "work")]
    asked += ["--records", str(records), "--towers", "tiny", "--cards", "cifar10", "pcam", "--images", "24"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(asked, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    native, model = store.records(records)
    assert (native["card"], model["card"]) == ("cifar10", "pcam")
    for one in (native, model):
        assert one["labels equal"]
        assert one["input"] == 0
        assert [pack["equal"] for pack in one["packs"]] == [24, 24]
        assert all(pack["distinct"] > 1 and pack["logits"] < 1e-3 for pack in one["packs"])
    assert native["canvas"] == "native, 32 px"
    assert "Not compared yet with tiny: " in records.with_suffix(".md").read_text()


def test_logits_are_compared_image_by_image():
    theirs = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.5], [5.0, 0.0, 0.0]])
    ours = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.5, 1.75], [5.0, 0.5, 0.0]])
    told = upstream.told(["a", "b", "c"], ours, theirs)
    assert (told["equal"], told["distinct"], told["commonest"]) == (2, 2, 2)
    assert (told["logits"], told["gap"], told["gap, median"]) == (0.5, 0.5, 2.0)
    assert told["unlike"] == [{"key": "b", "ours": 2, "theirs": 1, "apart": 0.5}]


def test_the_page_tells_what_is_not_kept():
    theirs = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [5.0, 0.0, 0.0]])
    record = copy.deepcopy(RECORD)
    record["packs"][0] |= upstream.told(["a", "b", "c"], theirs, theirs)
    assert suites_page.broken([record]) == []
    text = suites_page.rendered([record], ["dtd", "pcam"])
    assert "3 of 3 predictions are equal" in text
    assert "Not compared yet with tiny: pcam" in text
    assert "NOT" not in text.replace("Not compared", "")
    record |= {"input": 0.01, "labels equal": False, "lists": {"names": False, "templates": True}}
    record["packs"][0] |= upstream.told(["a", "b", "c"], theirs.roll(1, 1), theirs[[0, 0, 0]])
    record["packs"][0]["texts equal"] = False
    told = suites_page.broken([record])
    assert len(told) == 6
    text = suites_page.rendered([record], ["dtd"])
    assert all(f"- NOT KEPT: {line}\n" in text for line in told)
    assert "| dtd | NOT EQUAL | equal |" in text


def test_the_map_of_the_towers_leaves_no_common_direction():
    noise = torch.Generator().manual_seed(1)
    spread = torch.logspace(0, -2, 48)
    embeddings = torch.randn(400, 48, generator=noise) * spread + 20 * torch.randn(48, generator=noise)
    even = embeddings @ towers.evened(embeddings).T
    assert even.mean(0).abs().max() < 1e-3
    variances = torch.linalg.svdvals(even - even.mean(0)).square() / 400
    kept = towers.DIRECTIONS
    assert torch.allclose(variances[:kept], torch.full((kept,), 1 / 48), rtol=1e-2)
    assert variances[kept:].max() < 1e-6


def test_every_card_with_a_folder_on_the_hub_has_its_lists_in_upstream():
    hub = {n for n in upstream.all_cards() if reader.read("datasets", n, DatasetCard).source.hub}
    assert hub == set(upstream.KEYS)
    assert len(upstream.all_cards()) == 21


def test_without_a_checkout_or_what_it_needs_it_says_so(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=f"{tmp_path}: no checkout of LAION-AI/CLIP_benchmark"):
        upstream.Upstream(tmp_path)
    (tmp_path / "clip_benchmark" / "datasets").mkdir(parents=True)
    (tmp_path / "clip_benchmark" / "datasets" / "builder.py").touch()
    monkeypatch.setattr(upstream, "NEEDED", ("torch", "no_such_package"))
    with pytest.raises(SystemExit, match=r"needs no_such_package; type: make \.venv/\.parity"):
        upstream.Upstream(tmp_path)
