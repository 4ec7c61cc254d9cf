"""The attacked view of a model finds adversarial images; the plain model decides about them."""

from fractions import Fraction

import pytest
import torch
from attack_models import blobs, classifier

from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.attacks.fab import Fab
from robustbench_vlm.engine import attacked_view, scheduler
from robustbench_vlm.engine.job import ImageBlock, Job, Model
from robustbench_vlm.errors import InputError
from robustbench_vlm.threat import Threat

THREAT = Threat("linf", Fraction(5, 255))
ROWS = 16


CE = (("ce", Apgd("ce", 20, 0.75, 1, 0)),)


def run(model, images, labels, view=None, stages=CE):
    found = {}
    cost = scheduler.run(
        Model(model, view), Job(stages, THREAT, ROWS, 10),
        [ImageBlock(images, labels, [str(i) for i in range(len(images))])],
        lambda f: found.__setitem__(f.key, f),
    )  # fmt: skip
    return [found[str(i)] for i in range(len(images))], cost


def data(n=40):
    model = classifier(10)
    images, labels = blobs(n, 10, seed=1)
    right = model(images).argmax(1) == labels
    return model, images[right], labels[right]


def test_bf16_finds_and_fp32_decides():
    model, images, labels = data()
    plain, _ = run(model, images, labels)
    low = attacked_view.build(model, attacked_view.Precision("bf16"), images[:ROWS])
    assert low(images[:ROWS]).dtype == torch.bfloat16
    found, _ = run(model, images, labels, low)
    for a, b in zip(plain, found, strict=True):
        assert b.broken == (int(model(b.adv[None]).argmax()) != int(labels[int(b.key)]))
        assert a.broken == b.broken or abs(a.margin) < 0.2, "only images at the boundary differ"
    assert sum(f.broken for f in found) >= 5


def test_a_success_that_only_the_attacked_view_sees_does_not_count():
    model, images, labels = data()

    def liar(x):
        logits = model(x)
        return torch.where(logits == logits.amax(1, keepdim=True), logits - 100, logits)

    honest, _ = run(model, images, labels)
    found, cost = run(model, images, labels, liar)
    assert cost.unconfirmed >= len(images)
    for finding in found:
        assert finding.broken == (int(model(finding.adv[None]).argmax()) != int(labels[int(finding.key)]))
    assert any(not f.broken for f in honest)
    assert any(not f.broken for f in found)


def test_what_can_be_differentiated_only_once_is_asked_only_once():
    """A replayed graph overwrites what further backward passes need; untargeted FAB takes one a class."""
    model, images, labels = data(10)

    class Single(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            ctx.spent = False
            return logits.clone()

        @staticmethod
        def backward(ctx, gradient):
            assert not ctx.spent, "differentiated twice"
            ctx.spent = True
            return gradient

    stages = [("fab", Fab(3, 0, 1, 0.1, 1.05, 0.9))]
    plain, _ = run(model, images, labels, stages=stages)
    found, _ = run(model, images, labels, lambda x: Single.apply(model(x)), stages=stages)
    assert [f.broken for f in plain] == [f.broken for f in found]
    assert any(f.broken for f in found)


@pytest.mark.slow
def test_a_compiled_view_gives_the_same_verdicts():
    model, images, labels = data()
    seen = attacked_view.build(model, attacked_view.Precision(compiled=True), images[:ROWS])
    plain, _ = run(model, images, labels)
    found, _ = run(model, images, labels, seen)
    for a, b in zip(plain, found, strict=True):
        assert a.broken == b.broken or abs(a.margin) < 1e-3


def test_graphs_need_a_device_and_precision_a_name():
    model, images, _ = data()
    with pytest.raises(InputError, match="--cuda-graphs: device cpu; expected a CUDA device"):
        attacked_view.build(model, attacked_view.Precision(graphs=True), images[:ROWS])
    with pytest.raises(InputError, match="fp32 or bf16"):
        attacked_view.Precision("fp16")


@pytest.mark.gpu
def test_graphs_replay_the_same_numbers():
    model, images, labels = data()
    model, images, labels = model.to("cuda"), images.to("cuda"), labels.to("cuda")
    plain, _ = run(model, images, labels)
    found, _ = run(
        model, images, labels, attacked_view.build(model, attacked_view.Precision(graphs=True), images[:ROWS])
    )
    assert [f.broken for f in plain] == [f.broken for f in found]
    for a, b in zip(plain, found, strict=True):
        assert torch.equal(a.adv, b.adv)


def test_labels_say_what_may_change_rounding():
    assert attacked_view.PLAIN.label == "fp32"
    assert (
        attacked_view.Precision("bf16", tf32=True, compiled=True, graphs=True).label
        == "bf16-find+tf32+compiled"
    )


def test_numerics_are_given_back():
    def settings():
        return (
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.cudnn.conv.fp32_precision,
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    before = settings()
    with attacked_view.numerics():
        assert settings()[:3] == ("ieee", "ieee", True)
    assert settings() == before
    with attacked_view.numerics(tf32=True):
        assert settings()[:2] == ("tf32", "tf32")
    assert settings() == before
