"""Shapes of the calls of attacks: of the same bits, no more rows than images need, and what fits memory."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from attack_models import blobs, classifier
from torch import nn

import robustbench_vlm
from robustbench_vlm import load_model
from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.attacks.fab import Fab
from robustbench_vlm.attacks.square import Square
from robustbench_vlm.engine import batch_shapes, losses, scheduler
from robustbench_vlm.engine.image_queue import ImageQueue
from robustbench_vlm.engine.job import ImageBlock, Job, Model
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.engine.trajectories import End, Trajectories, Trajectory
from robustbench_vlm.engine.verifier import Verifier
from robustbench_vlm.threat import Threat, parse_eps

ROWS = 16  # of the canonical pass
FULL = 64  # of the attack, where a number is given
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


def run(model, attack, n, batch_size=FULL, rows=ROWS, threat=LINF, **seen):
    images, labels = blobs(n, 10, seed=4)
    found = {}
    cost = scheduler.run(
        Model(model, **seen), Job([("s", attack)], threat, rows, 10, batch_size),
        [ImageBlock(images, labels, [str(i) for i in range(n)])], lambda f: found.__setitem__(f.key, f),
    )  # fmt: skip
    return [found[str(i)] for i in range(n)], cost


def require_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.adv, b.adv)
        assert {**vars(a), "adv": None} == {**vars(b), "adv": None}


def test_shapes_are_halves_down_to_four_and_whole_vectors_above():
    assert batch_shapes.halves(64) == [32, 16, 8, 4]
    assert batch_shapes.halves(48) == [24, 12]
    assert batch_shapes.halves(8) == [4]
    assert batch_shapes.halves(104) == [52]
    assert batch_shapes.halves(4) == batch_shapes.halves(1) == batch_shapes.halves(12)[1:] == []
    assert [batch_shapes.rounded(n) for n in (1, 4, 5, 8, 9, 64, 100)] == [4, 4, 8, 8, 16, 64, 104]
    assert [batch_shapes.of_checks(n, 16) for n in (1, 5, 12, 40)] == [4, 8, 16, 16]


def shapes(model, n, batch_size=FULL, *, forwards=True, gradients=True):
    images, labels = blobs(n, 10, seed=4)
    oracle = Oracle(model)
    return batch_shapes.Shapes(oracle, images, labels, forwards, gradients, batch_size, batch_shapes.Known())


def same_bits(told, n, *, gradients=True):
    """The shapes that a model's own numbers allow, each looked at by itself."""
    found = shapes(Counted(told), n, gradients=gradients)
    return sorted({found.fit(wanted) for wanted in (3, 5, 8, 9, 16, 17, 32)}, reverse=True)


@pytest.mark.parametrize("n", [70, 64, 11, 1])
def test_a_model_of_independent_rows_gives_the_same_bits_in_every_shape(n):
    assert same_bits(None, n) == same_bits(None, n, gradients=False) == [32, 16, 8, 4]


