"""Examinations of a model before an attack: each fault trips its own, and honest models trip none."""

import copy
import dataclasses
from functools import cache

import pandas as pd
import pytest
import torch
import toys
from attack_models import blobs, classifier
from torch import nn

import robustbench_vlm
from robustbench_vlm import rng
from robustbench_vlm.engine import derivatives, model_checks
from robustbench_vlm.engine.probe import Probe
from robustbench_vlm.errors import AttackError
from robustbench_vlm.models import zoo
from robustbench_vlm.models.clip import Classifier
from robustbench_vlm.models.text_bank import text_bank

N = 24


def examine(model, images=None, labels=None, rows=32, seed=0, **more):
    images = blobs(N, 10, seed=1)[0] if images is None else images
    labels = classifier()(images).argmax(1) if labels is None else labels
    keys = [f"image{i}" for i in range(len(images))]
    return model_checks.examine(model, images, labels, keys, rows=rows, seed=seed, **more)


# --- honest models ------------------------------------------------------------------------------------------


class TinyVit(nn.Module):
    """Patches of 4 pixels, one block, on 12 x 12."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, 4)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, activation="gelu", batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.block(self.patch(x).flatten(2).transpose(1, 2)).mean(1)) * 10


@cache
def normed():
    """A net with batch norm and max pooling, which has seen some images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10),
        )  # fmt: skip
        for seed in range(20):
            model(blobs(64, 10, seed=seed)[0])
    return model.eval().requires_grad_(False)


@cache
def vit():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyVit().eval().requires_grad_(False)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [classifier, normed, vit])
def test_an_honest_model_trips_nothing(make, seed):
    model = make()
    images = blobs(N, 10, seed=1)[0]
    found = examine(model, images, model(images).argmax(1), seed=seed, only_ce=True)
    assert [check for check in found.checks if check.level != "pass"] == []
    assert len(found.checks) == 10
    mismatch = next(check for check in found.checks if check.name == "gradient-mismatch")
    assert mismatch.value <= 0.01


@pytest.mark.parametrize("name", ["tiny", "tiny-clean-teacher", "tiny-robust-teacher"])
def test_the_packaged_models_trip_nothing(name):
    card = toys.dataset_card(native_px=32)
    images = torch.stack([torch.from_numpy(p).permute(2, 0, 1) / 255 for p in toys.pictures(card, 8)])
    loaded = zoo.load(name)
    sentences = [[f"a {c} circle"] for c in ("red", "green", "blue", "yellow")]
    model = Classifier(loaded.model, text_bank(loaded.model, sentences))
    found = examine(model, images, model(images).argmax(1), rows=16, only_ce=True)
    assert [check for check in found.checks if check.level != "pass"] == []


def test_flat_images_at_the_edge_of_the_box_sit_on_kinks_and_still_pass():
    # maxima over equal pixels, and clamping at 0 and 1, have no gradient that is right in every direction
    flat = torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(8, 3, 12, 12).clone()
    flat[:, 0], flat[4:, 1] = 0, 1

    def model(x):
        return normed()(x.clamp(0, 1))

    for seed in range(5):
        found = examine(model, flat, model(flat).argmax(1), seed=seed)
        assert "gradient-mismatch" not in found.failed


# --- faults -------------------------------------------------------------------------------------------------


def straight_through(f):
    """`f` with the gradient of the identity."""
    return lambda x: x + (f(x) - x).detach()


def rounded(x):
    return (x * 255).round() / 255


def nan_gradient(x):
    return classifier()(x) + 0 * (x - x).abs().sqrt().flatten(1).sum(1, keepdim=True)


DRAWS = iter(range(10**6))


def random_output(x):
    noise = rng.normal(f"draw {next(DRAWS)}", (len(x), 10))
    return classifier()(x) + 0.05 * torch.from_numpy(noise)


def mean_subtracting(x):
    said = classifier()(x)
    return said - said.mean(0)


