"""Smaller shapes at the end of a run: only those of the same bits, and fewer rows for the same findings."""

import pytest
import torch
from attack_models import blobs, classifier
from torch import nn

from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.attacks.fab import Fab
from robustbench_vlm.attacks.square import Square
from robustbench_vlm.engine import batch_shapes, canonical, scheduler
from robustbench_vlm.engine.job import ImageBlock, Job, Model
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.threat import Threat, parse_eps

ROWS = 64
LINF = Threat("linf", parse_eps("4/255"))
PLUGINS = {
    "apgd-ce": Apgd("ce", 8, 0.75, 1, 0),
    "apgd-t": Apgd("targeted-dlr", 6, 0.75, 1, 3),
    "fab-t": Fab(steps=20, targets=2, restarts=1, alpha_max=0.1, eta=1.05, beta=0.9),
    "square": Square(queries=60, p=0.8, restarts=1),
}


class Counted(nn.Module):
    """A classifier that notes the rows of every call and whether it is differentiated."""

    def __init__(self, told=None):
        super().__init__()
        self.calls, self.told = [], told or (lambda logits, grad: logits)
        self.model = classifier(10)

    def forward(self, images):
        grad = images.requires_grad
        self.calls.append((len(images), grad))
        return self.told(self.model(images), grad)


def run(model, attack, n, view=None, active_rows=None):
    images, labels = blobs(n, 10, seed=4)
    found = {}
    cost = scheduler.run(
        Model(model, view), Job([("s", attack)], LINF, ROWS, 10, active_rows),
        [ImageBlock(images, labels, [str(i) for i in range(n)])], lambda f: found.__setitem__(f.key, f),
    )  # fmt: skip
    return [found[str(i)] for i in range(n)], cost


def test_shapes_are_halves_in_whole_vectors():
    assert batch_shapes.halves(64) == [32, 16, 8]
    assert batch_shapes.halves(48) == [24]
    assert batch_shapes.halves(16) == [8]
    assert batch_shapes.halves(100) == batch_shapes.halves(8) == batch_shapes.halves(1) == []


def same_bits(told, n, *, gradients=True):
    """The shapes that a model's own numbers allow, each looked at by itself."""
    model = Counted(told)
    images, labels = blobs(n, 10, seed=4)
    clean = canonical.logits(model, images, ROWS)
    found = batch_shapes.Shapes(Oracle(model), images, labels, clean, ROWS, gradients)
    return sorted({found.smallest(wanted) for wanted in (5, 8, 9, 16, 17, 32)}, reverse=True)


@pytest.mark.parametrize("n", [70, 64, 11, 1])
def test_a_model_of_independent_rows_gives_the_same_bits_in_every_shape(n):
    assert same_bits(None, n) == same_bits(None, n, gradients=False) == [32, 16, 8]


@pytest.mark.parametrize(
    ("told", "left"),
    [
        (lambda z, grad: z + 1e-5 * (len(z) == 64), [64]),  # other logits in smaller shapes
        (lambda z, grad: z + 1e-5 * (len(z) < 16), [32, 16]),  # ... in the smallest only
        (lambda z, grad: z + 1e-5 * (len(z) == 16), [32, 8]),  # ... in one between
        (lambda z, grad: z - 1e-5 * z.mean(0), [64]),  # rows that see each other
        (lambda z, grad: z + 1e-5 * torch.rand_like(z), [64]),  # noise
        (lambda z, grad: z * (1 + 1e-5 * (len(z) < 32)) if grad else z, [32]),  # other gradients
        (lambda z, grad: z + torch.nan, [64]),
    ],
)
def test_a_shape_of_other_bits_is_left_out(told, left):
    assert same_bits(told, 70) == left


def test_rows_that_are_more_than_half_have_the_full_shape_and_nothing_is_looked_at():
    model = Counted()
    images, labels = blobs(70, 10, seed=4)
    found = batch_shapes.Shapes(Oracle(model), images, labels, torch.zeros(70, 10), ROWS, True)
    assert found.smallest(33) == found.smallest(64) == ROWS
    assert not model.calls
    assert not found.some


@pytest.mark.parametrize("name", PLUGINS)
def test_findings_are_those_of_the_full_shape_for_fewer_rows(name, monkeypatch):
    shrinks, full = Counted(), Counted()
    found, _ = run(shrinks, PLUGINS[name], 100)
    monkeypatch.setattr(batch_shapes, "halves", lambda rows: [])
    whole, _ = run(full, PLUGINS[name], 100)
    assert {rows for rows, _ in full.calls} == {ROWS}
    assert {ROWS} < {rows for rows, _ in shrinks.calls} <= {8, 16, 32, ROWS}
    assert sum(rows for rows, _ in shrinks.calls) < sum(rows for rows, _ in full.calls)
    assert 5 <= sum(f.broken for f in whole) <= 95
    for a, b in zip(found, whole, strict=True):
        assert torch.equal(a.adv, b.adv)
        assert {**vars(a), "adv": None} == {**vars(b), "adv": None}


def test_a_model_whose_numbers_depend_on_the_shape_keeps_the_full_one():
    model = Counted(lambda z, grad: z + 1e-5 * (len(z) < 64))
    run(model, PLUGINS["apgd-ce"], 20)
    looked = [rows for rows, _ in model.calls if rows != ROWS]
    # each is looked at once, without gradient and with it, and never used
    assert 32 in looked
    assert all(looked.count(rows) == 2 for rows in looked)


def test_another_attacked_view_is_called_in_the_full_shape_only():
    model, view = Counted(), Counted()
    run(model, PLUGINS["apgd-ce"], 20, view=view)
    assert {rows for rows, _ in model.calls + view.calls} == {ROWS}


def test_few_rows_in_use_make_small_calls_and_verdicts_are_given_in_the_full_shape():
    model = Counted()
    _, cost = run(model, PLUGINS["square"], 20, active_rows=5)
    sizes = [rows for rows, _ in model.calls]
    assert sizes.count(ROWS) == cost.canonical
    assert sizes.count(8) > 100
    assert cost.forwards + cost.canonical == len(sizes)
