"""FAB against the same algorithm written down plainly for one image, projections by bisection in float64."""

from fractions import Fraction

import pytest
import torch
from attack_models import blobs, classifier

from robustbench_vlm.attacks.fab import Fab
from robustbench_vlm.engine.interface import Rows
from robustbench_vlm.engine.noise import Keyed
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.threat import Threat

N, STEPS = 6, 5
ALPHA, ETA, BETA = 0.1, 1.05, 0.9
STRONG = 0.5  # going back half the way makes both projections matter
THREATS = {"linf": Threat("linf", Fraction(4, 255)), "l2": Threat("l2", Fraction(1, 4))}


def size(delta, norm):
    return float(delta.abs().max()) if norm == "linf" else float(delta.norm())


def onto(point, normal, offset, norm):
    """The shortest move of a point (d,) in [0, 1] to {<w, z> = offset} within the box, by bisection."""
    fall = float(normal @ point) - offset
    toward = -normal.sign() if fall > 0 else normal.sign()
    way = torch.where(toward > 0, 1 - point, point)
    speed = torch.ones_like(point) if norm == "linf" else normal.abs()
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        reached = float((normal.abs() * torch.minimum(middle * speed, way)).sum())
        low, high = (middle, high) if reached < abs(fall) else (low, middle)
    return toward * torch.minimum(high * speed, way)


def margin(model, point, shape, label, target):
    """z_t - z_y and its gradient, of one image in float64 pixels."""
    x = point.float().reshape(1, *shape).expand(N, *shape).clone().requires_grad_()
    logits = model(x)
    value = logits[0, target] - logits[0, label]
    (gradient,) = torch.autograd.grad(value, x)
    return value.item(), gradient[0].flatten().double(), int(logits[0].argmax())


def plainly(model, image, label, target, norm, beta):
    """Every point that is checked, the norm of the nearest success (None if none), and the weights."""
    clean = image.flatten().double()
    at, nearest, points, weights = clean.clone(), None, [], []
    for _ in range(STEPS):
        value, normal, _ = margin(model, at, image.shape, label, target)
        offset = float(normal @ at) - value
        here, back = onto(at, normal, offset, norm), onto(clean, normal, offset, norm)
        a, b = max(size(here, norm), 1e-8), max(size(back, norm), 1e-8)
        weight = min(a / (a + b), ALPHA)
        at = ((at + ETA * here) * (1 - weight) + (clean + ETA * back) * weight).clamp(0, 1)
        points.append(at.clone())
        weights.append(weight)
        if margin(model, at, image.shape, label, target)[2] != label:
            far = size(at - clean, norm)
            nearest = far if nearest is None else min(far, nearest)
            at = clean + beta * (at - clean)
    return points, nearest, weights


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("beta", [BETA, STRONG])
def test_fab_is_the_algorithm_written_down_plainly(norm, beta):
    model, (images, labels) = classifier(10), blobs(N, 10, seed=4)
    labels, targets = model(images).argmax(1), model(images).argsort(dim=1)[:, -2]
    rows = Rows(images, labels, targets, Keyed(tuple("abcdef")), (0,) * N)
    attack, iterates = Fab(STEPS, 1, 1, ALPHA, ETA, beta), []
    state = attack.start(rows, THREATS[norm])
    for _ in range(STEPS):
        state = attack.step(state, Oracle(model))
        iterates.append(state.x.flatten(1).double())
    capped = []
    for i in range(N):
        points, nearest, weights = plainly(model, images[i], int(labels[i]), int(targets[i]), norm, beta)
        for number, point in enumerate(points):
            assert torch.allclose(iterates[number][i], point, atol=2e-5), f"image {i}, iteration {number}"
        assert nearest == pytest.approx(float(state.nearest[i]), rel=1e-3)
        capped += [weight == ALPHA for weight in weights[1:]]  # at first both projections are one
    assert any(capped) == (beta == STRONG)


@pytest.mark.parametrize("norm", THREATS)
def test_later_restarts_begin_within_half_a_radius(norm):
    images, labels = blobs(N, 10, seed=4)
    images = images * 0.5 + 0.25  # away from the box
    rows = Rows(images, labels, labels, Keyed(tuple("abcdef")), (0, 1, 0, 1, 2, 0))
    state = Fab(STEPS, 1, 3, ALPHA, ETA, BETA).start(rows, THREATS[norm])
    far = [size(state.at[i] - images[i], norm) / float(THREATS[norm].eps) for i in range(N)]
    assert far == pytest.approx([0, 0.5, 0, 0.5, 0.5, 0], abs=1e-4)
