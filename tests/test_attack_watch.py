"""What is seen of a model during an attack and after it: gradients and answers that change, masked lines."""

import torch
from attack_models import blobs, classifier
from torch import Tensor

from robustbench_vlm.engine import attack_watch, canonical, derivatives, model_checks
from robustbench_vlm.engine.attack_watch import AttackWatch, GradientWatch
from robustbench_vlm.engine.job import Model
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.engine.probe import FLOAT32, Observed, Probe
from robustbench_vlm.types import Finding

ROWS = 16


def data():
    images = blobs(ROWS, 10, seed=1)[0]
    return images, classifier()(images).argmax(1)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.gather(1, labels[:, None])[:, 0]


def watched(model, calls=12):
    """A watch over some gradient calls."""
    images, labels = data()
    watch = AttackWatch(Model(model), ROWS, ROWS)
    oracle = Oracle(watch.watched.attacked)
    for number in range(calls):
        oracle.gradient((images + 0.001 * number).clamp(0, 1), lambda logits: margins(logits, labels))
    watch.note(finding("a", broken=True), images[0], 0)
    return watch


def finding(key, adv=None, *, broken=False):
    adv = torch.zeros(3, 12, 12) if adv is None else adv
    return Finding(key, broken, adv, -1, 0, -1, 0, 0, 0, 0.0)


def checked(watch):
    images, _ = data()
    found, cost = watch.checks(images, canonical.logits(classifier(), images, ROWS))
    return {check.name: check for check in found}, cost


def test_a_watch_changes_no_bit_and_keeps_rows_of_ever_fewer_calls():
    images, labels = data()
    watch = GradientWatch(classifier())
    for _ in range(20):
        seen = Oracle(watch).gradient(images, lambda logits: margins(logits, labels))
    plain = Oracle(classifier()).gradient(images, lambda logits: margins(logits, labels))
    assert torch.equal(seen.gradient, plain.gradient)
    assert torch.equal(seen.logits, plain.logits)
    assert (watch.calls, len(watch.kept)) == (20, 6)  # 1, 2, 4, 7, 11, 17
    kept = watch.kept[0]
    assert kept.images.shape == (attack_watch.ROWS, 3, 12, 12)
    assert torch.equal(kept.gradient, plain.gradient[[0, 5, 10, 15]])
    assert kept.weights.sum() == -attack_watch.ROWS


def test_an_honest_model_passes():
    found, cost = checked(watched(classifier()))
    assert [check.level for check in found.values()] == ["pass", "pass"]
    assert found["gradient-mismatch"].value == 0
    assert (cost.forwards, cost.gradients) == (1, 2)


