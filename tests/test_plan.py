"""`vlmrob plan`: what is counted is right by hand, the pilot measures what the evaluation finds."""

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
import toys
from torch import nn

from robustbench_vlm.cards import reader
from robustbench_vlm.errors import InputError
from robustbench_vlm.evaluation import estimate, forecast, gpus, pilot, planning
from robustbench_vlm.evaluation.calls import Calls
from robustbench_vlm.evaluation.estimate import Price
from robustbench_vlm.evaluation.gpus import Operations
from robustbench_vlm.evaluation.pilot import Pilot, Speeds
from robustbench_vlm.models import openclip, zoo
from robustbench_vlm.results import result_file, stats
from robustbench_vlm.results.mean_interval import mean_interval
from robustbench_vlm.training import cost


def no_report(*_):
    """Progress that nobody reads."""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMROB_CACHE", str(tmp_path / "cache"))
    cards = [toys.dataset_card("toy"), toys.dataset_card("pair", ("cat", "dog"))]
    for card in cards:
        toys.write(card, tmp_path / "data")
    toys.write_include(tmp_path / "cards", cards, [toys.chain("aa", "ce", "square"), toys.pgd()])
    toys.save_model(tmp_path / "m0")
    reader.include([tmp_path / "cards"])
    request = planning.EvalRequest(
        (str(tmp_path / "m0"),), ("aa",), "toys", tmp_path / "results", tmp_path / "data", eps="1,4"
    )
    yield planning.plan(request, torch.device("cpu"))
    reader.include([])


def evaluated(plan):
    """Share of robust images by (model, dataset), one a radius."""
    found = {}
    for path in planning.perform(plan, no_report):
        result = result_file.read_one(path)
        counts, last = result.outcome, result.stages[-1]
        pair = result.model[1], result.dataset
        found[pair] = (*found.get(pair, ()), counts["robust"][last] / counts["n"])
    return found


# --- GPUs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arch"), [("tiny", "vlmrob-tiny"), ("RN50:random", "RN50")])
def test_counted_operations_are_those_of_the_cost_model(name, arch):
    openclip.architectures()  # registers ours
    model = zoo.load(name).model
    counted = gpus.operations(model, model.image_size)
    assert counted.forward == pytest.approx(cost.tower(open_clip.get_model_config(arch)).flops, rel=2e-3)
    # to the images alone; each product of attention has two gradients
    assert 2 * counted.forward <= counted.gradient < 2.05 * counted.forward
    assert counted.text > 0


def test_seconds_on_a_gpu_by_hand():
    speed = Operations(100, 250, 30).speed(1000.0)
    # two forward passes of ten images, one of them with a backward pass of 150 operations an image
    assert speed.of(Calls(10, 2, 1)) == pytest.approx(2 * 1.0 + 1.5 + 2 * estimate.PER_CALL)
    assert speed.text == pytest.approx(0.03)


def test_rates_of_gpus_are_per_second_and_only_what_they_have():
    assert gpus.named("h100").rates() == pytest.approx({"fp32": 67e12, "tf32": 494.7e12, "bf16": 989.4e12})
    assert list(gpus.named("T4").rates()) == ["fp32"]
    with pytest.raises(InputError, match=r"H1000.*did you mean 'H100'"):
        gpus.named("H1000")


def test_what_a_forward_pass_keeps_is_counted_without_weights():
    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, 8, 8), requires_grad=False)

        def forward(self, images):
            return ((images**2) ** 2 * self.scale).flatten(1)  # keeps both bases, and the scale

    model = toys.model().replaced(visual=Squares())
    size = model.image_size
    model.visual.scale.data = torch.ones(3, size, size)
    assert gpus.saved_bytes(model, size) == 2 * 3 * size**2 * 4


# --- intervals ---------------------------------------------------------------------------------------------


def test_widths_are_those_of_the_intervals_of_the_tables():
    def half(interval):
        return 100 * (interval.high - interval.low) / 2

    models = [{"a": (0.8, 0.3), "b": (1.0, 0.5)}]
    one = forecast._widths(models, {"a": 100})
    assert one.least == pytest.approx(half(stats.wilson(0, 100)))
    assert one.expected == pytest.approx(half(stats.wilson(30, 100)))  # wider than at 80
    assert one.most == pytest.approx(half(stats.wilson(50, 100)))
    both = forecast._widths(models, {"a": 100, "b": 40})
    assert both.expected == pytest.approx(half(mean_interval([(30, 100), (20, 40)])))
    assert both.most == pytest.approx(half(mean_interval([(50, 100), (20, 40)])))