@pytest.mark.parametrize(
    ("told", "left"),
    [
        (lambda z, grad: z + 1e-5 * (len(z) == 64), [64]),  # other logits in smaller shapes
        (lambda z, grad: z + 1e-5 * (len(z) < 16), [32, 16]),  # ... in the smallest only
        (lambda z, grad: z + 1e-5 * (len(z) == 16), [32, 8, 4]),  # ... in one between
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
    found = shapes(model, 70)
    assert found.fit(33) == found.fit(64) == found.fit(500) == FULL
    assert not model.calls


@pytest.mark.parametrize("name", PLUGINS)
def test_findings_are_those_of_the_full_shape_for_fewer_rows(name, monkeypatch):
    shrinks, full = Counted(), Counted()
    found, _ = run(shrinks, PLUGINS[name], 100, rows=FULL)
    monkeypatch.setattr(batch_shapes, "halves", lambda rows: [])
    whole, _ = run(full, PLUGINS[name], 100, rows=FULL)
    assert {rows for rows, _ in full.calls} == {FULL}
    assert {FULL} < {rows for rows, _ in shrinks.calls} <= {4, 8, 16, 32, FULL}
    assert sum(rows for rows, _ in shrinks.calls) < sum(rows for rows, _ in full.calls)
    assert 5 <= sum(f.broken for f in whole) <= 95
    require_same(found, whole)


@pytest.mark.parametrize("name", PLUGINS)
@pytest.mark.parametrize("n", [1, 5, 16, 70])
def test_every_batch_size_finds_the_same(name, n):
    whole, _ = run(Counted(), PLUGINS[name], n, batch_size=FULL)
    for batch_size in (1, 8, 16, 100, None):
        found, _ = run(Counted(), PLUGINS[name], n, batch_size=batch_size)
        require_same(found, whole)


def test_a_model_whose_numbers_depend_on_the_shape_keeps_the_full_one():
    model = Counted(lambda z, grad: z + 1e-5 * (len(z) < 64))
    run(model, PLUGINS["apgd-ce"], 20)
    looked = [rows for rows, grad in model.calls if rows not in (ROWS, FULL)]
    # each is looked at once and never used; the attack makes no call without gradient
    assert 32 in looked
    assert all(looked.count(rows) == 1 for rows in looked)
    assert not [rows for rows, grad in model.calls if not grad and rows != ROWS]


def test_a_view_of_one_shape_is_called_in_it_alone():
    model, view = Counted(), Counted()
    _, cost = run(model, PLUGINS["apgd-ce"], 20, view=view, fixed=True)
    assert {rows for rows, _ in model.calls} == {ROWS}
    assert {rows for rows, _ in view.calls} == {FULL} == {cost.largest}
    run(model, PLUGINS["apgd-ce"], 20, batch_size=None, view=(other := Counted()), fixed=True)
    assert {rows for rows, _ in other.calls} == {batch_shapes.of_fixed(None)}


def test_few_rows_in_use_make_small_calls_and_verdicts_are_given_in_the_canonical_shape():
    model = Counted()
    _, cost = run(model, PLUGINS["square"], 20, batch_size=5)
    sizes = [rows for rows, _ in model.calls]
    assert sizes.count(ROWS) == cost.canonical
    assert sizes.count(8) > 100
    assert cost.forwards + cost.canonical == len(sizes)
    assert cost.largest == 8


# --- auto ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "largest"), [(1, 8), (4, 16), (8, 32), (16, 64)])
def test_auto_takes_no_more_rows_than_three_targets_of_each_image_need(n, largest):
    model = Counted()
    _, cost = run(model, PLUGINS["apgd-t"], n, batch_size=None)
    assert cost.largest <= largest
    if n == 8:  # the shape with which auto begins is not looked at
        assert model.calls[1] == (8, True)


class Clock:
    """Seconds that a model's calls take: a fixed part, and one for each row."""

    def __init__(self, fixed):
        self.now, self.fixed = 0.0, fixed

    def __call__(self):
        return self.now

    def called(self, logits, _):
        self.now += self.fixed + len(logits)
        return logits


@pytest.mark.parametrize(("fixed", "ahead"), [(0, False), (100, True)])
def test_later_targets_run_ahead_only_where_that_makes_a_row_cheaper(fixed, ahead, monkeypatch):
    clock = Clock(fixed)
    monkeypatch.setattr(batch_shapes.time, "perf_counter", clock)
    model, nothing_breaks = Counted(clock.called), Threat("linf", parse_eps("1/25500"))
    found, _ = run(model, PLUGINS["apgd-t"], 8, batch_size=None, threat=nothing_breaks)
    wide = [rows for rows, differentiated in model.calls if differentiated and rows > 8]
    assert len(wide) >= 6 if ahead else set(wide) <= {16}  # calls of 16 rows are tried anyway
    require_same(found, run(Counted(), PLUGINS["apgd-t"], 8, threat=nothing_breaks)[0])


def test_targets_of_an_image_that_has_withstood_one_are_likely_and_go_first():
    queue = ImageQueue(Model(Counted()), Job([("s", PLUGINS["apgd-t"])], LINF, ROWS, 10), [], print)
    fresh, proven, waits = (Trajectories(index, 0, [(1, 0), (2, 0), (3, 0)]) for index in range(3))
    queue.waiting.append(waits)
    queue.running += [fresh, proven]
    for image in (fresh, proven):
        image.next()
    proven.ends[0] = End(False, True, False, -1, 1, 1, 1, 0, 0.0)
    assert (queue.startable, queue.likely) == (3 + 2 + 2, 1 + 2)
    proven.next()  # in a row; `fresh` has fewer, and comes later all the same
    assert [queue.next().image for _ in range(3)] == [waits, proven, fresh]


@pytest.mark.parametrize(
    ("broken", "number", "same_image", "due"),
    [(True, 1, True, True), (True, 0, True, False), (True, 1, False, False), (False, 1, True, False)],
    ids=["later target", "none later", "another image", "no success"],
)
def test_a_success_is_verified_at_once_if_later_targets_of_its_image_are_under_way(
    broken, number, same_image, due
):
    image, other = (Trajectories(index, 0, [(1, 0), (2, 0), (3, 0)]) for index in range(2))
    job = Job([("s", PLUGINS["apgd-t"])], LINF, ROWS, 10)
    verifier = Verifier(Model(Counted()), SimpleNamespace(job=job, waiting=[]))
    verifier.add([(Trajectory(image, 0), None, End(broken, True, not broken, -1, 1, 1, 1, 0, 0.0))])
    busy = [Trajectory(image if same_image else other, number), *[Trajectory(other, 0)] * 7]
    assert verifier.due(busy, smaller_shapes=True) == due
    assert verifier.due(busy, smaller_shapes=False)
    assert verifier.due([], smaller_shapes=True)


@pytest.mark.parametrize(
    ("fixed", "largest"),
    [(10, 64), (0, 8), (1, 8), (100, 512)],  # at 10, a row costs 1.31 in calls of 32, 1.16 of 64, 1.08 of 128
)
@pytest.mark.parametrize("gradients", [True, False])
def test_auto_doubles_while_a_row_gets_cheaper(fixed, largest, gradients, monkeypatch):
    clock = Clock(fixed)
    monkeypatch.setattr(batch_shapes.time, "perf_counter", clock)
    model = Counted(clock.called)
    found = shapes(model, 600, batch_size=None, gradients=gradients)
    assert found.fit(8) == 8
    assert not model.calls
    assert found.fit(600) == largest
    assert max(rows for rows, _ in model.calls) == 2 * largest if largest < 512 else 1024
    before = len(model.calls)
    assert found.fit(600) == largest  # it is not tried again
    assert len(model.calls) == before
    assert found.fit(3) == 4


def test_auto_never_takes_a_shape_of_other_bits(monkeypatch):
    clock = Clock(100)
    monkeypatch.setattr(batch_shapes.time, "perf_counter", clock)

    def told(logits, grad):
        return clock.called(logits, grad) + 1e-5 * (len(logits) > 16)

    assert shapes(Counted(told), 600, batch_size=None).fit(600) == 16


# --- out of memory ------------------------------------------------------------------------------------------


def little_memory(most, after=0, error=torch.OutOfMemoryError):
    """Calls fail that have more rows than there is memory for, from some call on."""
    calls = []

    def told(logits, grad):
        calls.append(grad)
        if grad and len(logits) > most and len(calls) > after:
            raise error("CUDA out of memory. Tried to allocate 2 GiB")
        return logits

    return told


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t", "fab-t"])
@pytest.mark.parametrize("after", [0, 6])
def test_a_run_out_of_memory_goes_on_in_smaller_calls_and_finds_the_same(name, after):
    whole, _ = run(Counted(), PLUGINS[name], 70)
    model = Counted(little_memory(16, after))
    found, _ = run(model, PLUGINS[name], 70)
    require_same(found, whole)
    large = [i for i, (rows, grad) in enumerate(model.calls) if grad and rows > 16]
    assert len([i for i in large if i >= after]) == 2  # of 64 and of 32 rows, never again
    sizes = [rows for rows, grad in model.calls[large[-1] + 1 :] if grad]
    assert max(sizes) == 16


def test_auto_grows_as_far_as_memory_goes(monkeypatch):
    clock = Clock(100)
    monkeypatch.setattr(batch_shapes.time, "perf_counter", clock)
    little = little_memory(32)
    found = shapes(Counted(lambda z, grad: little(clock.called(z, grad), grad)), 600, batch_size=None)
    assert found.fit(600) == 32


def test_gradients_in_parts_are_those_of_the_whole():
    images, labels = blobs(24, 10, seed=4)

    def objectives(logits):
        return torch.stack([losses.cross_entropy(logits, labels, labels), logits.sum(1)], 1)

    whole = list(Oracle(Counted()).gradients(images, objectives))
    oracle = Oracle(Counted(little_memory(8)))
    parts = list(oracle.gradients(images, objectives))
    assert oracle.calls.fitting == 6
    for a, b in zip(whole, parts, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))


def test_other_errors_and_calls_that_cannot_be_smaller_are_raised():
    with pytest.raises(RuntimeError, match="another"):
        run(Counted(little_memory(16, error=lambda _: RuntimeError("another"))), PLUGINS["apgd-ce"], 20)
    with pytest.raises(torch.OutOfMemoryError):
        run(Counted(little_memory(0)), PLUGINS["apgd-ce"], 20)
    view = Counted(little_memory(16))
    with pytest.raises(torch.OutOfMemoryError):
        run(Counted(), PLUGINS["apgd-ce"], 20, view=view, fixed=True)


# --- the packaged model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 16, 70])
def test_a_packaged_model_gets_the_same_verdicts_at_every_batch_size(n, tmp_path):
    chain = tmp_path / "short.toml"
    fields = "rho = 0.75\nrestarts = 1"
    chain.write_text(
        'name = "short"\ntitle = "short"\n'
        f'[[stage]]\nname = "ce"\nattack = "apgd"\nloss = "ce"\nsteps = 6\ntargets = 0\n{fields}\n'
        f'[[stage]]\nname = "t"\nattack = "apgd"\nloss = "targeted-dlr"\nsteps = 5\ntargets = 3\n{fields}\n'
        '[[stage]]\nname = "square"\nattack = "square"\nqueries = 20\np = 0.8\nrestarts = 1\n'
    )
    model = load_model("tiny-robust-teacher").classifier(["red", "green", "blue", "one", "two"])
    images = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(1)
    found = {
        size: robustbench_vlm.attack(model, images, labels, "1/1020", str(chain), batch_size=size)
        for size in (8, 16, 64, None)
    }
    whole = found.pop(64)
    assert n < 70 or 5 <= whole.robust["square"] <= 65, whole.robust
    for other in found.values():
        pd.testing.assert_frame_equal(other.verdicts, whole.verdicts, check_exact=True)
        assert torch.equal(other.images, whole.images)
        assert other.checks == whole.checks