def test_a_gradient_that_becomes_noise_is_seen():
    passes = iter(range(100))

    class Noise(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            return torch.randn_like(gradient) if 3 <= next(passes) < 9 else gradient

    found, _ = checked(watched(lambda x: classifier()(Noise.apply(x))))
    assert found["gradient-mismatch"].level == "fail"
    assert "asked for again" in found["gradient-mismatch"].sentence


def test_answers_that_change_are_seen():
    calls = iter(range(100))
    found, _ = checked(watched(lambda x: classifier()(x) + (next(calls) >= 12)))
    assert found["outputs-changed"].level == "fail"
    assert abs(found["outputs-changed"].value - 1) < 1e-3


def test_answers_that_are_no_longer_finite_are_seen():
    calls = iter(range(100))
    found, _ = checked(watched(lambda x: classifier()(x) * (1 if next(calls) < 12 else torch.nan)))
    assert found["outputs-changed"].level == "fail"
    assert "160 clean logits are no longer finite" in found["outputs-changed"].sentence


def test_a_model_that_writes_all_its_logits_into_the_same_memory_is_honest():
    memory = {}

    def model(x):  # as a captured CUDA graph does
        logits = classifier()(x) * 1
        own = memory.setdefault(logits.shape, torch.zeros_like(logits).detach())
        own.data.copy_(logits.data)
        logits.data = own.data
        return logits

    images, labels = data()
    other = torch.cat([images, 1 - images])
    assert torch.equal(canonical.logits(model, other, ROWS), canonical.logits(classifier(), other, ROWS))
    plain, seen = (
        model_checks.examine(f, images, labels, [str(i) for i in range(ROWS)], rows=ROWS, seed=0)
        for f in (classifier(), model)
    )
    assert seen.failed == plain.failed == []
    assert [one.level for one in checked(watched(model))[0].values()] == ["pass", "pass"]


def test_a_line_to_a_survivor_along_which_the_gradient_says_nothing_is_seen():
    images, labels = data()

    def model(x):  # what is within 0.05 of a clean image has its logits
        apart = (x.detach()[:, None] - images[None]).flatten(2).abs().amax(2)
        nearest = apart.min(1)
        logits = classifier()(x)
        known = classifier()(images)[nearest.indices]
        return torch.where((nearest.values < 0.05)[:, None], logits + (known - logits).detach(), logits)

    honest, masked = watched(classifier()), watched(model)
    for i in range(4):
        gradient = Oracle(classifier()).gradient(images, lambda logits: margins(logits, labels)).gradient[i]
        adv = (images[i] + 0.03 * gradient.sign()).clamp(0, 1)
        honest.note(finding(str(i), adv), images[i], int(labels[i]))
        masked.note(finding(str(i), adv), images[i], int(labels[i]))
    assert checked(honest)[0]["gradient-mismatch"].level == "pass"
    images_, _ = data()
    found, _ = masked.checks(images_, canonical.logits(model, images_, ROWS))
    assert {check.name: check.level for check in found if check.level == "fail"} == {
        "gradient-mismatch": "fail"
    }


def test_only_few_survivors_are_kept_and_none_that_is_broken_later():
    watch = AttackWatch(Model(classifier()), ROWS, ROWS)
    image = torch.zeros(3, 12, 12)
    for key in "abcdefghi":
        watch.note(finding(key), image, 0)
    assert "".join(watch._survivors) == "abcdefgh"
    watch.note(finding("a", broken=True), image, 0)
    watch.note(finding("i"), image, 0)
    assert "".join(watch._survivors) == "bcdefghi"


def test_without_an_attack_nothing_is_checked():
    assert checked(AttackWatch(Model(classifier()), ROWS, ROWS)) == ({}, attack_watch.Cost())


def test_the_coarsest_type_of_a_model_is_noticed():
    images, _ = data()

    def eps(model):
        observed = Observed(model)
        observed(images.clone().requires_grad_())
        return observed.eps

    def inside(dtype):
        return lambda x: classifier()(x.to(dtype).float())

    assert eps(classifier()) == FLOAT32
    assert eps(lambda x: classifier()(x).double()) == FLOAT32
    assert eps(inside(torch.float16)) == torch.finfo(torch.float16).eps
    assert eps(inside(torch.bfloat16)) == torch.finfo(torch.bfloat16).eps
    assert eps(lambda x: classifier()(x).half()) == torch.finfo(torch.float16).eps


def test_the_integral_of_a_known_gradient_is_exact():
    """The logit is the square of one pixel: the middles of two parts give the exact integral of 2x."""

    def model(x):
        square = x[:, 0, 0, 0] ** 2
        return torch.stack([square, 0 * square], 1)

    def other(x):
        square = x[:, 0, 0, 0] ** 2
        return torch.stack([square, 0 * square], 1) * 0.5 + model(x.detach()) * 0.5

    starts, ends = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    line = derivatives.Segments(starts, ends, torch.zeros(1, dtype=torch.int64), 2)
    exact, half = (derivatives.path_errors(Probe.of(f, 4), [line], 0.0, 1.0)[0] for f in (model, other))
    assert float(exact) < 1e-5
    assert abs(float(half) - 0.5) < 1e-3


def test_a_curved_function_is_integrated_again_with_finer_parts():
    """The logit is the eighth power of one pixel: two parts miss 12 % of the integral, eight parts 1 %."""
    calls = []

    def model(x):
        calls.append(len(x))
        power = x[:, 0, 0, 0] ** 8
        return torch.stack([power, 0 * power], 1)

    starts, ends = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    line = derivatives.Segments(starts, ends, torch.zeros(1, dtype=torch.int64), 2)
    coarse, fine = (derivatives.path_errors(Probe.of(model, 8), [line], 0.0, b)[0] for b in (1.0, 0.05))
    assert abs(float(coarse) - (1 - 8 * (0.25**7 + 0.75**7) / 2)) < 1e-3
    assert float(fine) < 0.05
    assert len(calls) == 2 + 4
