"""Copied rows keep their source, recompute where they should, and never mix with measured ones."""

import json

import pytest
from command_line import run_command as vlmrob
from test_leaderboard import cell

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.protocol import Protocol
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.errors import InputError
from robustbench_vlm.results import columns, leaderboard, published, result_file
from robustbench_vlm.threat import eps_text, parse_eps

FARE = ["cifar10", "stl10", "cifar100", "cars", "caltech101", "oxford_pets", "flowers102", "dtd", "eurosat",
        "fgvc_aircraft", "pcam", "imagenet-r", "imagenet-sketch"]  # fmt: skip


def test_the_file_has_the_leaderboards_columns_and_every_row_is_copied():
    rows = published.read()
    assert len(rows) == 873
    assert list(rows) == [*(name for name in columns.names(()) if name in rows), "source"]
    assert {"model_id", "defense", "arch", "dataset", "protocol", "attack", "eps", "clean", "robust"} < {
        *rows
    }
    assert set(rows.status) == {"copied"}
    assert (rows.source != "").all()
    assert set(rows.n) == {""}  # what a paper does not state is not made up
    numbers = rows[["clean", "robust"]].replace("", "0").astype(float)
    assert numbers.min().min() >= 0
    assert numbers.max().max() <= 100


def test_protocols_are_named_only_where_they_are_the_cards():
    rows = published.read()
    assert set(rows.protocol) == {"", "fare/1", "tga-pgd100/1", "pmg-pgd10/1"}
    for name, part in rows[rows.protocol != ""].groupby("protocol"):
        card = reader.read("protocols", str(name).partition("/")[0], Protocol)
        assert name == f"{card.name}/{card.version}"
        assert set(part.eps) <= {eps_text(card.norm, parse_eps(eps, card.norm)) for eps in card.eps}
    assert not (rows[rows.dataset == "imagenet"].protocol == "fare/1").any()
    others = rows[rows.dataset.isin(["caltech101", "eurosat", "sun397"])]
    assert not (others.protocol == "tga-pgd100/1").any()  # whole sets there, the test split here


def test_means_of_fare_recompute_from_their_columns():
    rows = published.read()
    table = rows[rows.source.str.startswith("arXiv:2402.12336 Table 4")]
    checked = 0
    for (_, _), part in table.groupby(["model_id", "eps"]):
        own = part.set_index("dataset").robust.astype(float)
        assert own[FARE].mean() == pytest.approx(own["avg13_fare"], abs=0.06)
        checked += 1
    assert checked == 10


def measured(root, **changes):
    marks = {"protocol": "fare/1", "eps": "4/255"}
    return cell(root, "mine", "dtd", 9, dict.fromkeys(range(5), "apgd-ce"), **(marks | changes))


def test_a_measured_row_stands_above_what_was_printed_under_its_protocol(tmp_path):
    measured(tmp_path)
    measured(tmp_path, protocol="")
    cell(tmp_path, "mine", "imagenet", 9, {}, protocol="fare/1")
    lines = published.beside(result_file.read(tmp_path), "mine")
    assert [line[3:7] for line in lines if line[-1] == "measured here"] == [
        ["mine", "90.0", "40.0", "16.8 to 68.7, n = 10"],
        ["mine", "90.0", "90.0", "59.6 to 98.2, n = 10"],
    ]
    printed = [line for line in lines if line[-1] != "measured here"]
    assert {line[1] for line in printed} == {"dtd"}
    assert {line[2] for line in printed} == {"4/255"}
    assert printed[0][:3] == ["fare/1", "dtd", "4/255"]
    assert "FARE4 ViT-L/14" in {line[3] for line in printed}
    assert all("2402.12336" in line[-1] for line in printed)


def test_without_a_protocol_nothing_is_put_beside_anything(tmp_path):
    measured(tmp_path, protocol="")
    with pytest.raises(InputError, match="no results under a protocol"):
        published.beside(result_file.read(tmp_path), "mine")
    with pytest.raises(InputError, match="no results of it; did you mean 'mine'"):
        published.beside(result_file.read(tmp_path), "min3")


def test_the_command(tmp_path, monkeypatch, capsys):
    measured(tmp_path / "results")

    line = ["compare", "mine", "--results", tmp_path / "results", "--suite", "zeroshot"]
    assert vlmrob(monkeypatch, *line, "--published", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["source"] == "measured here"
    assert {row["protocol"] for row in found} == {"fare/1"}
    assert vlmrob(monkeypatch, *line) == 2
    assert "neither a second model nor --published" in capsys.readouterr().err
    rows, _ = leaderboard.render(
        tmp_path / "results", reader.read("suites", "zeroshot", Suite), tmp_path / "out"
    )
    assert set(rows.status) == {"measured"}
