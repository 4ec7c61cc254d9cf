"""A price is made of calls that are counted: a model that counts its own calls agrees, and so do runs."""

from dataclasses import replace

import model_zoo
import pytest
import torch
import toys

from robustbench_vlm.backends.backend import Backend
from robustbench_vlm.engine import batch_shapes, canonical, model_checks
from robustbench_vlm.engine.attack_watch import AttackWatch
from robustbench_vlm.engine.job import ImageBlock, Model
from robustbench_vlm.evaluation import calls, estimate, planning
from robustbench_vlm.evaluation.calls import Calls, Schedule
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.evaluation.estimate import Line, Price, Speed
from robustbench_vlm.models import text_bank
from robustbench_vlm.threat import Threat

CLASSES = model_zoo.CLASSES


class Counted:
    """A classifier that counts its calls, by shape, and the backward passes through its logits."""

    def __init__(self, classify):
        self.classify = classify
        self.forget()

    def forget(self):
        self.forwards, self.gradients, self.work = 0, 0, 0

    def __call__(self, images):
        self.forwards += 1
        self.work += len(images)
        logits = self.classify(images)
        if logits.requires_grad:
            logits.register_hook(self.note)
        return logits

    def note(self, gradient):
        self.gradients += 1
        self.work += len(gradient)


def chain(rows, *stages, stop="first"):
    return Chain.of(toys.chain("c", *stages, rows=rows, stop=stop))


def attacked(counted, built, images, labels, eps="4/255", batch_size=None):
    """Attack images under a watch; returns the watch."""
    keys = [str(i) for i in range(len(images))]
    clean = canonical.logits(counted, images, built.rows)
    watch = AttackWatch(Model(counted), built.rows, batch_shapes.of_checks(len(images), built.rows))
    block = ImageBlock(images, labels, keys, clean)
    counted.forget()
    Backend().run_chain(
        watch.watched,
        built.job(Threat("linf", eps), CLASSES, batch_size=batch_size),
        block,
        lambda finding: watch.note(finding, images[int(finding.key)], int(labels[int(finding.key)])),
    )
    return watch, clean


@pytest.mark.parametrize("rows", [8, 16, 64])
@pytest.mark.parametrize("white_box", [True, False])
def test_the_calls_of_the_checks_are_those_of_a_model_that_counts_them(rows, white_box):
    built = chain(rows, "ce", "t", "fab", "square") if white_box else chain(rows, "square")
    assert built.needs(CLASSES)["white_box"] == white_box
    for n in (1, 3, rows, 3 * rows):
        images, labels = model_zoo.pictures(n, 1)
        counted = Counted(model_zoo.plain)
        keys = [str(i) for i in range(n)]
        model_checks.examine(counted, images, labels, keys, rows=rows, seed=0, white_box=white_box)
        expected = calls.before(rows, n, white_box=white_box, worst=False)
        assert (counted.forwards, counted.gradients) == (expected.forwards, expected.gradients), n
        assert counted.work == rows * (counted.forwards + counted.gradients)
        watch, clean = attacked(counted, built, images, labels, eps="1/2550")  # all survive
        asked = watch._gradients.calls
        counted.forget()
        watch.checks(images[:rows], clean[:rows])
        called = batch_shapes.of_checks(n, rows)
        expected = calls.after(rows, called, asked, n, len(built.stages), worst=False)
        assert (counted.forwards, counted.gradients) == (
            sum(made.forwards for made in expected),
            sum(made.gradients for made in expected),
        ), n
        assert counted.work == sum(made.rows * (made.forwards + made.gradients) for made in expected)


def test_a_wrong_gradient_costs_what_the_worst_case_says():
    images, labels = model_zoo.pictures(16, 1)
    counted = Counted(model_zoo.backward(model_zoo.fixed))  # so that every line is cut into finer parts
    model_checks.examine(counted, images, labels, [str(i) for i in range(16)], rows=16, seed=0)
    worst = calls.before(16, 16, white_box=True, worst=True)
    usual = calls.before(16, 16, white_box=True, worst=False)
    assert usual.forwards < counted.forwards <= worst.forwards
    assert usual.gradients < counted.gradients <= worst.gradients


@pytest.mark.parametrize("n", [1, 5, 16, 23, 40])
@pytest.mark.parametrize(
    ("stages", "stop"), [(("ce",), "last"), (("ce", "t"), "first"), (("ce", "t", "fab"), "first")]
)
def test_the_work_of_an_attack_that_all_survive_is_counted_before_it(n, stages, stop):
    built = chain(16, *stages, stop=stop)
    images, labels = model_zoo.pictures(n, 1)
    counted = Counted(model_zoo.plain)
    labels = canonical.logits(counted, images, 16).argmax(1)
    # as `auto` on a quiet machine; on a busy one its trial may end with smaller calls
    attacked(counted, built, images, labels, eps="1/25500", batch_size=64)
    schedule = Schedule.of(Backend(), 16, 64, on_cpu=True)
    made = calls.of_cell(built, CLASSES, schedule, n, n, worst=True)[1:]  # without the clean pass
    work = sum(call.rows * (call.forwards + call.gradients) for call in made)
    assert 0.7 * counted.work <= work <= 1.6 * counted.work