# --- the pilot ---------------------------------------------------------------------------------------------


def test_a_model_or_a_chain_that_is_named_twice_is_measured_once(plan):
    request = replace(plan.request, models=plan.request.models * 2, attacks=plan.request.attacks * 2)
    again = planning.plan(request, torch.device("cpu"))
    assert len(again.models) == len(plan.models) == 1
    assert [chain.name for chain in again.settings.chains] == [chain.name for chain in plan.settings.chains]


def test_a_pilot_of_all_images_finds_the_shares_of_the_evaluation(plan):
    one_stage = replace(plan.settings, chains=(planning.Chain.named("pgd5"),))
    plan = replace(plan, settings=one_stage)
    found = pilot.run(plan, Speeds(), no_report)
    assert not plan.settings.results.exists()
    assert found.images == plan.settings.n == 12
    shares = evaluated(plan)
    assert found.shares == shares
    assert any(share > 0 for pair in shares.values() for share in pair)
    assert found.seconds > 0
    assert found.factor > 0


def test_a_pilot_attacks_with_the_first_stage_alone(plan, monkeypatch):
    seen = []
    perform = planning.perform
    monkeypatch.setattr(
        planning, "perform", lambda plan, report: seen.append(plan.settings) or perform(plan, report)
    )
    pilot.run(plan, Speeds(), no_report)
    ((chain,),) = [settings.chains for settings in seen]
    assert chain.stage_names == ["ce"]
    assert seen[0].results != plan.settings.results


def test_a_pilot_that_costs_too_much_is_smaller_or_left_out(plan, monkeypatch):
    def priced(seconds_of):
        monkeypatch.setattr(
            estimate,
            "total",
            lambda plan, *_, **__: (Price(0, seconds_of(plan.settings.n, len(plan.datasets)), 0), 0),
        )
        chosen = pilot._affordable(plan, plan.settings.results, Speeds())
        return chosen and (chosen.settings.n, len(chosen.datasets))

    assert priced(lambda n, count: n * count / 10) == (12, 2)  # no more than the evaluation has
    plan = replace(plan, settings=replace(plan.settings, n=0))
    assert priced(lambda n, count: n * count / 10) == (32, 2)
    assert priced(lambda n, count: n * count) == (8, 2)
    assert priced(lambda n, count: 20 * count) == (8, 1)
    assert priced(lambda n, count: 40 * count) is None


def test_shares_of_what_was_not_attacked(plan):
    (loaded,), (pair, toy) = plan.models, sorted(plan.datasets, key=lambda card: card.name)
    assert Pilot().of(loaded, toy, 2) == (0.5, 0.5)
    found = Pilot({(loaded.card.sha256, "pair"): (0.8, 0.2), ("another", "toy"): (0.0, 0.0)})
    assert found.of(loaded, pair, 2) == (0.8, 0.2)
    assert found.of(loaded, toy, 2) == pytest.approx((0.8, 0.2))


def test_data_that_are_not_there_are_forecast_without_a_pilot(plan, tmp_path):
    plan = replace(plan, request=replace(plan.request, data_root=tmp_path / "nothing"))
    found = forecast.forecast(plan, no_report)
    assert found.found == Pilot()
    assert found.images == 24
    assert 0 < found.here.least < found.here.typical < found.here.worst


# --- the forecast ------------------------------------------------------------------------------------------


def test_the_price_is_that_of_the_shares_times_the_factor(plan, monkeypatch):
    shares = {(plan.models[0].card.sha256, card.name): (1.0, 0.5) for card in plan.datasets}
    monkeypatch.setattr(pilot, "run", lambda *_: Pilot(shares, 8, 2.0, 1.0))
    speeds = Speeds()
    monkeypatch.setattr(forecast, "Speeds", lambda: speeds)
    found = forecast.forecast(plan, no_report, gpu_names=["H100"], utilisation=0.5)
    price, _ = estimate.total(plan, lambda *_: 0.75, speeds)
    assert found.here == Price(2 * price.least, 2 * price.typical, 2 * price.worst)
    assert found.cells == 4
    assert found.measured == 0
    fp32, bf16 = (found.on_gpu["H100", name] for name in ("fp32", "bf16"))
    assert bf16.typical < fp32.typical
    slower = forecast.forecast(plan, no_report, gpu_names=["H100"], utilisation=0.001)
    assert slower.on_gpu["H100", "fp32"].typical > fp32.typical
    assert found.widths["toy"].least < found.widths["toy"].expected <= found.widths["toy"].most


