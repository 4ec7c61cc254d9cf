"""An attack runs in one state of torch, whatever the caller's is, and gives that back; models get copies."""

import contextlib

import pytest
import torch
import toys
from attack_models import blobs, classifier
from torch import nn

import robustbench_vlm
from robustbench_vlm.api import commands
from robustbench_vlm.engine.isolation import isolated, restored_buffers
from robustbench_vlm.errors import InputError, UntrustedResultWarning
from robustbench_vlm.threat import Threat

EPS = "5/255"


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    path = tmp_path_factory.mktemp("chain") / "short.toml"
    stages = [{"name": name, **toys.SHORT[name]} for name in ("ce", "t", "fab", "square")]
    path.write_text(toys.toml({"name": "s", "title": "S", "rows": 16, "stop": "first", "stage": stages}))
    return str(path)


@pytest.fixture(scope="module")
def data():
    images = blobs(16, 10, seed=1)[0]
    return images, classifier()(images).argmax(1)


@contextlib.contextmanager
def double():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND = {
    "no grad": torch.no_grad,
    "gradients disabled": lambda: torch.autograd.grad_mode.set_grad_enabled(False),
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "double": double,
    "another device": lambda: torch.device("meta"),
}


def told():
    """What torch is set to."""
    conv = torch.backends.cudnn.conv
    return (
        *(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        *(
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.backends.cuda.matmul.fp32_precision,
            conv.fp32_precision,
        ),
        *(torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
    )


@pytest.mark.parametrize("around", AROUND)
def test_the_callers_state_changes_nothing_and_comes_back(chain, data, around):
    plain = robustbench_vlm.attack(classifier(), *data, EPS, chain=chain)
    assert 0 < plain.robust["square"] < 16
    with AROUND[around]():
        before = told()
        found = robustbench_vlm.attack(classifier(), *data, EPS, chain=chain)
        assert told() == before
    assert found.robust == plain.robust
    assert torch.equal(found.images, plain.images)
    assert found.verdicts.equals(plain.verdicts)
    assert found.checks == plain.checks


def test_the_state_comes_back_after_an_error_too():
    torch.backends.cudnn.benchmark = True
    before = told()
    inside = []

    def fail():
        with torch.no_grad(), isolated():
            inside.extend(told())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    cpu = torch.device("cpu")
    assert inside == [True, False, False, torch.float32, cpu, "ieee", "ieee", True, False]
    assert told() == before
    torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_models_are_loaded_and_trained_in_torchs_own_state(tmp_path, monkeypatch, around):
    seen = []

    def run_recipe(*_, **__):
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return tmp_path

    monkeypatch.setattr(commands, "run_recipe", run_recipe)
    with around():
        assert robustbench_vlm.train("clean", out=tmp_path) == tmp_path
        model = robustbench_vlm.load_model("tiny")
        assert torch.is_grad_enabled() is False
    assert seen == [(True, False)]
    assert not any(value.is_inference() for value in model.state_dict().values())


def test_images_that_require_a_gradient_are_attacked_and_left_alone(chain, data):
    images, labels = data[0].clone().requires_grad_(), data[1]
    found = robustbench_vlm.attack(classifier(), images, labels, EPS, chain=chain)
    assert found.robust == robustbench_vlm.attack(classifier(), *data, EPS, chain=chain).robust
    assert images.grad is None
    assert not found.images.requires_grad


class InPlace(nn.Module):
    """Normalises its input in its own memory."""

    def forward(self, images):
        return classifier()(images.mul_(2).sub_(1).add_(1).div_(2))


@pytest.mark.parametrize("engine", ["native", "autoattack"])
def test_a_model_that_writes_into_its_input_gets_copies(chain, data, engine):
    if engine == "autoattack":
        pytest.importorskip("pyautoattack")
    images = data[0].clone()
    found = robustbench_vlm.attack(InPlace().eval(), images, data[1], EPS, chain=chain, engine=engine)
    assert torch.equal(images, data[0])
    assert found.checks.failed == []
    assert found.robust == robustbench_vlm.attack(classifier(), *data, EPS, chain=chain, engine=engine).robust


def test_a_model_that_differentiates_inside_is_attacked(chain, data):
    """Logits that carry a graph though no gradient was asked for, as of a counter-attack at test time."""

    @torch.enable_grad()
    def model(images):
        leaf = images if images.requires_grad else images.detach().requires_grad_()
        return classifier()(leaf)

    found = robustbench_vlm.attack(model, *data, EPS, chain=chain)
    assert found.robust == robustbench_vlm.attack(classifier(), *data, EPS, chain=chain).robust
    assert found.checks.failed == []


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_of_other_channels_are_attacked_where_the_model_takes_them(chain, channels, norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * 36, 5)).eval()
    images = torch.rand(12, channels, 6, 6, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(1)
    ball = Threat(norm, "8/255" if norm == "linf" else "0.3")
    found = robustbench_vlm.attack(model, images, labels, ball, chain=chain)
    assert 0 < found.robust["square"] < 12
    with pytest.raises(InputError, match=r"shape \(12, 2, 6, 6\), on which the model fails") as caught:
        robustbench_vlm.attack(model, torch.rand(12, 2, 6, 6), labels, ball, chain=chain)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (1, 1), (2, 9)])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_images_smaller_than_the_tiles_of_square_are_attacked(chain, shape, norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * shape[0] * shape[1], 5)).eval()
    images = torch.rand(6, 3, *shape, generator=torch.Generator().manual_seed(0))
    ball = Threat(norm, "0.1" if norm == "l2" else "2/255")
    found = robustbench_vlm.attack(model, images, model(images).argmax(1), ball, chain=chain)
    assert 0 < found.robust["square"] <= 6


def test_the_flags_of_the_verdicts_are_in_the_result_of_the_call(chain, data):
    def rounded(images):
        return classifier()((images * 255).round() / 255)

    with pytest.warns(UntrustedResultWarning) as caught:
        found = robustbench_vlm.attack(rounded, *data, "16/255", chain=chain)
    failed = {"zero-gradient", "no-progress", "square-beats-white-box"}
    assert failed <= set(found.checks.failed)
    assert len(caught) == len(found.checks.failed)
    honest = robustbench_vlm.attack(classifier(), *data, EPS, chain=chain)
    assert {check.name for check in honest.checks.checks} >= failed | {"outputs-changed"}
    assert honest.checks.failed == []


class Counts(nn.Module):
    """A linear classifier behind batch norm in training mode, which also puts new tensors into a buffer."""

    def __init__(self, images):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(images[0].numel(), 10)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)

    def forward(self, x):
        self.calls = self.calls + 1
        self.hidden.fill_(7)
        return self.head(self.norm(x).flatten(1))


def test_buffers_that_calls_change_get_their_values_back_and_the_flag_stays(data, chain):
    images, labels = data
    model = Counts(images).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ids = {name: id(buffer) for name, buffer in model.named_buffers()}
    with pytest.warns(UntrustedResultWarning):
        found = robustbench_vlm.attack(model, images, labels, EPS, chain)
    assert {"training-mode", "state-changed"} <= set(found.checks.failed)
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == ids
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.training
    model(images)  # and without an attack they do change
    assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])


def test_buffers_come_back_after_an_error_too(data):
    model = Counts(data[0]).train()
    with pytest.raises(RuntimeError, match="cannot be multiplied"), restored_buffers(model):
        model(data[0][..., 1:])  # batch norm counts it, and the linear layer fails
    assert int(model.calls) == int(model.norm.num_batches_tracked) == 0
