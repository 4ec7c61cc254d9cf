"""Figures for papers: which rows are in one figure, what is drawn, and the same bytes for the same rows."""

import pytest
from command_line import run_command
from test_leaderboard import cell, rows, two_models

from robustbench_vlm import store
from robustbench_vlm.errors import DataError
from robustbench_vlm.results import result_file
from robustbench_vlm.results.figures import board, style, training
from robustbench_vlm.training import log

TOML = 'name = "pair"\ntitle = "A pair"\nversion = 3\ndatasets = ["one", "two"]\neps = ["4/255"]\nn = 10\n'


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda one: hasattr(one, "get_text"))]


def test_a_curve_goes_through_the_radii_of_one_ladder(tmp_path):
    for eps, ladder, broken in (("4/255", ["4/255"], 2), ("8/255", ["4/255", "8/255"], 5)):
        outcome = {"robust": {"apgd-ce": 9 - broken, "square": 9 - broken}}
        found = dict.fromkeys(range(broken), "apgd-ce")
        cell(tmp_path, "a", "one", 9, found, eps=eps, eps_ladder=ladder, outcome=outcome)
    alone = {"eps": "8/255", "eps_ladder": ["8/255"], "outcome": {"robust": {"apgd-ce": 8, "square": 8}}}
    cell(tmp_path, "a", "one", 9, {0: "apgd-ce"}, **alone)
    made = board.drawn(rows(tmp_path), "radius", "one")
    assert len(made) == 2  # 8/255 alone is another attack than 8/255 after 4/255
    curves = [list(line.get_ydata()) for figure in made.values() for line in figure.axes[0].lines]
    assert [90.0, 80.0] in curves
    assert [90.0, 70.0, 40.0] in curves


def test_each_contest_has_its_own_figure(tmp_path):
    two_models(tmp_path)
    cell(tmp_path, "clean", "one", 9, {0: "pgd20"}, attack="pgd20")
    found = rows(tmp_path)
    contests = {result.contest.digits for result in result_file.read(tmp_path)}
    assert board.drawn(found, "heatmap", "mean").keys() == contests
    crosses = board.drawn(found, "clean-robust", "mean")  # pgd20 has no mean
    assert len(crosses) == 1
    (figure,) = crosses.values()
    assert {"clean", "defended"} <= {text.partition(" (")[0] for text in texts(figure)}
    with pytest.raises(DataError, match="plot: no row of 'three'; expected one of: one, two, mean"):
        board.drawn(found, "radius", "three")


def test_a_heat_map_has_every_number_and_a_dash_where_there_is_none(tmp_path):
    two_models(tmp_path)
    cell(tmp_path, "partial", "one", 9, {0: "apgd-ce"})
    (figure,) = board.drawn(rows(tmp_path), "heatmap", "mean").values()
    shown = texts(figure)
    assert shown.count("80.0") == 2  # of the dataset, and of the mean named `first`
    assert "–" in shown
    assert shown.index("mean") < shown.index("one")


def test_the_same_rows_give_the_same_bytes_in_every_format(tmp_path):
    two_models(tmp_path)
    for kind in style.FORMATS:
        once, twice = (
            [
                style.content(figure, kind)
                for figure in board.drawn(rows(tmp_path), "clean-robust", "mean").values()
            ]
            for _ in range(2)
        )
        assert once == twice, kind
        assert once[0].startswith({"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[kind])


def test_hostile_names_are_text_in_a_figure(tmp_path):
    cell(tmp_path, "$x^2$\n<b>\u202e", "one", 9, {0: "apgd-ce"})
    cell(tmp_path, "$x^2$\n<b>\u202e", "two", 9, {0: "apgd-ce"})
    for kind in board.KINDS:
        for figure in board.drawn(rows(tmp_path), kind, "mean").values():
            drawn = style.content(figure, "svg")
            assert b"<b>" not in drawn
            assert any(text.startswith("$x^2$\\n<b>\\u202e (") for text in texts(figure)), kind


def test_the_command_writes_a_file_a_contest(tmp_path, monkeypatch, capsys):
    two_models(tmp_path / "results")
    store.write(tmp_path / "pair.toml", TOML.encode())
    words = ["--results", tmp_path / "results", "--suite", tmp_path / "pair.toml", "--out", tmp_path / "out"]
    for what in board.KINDS:
        assert run_command(monkeypatch, "plot", what, *words, "--format", "png") == 0
        printed = capsys.readouterr().out.split()
        assert len(printed) == 1
        assert printed[0].startswith(str(tmp_path / "out" / f"pair-{what}-"))
        assert (tmp_path / "out").joinpath(printed[0].rpartition("/")[2]).read_bytes().startswith(b"\x89PNG")
    assert run_command(monkeypatch, "plot", "training", *words) == 2
    assert "plot training: no --run; expected --run FOLDER" in capsys.readouterr().err
    assert run_command(monkeypatch, "plot", "radius", *words, "--run", tmp_path) == 2


def test_curves_of_a_training_run_are_those_of_its_log(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": 0, "probe": {"clean": 0.9, "robust": 0.0}}]
    others = {"lr": 0.1, "grad_norm": 1.0, "images_per_second": 90.0, "data_seconds": 0.2}
    lines += [{"step": i, "loss": 3.0 / i, "kl_adv": 1.0 / i} | others for i in (1, 2, 3)]
    lines += [{"step": 3, "probe": {"clean": 0.8, "robust": 0.4}}]
    for line in lines:
        store.append(run / "log.jsonl", line)
    assert training.OTHERS >= log.TIMES
    assert training.LOG == log.NAME
    made = training.figure(run)
    above, below = made.axes
    curves = {line.get_label(): line for line in [*above.lines, *below.lines]}
    assert curves.keys() == {"loss", "kl_adv", "clean", "robust"}
    assert list(curves["loss"].get_ydata()) == [3.0, 1.5, 1.0]
    assert list(curves["robust"].get_xdata()) == [0, 3]
    assert list(curves["robust"].get_ydata()) == [0.0, 40.0]
    assert run_command(monkeypatch, "plot", "training", "--run", run, "--out", tmp_path) == 0
    assert (tmp_path / "training-run.svg").read_bytes().startswith(b"<?xml")
    with pytest.raises(DataError, match=r"log\.jsonl: no such file; expected the log of a training run"):
        training.figure(tmp_path)