def test_workers_share_the_threads_and_the_work(plan, monkeypatch):
    monkeypatch.setattr(forecast.os, "cpu_count", lambda: 4)
    threads = []
    monkeypatch.setattr(
        estimate, "total", lambda *_: threads.append(torch.get_num_threads()) or (Price(10, 100, 200), 0)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        price = forecast._by_workers(plan, lambda *_: 0.5, 2.0, 8)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert threads == [1]
    each = 2.0 * forecast.MORE_WORK / 4  # eight workers, but four processors
    assert price.typical == pytest.approx(forecast.START + 100 * each)


def test_workers_on_a_device_that_is_not_counted_share_one(plan, monkeypatch):
    monkeypatch.setattr(estimate, "total", lambda *_: (Price(10, 100, 200), 0))
    on_mps = replace(plan, settings=replace(plan.settings, device=torch.device("mps")))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    price = forecast._by_workers(on_mps, lambda *_: 0.5, 1.0, 2)
    assert price.typical == pytest.approx(forecast.START + 100 * forecast.MORE_WORK)


def test_the_work_of_several_workers_is_that_of_the_page():
    page = (Path(__file__).parents[1] / "benchmarks" / "workers.md").read_text("utf-8")
    assert f"All work together: {forecast.MORE_WORK:.2f} times that of one worker." in page


def test_a_pilot_attacks_no_more_images_than_the_evaluation(plan):
    few = replace(plan, settings=replace(plan.settings, n=4))
    assert {smaller.settings.n for smaller in pilot._candidates(few, plan.settings.results)} == {4}


def test_what_is_measured_costs_nothing(plan):
    planning.perform(plan, no_report)
    found = forecast.forecast(plan, no_report)
    assert (found.cells, found.measured) == (4, 4)
    assert found.here == Price(0, 0, 0)
    renamed = plan.datasets[0].model_copy(update={"names": (*plan.datasets[0].names[:-1], "whale")})
    changed = replace(plan, datasets=(renamed, *plan.datasets[1:]))
    assert estimate.total(changed)[1] == 2  # those of the other dataset: other names are another evaluation


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def vlmrob(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    import command_line

    def typed(*words):
        front = ["--include", tmp_path / "cards", "plan", "--suite", "toys", "--data-root", tmp_path / "data"]
        words = [*front, "--model", tmp_path / "m0", "--attack", "aa", "--device", "cpu", *words]
        code = command_line.run_command(monkeypatch, *words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return typed


def test_one_table_has_time_memory_and_widths(vlmrob, tmp_path):
    code, out, err = vlmrob("--workers", "2", "--gpu", "H100,t4")
    assert code == 0, err
    assert not (tmp_path / "results").exists()
    title, head, *rows = [line.split("\t") for line in out.splitlines()]
    assert title == ["# aa on 2 datasets of toys"]
    assert head == ["what", "least", "expected", "most"]
    names = [row[0] for row in rows]
    assert names[:4] == ["images", "results", "time, this process on cpu", "time, 2 workers here"]
    assert "time, H100 bf16" in names
    assert [name for name in names if "t4" in name] == ["time, t4 fp32"]
    assert [row for row in rows if row[0] == "images"] == [["images", "", "24", ""]]
    assert "95 % interval of the mean, points" in names
    assert "% survived" in err
    assert "40 % of the peak rate" in err


def test_a_forecast_as_json_has_numbers(vlmrob):
    code, out, err = vlmrob("--json", "--gpu", "A100", "--utilisation", "0.3")
    assert code == 0, err
    found = json.loads(out)
    assert found["images"] == 24
    assert set(found["half_width_points"]) == {"toy", "pair"}
    assert [entry["precision"] for entry in found["gpus"]] == ["fp32", "tf32", "bf16"]
    assert found["seconds"]["least"] <= found["seconds"]["typical"] <= found["seconds"]["worst"]
    assert found["seconds_by_workers"] is None


def test_an_unknown_gpu_is_refused_before_anything_is_loaded(vlmrob):
    code, out, err = vlmrob("--gpu", "H1000")
    assert (code, out) == (2, "")
    assert err.startswith("error: --gpu H1000: no rates known for it")
    assert err.count("\n") == 1