class Counts(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return classifier()(x)


FAULTS = {
    "nan": (nan_gradient, {"non-finite"}),
    "no gradient": (torch.no_grad()(lambda x: classifier()(x)), {"no-gradient"}),
    "zero gradient": (lambda x: classifier()(x) * 0 + classifier()(x).detach(), {"zero-gradient"}),
    "rounding": (lambda x: classifier()(rounded(x)), {"zero-gradient"}),
    "quantised": (lambda x: classifier()(straight_through(rounded)(x)), {"gradient-mismatch"}),
    "coarse": (
        lambda x: classifier()(straight_through(lambda v: (v * 15).round() / 15)(x)),
        {"gradient-mismatch"},
    ),
    "part detached": (lambda x: classifier()(0.5 * x + 0.5 * x.detach()), {"gradient-mismatch"}),
    "wrong sign": (lambda x: classifier()(2 * x.detach() - x), {"gradient-mismatch"}),
    "softmax": (lambda x: classifier()(x).softmax(1), {"probabilities"}),
    "random": (random_output, {"random-output"}),
    "batch mean": (mean_subtracting, {"batch-dependent"}),
    "saturated": (lambda x: 1000 * classifier()(x), {"saturated"}),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_trips_its_own_check_and_no_other(fault, seed):
    model, expected = FAULTS[fault]
    found = examine(model, seed=seed, only_ce=True)
    assert set(found.failed) == expected
    for check in found.checks:
        if check.level == "fail":
            assert check.value > check.bound or check.name == "probabilities"
            assert len(check.sentence) > 20
            assert "\n" not in check.sentence


def test_batch_norm_in_training_mode_trips_all_three_that_it_should():
    found = examine(copy.deepcopy(normed()).train())
    assert set(found.failed) == {"batch-dependent", "training-mode", "state-changed"}


def test_dropout_left_on_trips_randomness_and_training_mode():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = examine(nn.Sequential(*classifier()[:-1], nn.Dropout(0.5), classifier()[-1]))
    assert set(found.failed) == {"random-output", "training-mode"}


def test_a_wrapper_in_training_mode_is_no_more_than_a_warning():
    found = {check.name: check.level for check in examine(nn.Sequential(classifier()).train(False)).checks}
    assert found["training-mode"] == "pass"
    wrapper = nn.Sequential(classifier())
    wrapper.training = True
    assert {c.name: c.level for c in examine(wrapper).checks}["training-mode"] == "warn"


def test_a_call_that_changes_a_buffer_is_seen():
    found = examine(Counts().eval())
    assert found.failed == ["state-changed"]
    assert "calls" in next(check for check in found.checks if check.name == "state-changed").sentence


def test_saturation_is_a_warning_where_another_loss_runs_too():
    model, _ = FAULTS["saturated"]
    assert {c.name: c.level for c in examine(model).checks}["saturated"] == "warn"


def test_gradients_are_not_examined_for_a_black_box_chain():
    for fault in ("nan", "no gradient", "rounding"):
        found = examine(FAULTS[fault][0], white_box=False)
        assert (found.failed, found.gradients) == ([], 0)


# --- what an examination is a function of, and what it costs ------------------------------------------------


def test_order_and_company_change_nothing_and_the_global_generator_is_left_alone(monkeypatch):
    monkeypatch.setattr(model_checks, "SAMPLE", 16)
    images, _ = blobs(40, 10, seed=1)
    labels = classifier()(images).argmax(1)
    keys = [f"image{i}" for i in range(40)]
    before = torch.get_rng_state()
    straight = model_checks.examine(classifier(), images, labels, keys, rows=16, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    turned = model_checks.examine(classifier(), images.flip(0), labels.flip(0), keys[::-1], rows=16, seed=0)
    assert turned == straight
    assert model_checks.examine(classifier(), images, labels, keys, rows=16, seed=1) != straight


@pytest.mark.parametrize(("rows", "n"), [(64, 24), (16, 24), (4, 24), (1, 24), (64, 1), (2, 1)])
def test_any_shape_and_number_of_images_costs_at_most_a_few_dozen_calls(rows, n):
    met = []

    def model(x):
        met.append(len(x))
        return classifier()(x)

    images, _ = blobs(n, 10, seed=1)
    found = examine(model, images, classifier()(images).argmax(1), rows=rows)
    assert found.failed == []
    assert set(met) == {rows}
    shared = -(-n // rows)  # cross-entropy and margin share a forward
    assert len(met) == found.forwards + found.gradients - shared
    assert sum(met) <= 24 * max(rows, n)
    assert 4 <= found.gradients <= 6 * shared


def test_a_gradient_that_rounding_hides_is_not_trusted():
    # a slope of 1e-6 on logits of 1000 cannot be seen in float32
    def model(x):
        score = x.flatten(1).mean(1) * 1e-6
        return torch.stack([1000 + score, 900 - score], 1)

    images, _ = blobs(4, 10, seed=1)
    found = examine(model, images, torch.zeros(4, dtype=torch.int64))
    assert found.failed == ["gradient-mismatch"]
    mismatch = next(check for check in found.checks if check.name == "gradient-mismatch")
    assert (mismatch.level, mismatch.value) == ("fail", None)
    assert "rounding" in mismatch.sentence


def test_the_error_of_a_gradient_that_says_four_fifths_is_one_fifth():
    # linear in one pixel: every direction has the slope 1 or -1 there, of which the gradient says 0.8
    def model(x):
        pixel = x[:, 0, 5, 5]
        score = 0.4 * pixel + 0.1 * pixel.detach()
        return torch.stack([score, -score], 1)

    images, _ = blobs(4, 10, seed=1)
    zeros = torch.zeros(4, dtype=torch.int64)
    points = derivatives.Points(images, zeros, list("abcd"), 0)
    errors = derivatives.local_errors(Probe.of(model, 4), points, 0.0).tolist()
    # of the smallest step, which is the kindest here, rounding takes off up to a tenth of the rise of 1
    assert all(0.1 <= error <= 0.2001 for error in errors)
    assert len(errors) == 4


def test_logits_that_are_none_are_refused_in_one_line():
    for model in (lambda x: classifier()(x)[:, 0], lambda x: (classifier()(x),), lambda x: x.sum()):
        with pytest.raises(AttackError, match="the model returns"):
            examine(model)


# --- in results ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def what(tmp_path_factory):
    card = toys.dataset_card()
    return toys.subject(card, toys.write(card, tmp_path_factory.mktemp("data")))


def test_a_cell_stores_its_checks_and_a_failed_one_is_a_flag(what, tmp_path):
    chain = toys.chain("aa", "ce", "square")
    runs = [toys.run(what, toys.request(tmp_path / d, chain, eps=("2/255", "4/255"))) for d in "ab"]
    for _, content in runs[0]:
        assert content["outcome"]["flags"] == []
        assert {check["level"] for check in content["checks"]["checks"]} == {"pass"}
        assert content["checks"]["forwards"] + content["checks"]["gradients"] <= 24
    assert [c["checks"] for _, c in runs[0]] == [c["checks"] for _, c in runs[1]]
    assert [c["sha256"] for _, c in runs[0]] == [c["sha256"] for _, c in runs[1]]

    sick = toys.changed(what, straight_through(rounded))
    ((_, content),) = toys.run(sick, toys.request(tmp_path / "c", chain))
    assert content["outcome"]["flags"] == ["gradient-mismatch"]


def test_checks_run_once_a_chain_and_not_for_finished_cells(what, tmp_path, monkeypatch):
    met = []
    real = model_checks.examine
    monkeypatch.setattr(model_checks, "examine", lambda *a, **k: met.append(k) or real(*a, **k))
    chains = [toys.chain("one", "ce"), toys.chain("blind", "square")]
    order = toys.request(tmp_path, *chains, eps=("2/255", "4/255"))
    toys.run(what, order)
    assert [(k["white_box"], k["only_ce"]) for k in met] == [(True, True), (False, False)]
    toys.run(what, order)
    assert len(met) == 2


def test_the_python_interface_gives_the_checks_beside_the_counts(tmp_path):
    stages = [{"name": "p", **toys.PGD}]
    path = tmp_path / "pgd.toml"
    path.write_text(toys.toml({"name": "p", "title": "P", "rows": 16, "stop": "last", "stage": stages}))
    images = blobs(6, 10, seed=1)[0]
    labels = classifier()(images).argmax(1)
    fine = robustbench_vlm.attack(classifier(), images, labels, "5/255", chain=str(path))
    assert fine.checks.failed == []
    soft = robustbench_vlm.attack(FAULTS["softmax"][0], images, labels, "5/255", chain=str(path))
    assert soft.checks.failed == ["probabilities"]
    record = soft.checks.record
    assert record["checks"][2] == dataclasses.asdict(soft.checks.checks[2])


def test_a_noise_only_success_stands_at_iteration_0_and_survivors_rose(what, tmp_path):
    chain = toys.chain("aa", "ce", "square")
    ((path, _),) = toys.run(what, toys.request(tmp_path, chain, eps=("1/255",)))
    found = pd.read_parquet(path.with_suffix(".parquet"))
    survivors = found[found.clean_correct & (found.broken_by != "ce")]
    assert len(survivors)
    assert (survivors.progress > 0).all()
    path = tmp_path / "ce.toml"
    stages = [{"name": "ce", **toys.SHORT["ce"]}]
    path.write_text(toys.toml({"name": "c", "title": "C", "rows": 16, "stop": "first", "stage": stages}))
    images = blobs(N, 10, seed=1)[0]
    labels = classifier()(images).argmax(1)
    found = robustbench_vlm.attack(classifier(), images, labels, "100/255", chain=str(path)).verdicts
    noise = found[found.iteration == 0]
    assert 0 < len(noise) < N
    assert (noise.forwards == 1).all()
    assert noise.progress.isna().all()


def test_masked_gradients_raise_every_flag_that_they_should(what, tmp_path):
    chain = toys.chain("aa", "ce", "square")
    order = toys.request(tmp_path, chain, eps=("8/255",))
    ((path, content),) = toys.run(toys.changed(what, rounded), order)
    found, outcome = pd.read_parquet(path.with_suffix(".parquet")), content["outcome"]
    blind = int((found.broken_by == "square").sum())
    assert 0 < blind < outcome["n"]
    assert outcome["square_only"] == blind
    assert outcome["flags"] == ["gradient-mismatch", "no-progress", "square-beats-white-box", "zero-gradient"]
    survivors = found[found.clean_correct & (found.broken_by != "ce")]
    assert (survivors.progress == 0).all()
    assert outcome["robust"]["ce"] == len(survivors) == outcome["robust"]["square"] + blind

    # the same chain on the model itself, in another folder: the fingerprints of both are equal here
    ((_, content),) = toys.run(what, toys.request(tmp_path / "honest", chain, eps=("8/255",)))
    assert content["outcome"]["square_only"] == 0
    assert content["outcome"]["flags"] == []

    alone = toys.request(tmp_path / "alone", toys.chain("blind", "square"), eps=("8/255",))
    ((_, content),) = toys.run(toys.changed(what, rounded), alone)  # no stage with gradients came before
    assert (content["outcome"]["square_only"], content["outcome"]["flags"]) == (0, [])


def test_one_step_alone_has_nothing_to_rise_above(what, tmp_path):
    fgsm = toys.pgd("fgsm")
    stage = fgsm.stage[0].model_copy(update={"steps": 1, "step_size": "eps", "restarts": 2})
    order = toys.request(tmp_path, fgsm.model_copy(update={"stage": (stage,)}), eps=("1/255",))
    ((path, content),) = toys.run(what, order)
    assert content["outcome"]["flags"] == []
    assert content["outcome"]["robust"]["fgsm"] > 0
    assert pd.read_parquet(path.with_suffix(".parquet")).progress.isna().all()


def test_a_nan_gradient_is_an_error_row_that_says_where(what, tmp_path):
    sick = toys.changed(what, lambda x: x + 0 * (x - x).abs().sqrt())
    ((path, content),) = toys.run(sick, toys.request(tmp_path, toys.chain("aa", "ce", "square")))
    found, outcome = pd.read_parquet(path.with_suffix(".parquet")), content["outcome"]
    assert outcome["errors"] == outcome["n"] == outcome["clean_correct"]
    assert outcome["robust"] == {"ce": 0, "square": 0}
    assert (found.broken_by == "").all()
    assert found.error.str.startswith("ce: a logit or gradient is not finite (iteration 0, target -1").all()
    assert outcome["flags"] == ["error-rows", "non-finite"]