def test_a_schedule_by_hand():
    (_, targeted), (_, square) = chain(16, "t", "square").stages
    on_cpu, on_gpu = (Schedule(Backend(), 64, 64, shrinks=shrinks) for shrinks in (True, False))
    assert [on_cpu.shape(n) for n in (1, 5, 8, 9, 33, 64)] == [4, 8, 8, 16, 64, 64]
    assert on_gpu.shape(1) == 64
    # two targets of four gradients each: 80 trajectories side by side, or twice 40 images in calls of 64, of
    # which 24 rows run ahead
    assert targeted.passes == (4, 4)
    assert list(on_gpu.stage(targeted, 5, 40, ahead=True, worst=True)) == [Calls(64, 4, 4), Calls(64, 4, 4)]
    assert list(on_cpu.stage(targeted, 5, 40, ahead=True, worst=True)) == [Calls(64, 8, 8)]
    assert list(on_cpu.stage(targeted, 5, 3, ahead=True, worst=True)) == [Calls(4, 8, 8)]
    assert list(on_gpu.stage(targeted, 5, 40, ahead=False, worst=True)) == [Calls(64, 8, 8)]
    assert list(on_cpu.stage(square, 5, 8, ahead=True, worst=True)) == [Calls(8, 13, 0)]
    ahead = list(on_cpu.stage(square, 5, 2, ahead=True, worst=False))
    assert ahead == [Calls(4, 7, 0)]  # 12 queries and the start point, two rows an image
    few = Schedule(Backend(), 64, 10, shrinks=True)  # --batch-size 10
    assert list(few.stage(square, 5, 25, ahead=True, worst=True)) == [Calls(16, 26, 0), Calls(8, 13, 0)]


def test_seconds_by_hand():
    line = Line.through(0.3, 0.3 + 9 * 0.1, 10)
    assert (line.fixed, line.row) == (pytest.approx(0.2), pytest.approx(0.1))
    assert line.at(64) == pytest.approx(6.6)
    assert Line.through(0.3, 0.3, 1).at(64) == pytest.approx(19.2)  # a large model: one row was timed
    assert Line.through(0.3, 0.2, 10) == Line(0.3, 0.0)  # noise does not make rows cost less than nothing
    speed = Speed(Line(0.0, 0.1), Line(0.0, 0.3))
    assert speed.of(Calls(10, 2, 1)) == pytest.approx(2 * 1 + 2 + 2 * estimate.PER_CALL)
    assert Price(1, 2, 3) + Price(10, 20, 30) == Price(11, 22, 33)


@pytest.fixture
def plan(tmp_path):
    card = toys.dataset_card()
    toys.write(card, tmp_path / "data")
    toys.write_include(tmp_path / "cards", [card], [toys.chain("aa", "ce", "t", "fab", "square"), toys.pgd()])
    toys.save_model(tmp_path / "m0")
    from robustbench_vlm.cards import reader

    reader.include([tmp_path / "cards"])
    request = planning.EvalRequest(
        (str(tmp_path / "m0"),), ("aa",), "toys", tmp_path / "results", tmp_path / "data", eps="2,4"
    )
    yield planning.plan(request, torch.device("cpu"))
    reader.include([])


def test_a_price_has_a_text_bank_once_and_nothing_that_is_measured(plan, monkeypatch, tmp_path):
    monkeypatch.setenv("VLMROB_CACHE", str(tmp_path / "cache"))
    (loaded,), (card,) = plan.models, plan.datasets
    sentences = text_bank.render(card.names, card.templates)
    assert text_bank.calls(loaded.model, sentences * 11) == 2  # 66 sentences in calls of 64
    assert text_bank.calls(loaded.model, sentences) == 1
    price, measured = estimate.total(plan)
    assert 0 < price.least < price.typical < price.worst
    assert measured == 0
    planning.perform(plan, lambda *_: None)
    assert text_bank.calls(loaded.model, sentences) == 0
    assert estimate.total(plan) == (Price(), 2)
    assert not [line for line in estimate.price(plan) if "about" in line]


def test_the_lines_say_what_the_price_stands_for(plan, monkeypatch):
    monkeypatch.setattr(estimate, "total", lambda _: (Price(30, 200, 400), 0))
    assert estimate.price(plan)[1] == (
        "about 3 min on cpu at its present speed, checks included and start-up not, if half of the images "
        "survive every attack; 30 s if every image is broken at once, 7 min if none is"
    )
    to_the_end = replace(plan, settings=replace(plan.settings, chains=(Chain.named("pgd20"),)))
    assert estimate.price(to_the_end)[1].startswith("about 3 min to 7 min on cpu at its present speed")
    monkeypatch.setattr(estimate, "total", lambda _: (Price(3e3, 3e3, 4e3), 0))
    typed = replace(plan.request, datasets=("toy",), norm="l2", workers="2", n=7, until=3.0)
    (look,) = [line for line in estimate.price(replace(plan, request=typed)) if "first look" in line]
    assert look.startswith("for a first look: vlmrob eval --model ")
    for kept in ("--dataset toy", "--norm l2", "--eps 2,4", f"--out {typed.results}", "--workers 2"):
        assert f" {kept} " in look
    assert look.endswith("--attack aa2 --n 100")
    assert "--until" not in look


def test_a_price_takes_a_small_part_of_the_run(plan):
    """In rows: the timed calls, against the calls of the checks alone, which every run makes."""
    counted = []
    model = plan.models[0].model
    handle = model.register_forward_hook(lambda _, images, __: counted.append(len(images[0])))
    estimate.total(plan)
    handle.remove()
    checks = calls.before(64, 64, white_box=True, worst=False)
    assert sum(counted) <= 0.35 * 64 * (checks.forwards + checks.gradients)
