"""The contract of every attack plug-in, and of the engine that drives it.

`CONFIGURED` below lists configurations that were chosen for these tests. Every attack of the package runs
under every stopping rule: where a rule is missing in the table, with the configuration of
`attack_models.discovered`. So a new attack needs no row here.
"""

from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import EntryPoint, EntryPoints
from itertools import cycle
from typing import ClassVar

import pytest
import torch
from attack_models import blobs, classifier, discovered, findings, position_dependence

from robustbench_vlm import store
from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.attacks.apgd_eot import ApgdEot
from robustbench_vlm.attacks.apgd_l1 import ApgdL1
from robustbench_vlm.attacks.fab import Fab
from robustbench_vlm.attacks.fgsm import Fgsm
from robustbench_vlm.attacks.mi_fgsm import MiFgsm
from robustbench_vlm.attacks.pgd import Pgd
from robustbench_vlm.attacks.square import Square
from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.engine import canonical, geometry, losses, row_table
from robustbench_vlm.engine.interface import Rows
from robustbench_vlm.engine.noise import Keyed
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.errors import AttackError, InputError
from robustbench_vlm.results import verdicts
from robustbench_vlm.threat import Threat
from robustbench_vlm.training.inner import ascend

LINF, L2, L1 = Threat("linf", Fraction(5, 255)), Threat("l2", Fraction(1, 4)), Threat("l1", Fraction(2))
CONFIGURED = {
    "pgd-last": (Pgd("ce", 6, "eps/4", 2, True), "last"),
    "pgd-first": (Pgd("margin", 6, "eps/4", 1, False), "first"),
    "pgd-best": (Pgd("ce", 6, "eps/2", 1, True), "best"),
    "fgsm-last": (Fgsm("ce"), "last"),
    "fgsm-first": (Fgsm("dlr"), "first"),
    "mi-fgsm-last": (MiFgsm("ce", 5, "eps/5", 1.0), "last"),
    "mi-fgsm-first": (MiFgsm("margin", 5, "eps/5", 0.5), "first"),
    "mi-fgsm-best": (MiFgsm("ce", 5, "eps/2", 1.0), "best"),
    "apgd-ce": (Apgd("ce", 10, 0.75, 2, 0), "first"),
    "apgd-last": (Apgd("dlr", 10, 0.75, 1, 0), "last"),
    "apgd-best": (Apgd("ce", 10, 0.75, 2, 0), "best"),
    "apgd-eot": (ApgdEot("margin", 5, 0.75, 1, 0, eot=2), "first"),
    "apgd-t": (Apgd("targeted-dlr", 8, 0.75, 1, 3), "first"),
    "fab-t": (Fab(6, 3, 2, 0.1, 1.05, 0.9), "first"),
    "fab-last": (Fab(6, 2, 1, 0.1, 1.05, 0.9), "last"),
    "fab-best": (Fab(4, 0, 1, 0.1, 1.05, 0.9), "best"),
    "square": (Square(40, 0.8, 1), "first"),
    "square-last": (Square(20, 0.8, 2), "last"),
    "square-best": (Square(20, 0.8, 1), "best"),
    "apgd-l1": (ApgdL1("ce", (3, 3, 4), (3.0, 2.0, 1.0), 2, 0), "first"),
    "apgd-l1-t": (ApgdL1("targeted-dlr", (8,), (1.0,), 1, 3), "first"),
    "apgd-l1-last": (ApgdL1("dlr", (8,), (1.0,), 1, 0), "last"),
    "apgd-l1-best": (ApgdL1("ce", (3, 3, 4), (3.0, 2.0, 1.0), 1, 0), "best"),
}
STOPS = ("first", "last", "best")
PLUGINS = CONFIGURED | {
    f"{name}-{stop}-discovered": (attack, stop)
    for name, attack in discovered().items()
    for stop in STOPS
    if (type(attack), stop) not in {(type(known), stop) for known, stop in CONFIGURED.values()}
}
THREATS = {threat.norm: threat for threat in (LINF, L2, L1)}
every = pytest.mark.parametrize("name", PLUGINS)
everywhere = pytest.mark.parametrize(
    ("name", "threat"),
    [
        pytest.param(name, THREATS[norm], id=f"{name}-{norm}")
        for name, (attack, _) in PLUGINS.items()
        for norm in attack.norms
    ],
)
norms = pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])


def _home(attack):
    """The first ball that an attack knows."""
    return THREATS[attack.norms[0]]


def test_every_attack_of_the_package_runs_under_every_stopping_rule():
    kinds = {plugins.get("attacks", name) for name in plugins.names("attacks")}
    assert {type(attack) for attack, _ in PLUGINS.values()} == kinds
    for kind in kinds:
        assert {stop for attack, stop in PLUGINS.values() if type(attack) is kind} == set(STOPS)


def test_a_new_attack_is_discovered_without_a_chain(tmp_path, monkeypatch):
    """It is built from the defaults of its fields."""
    lines = (
        "from dataclasses import dataclass",
        "from robustbench_vlm.attacks.fgsm import Fgsm",
        "@dataclass(frozen=True)",
        "class Shorter(Fgsm):",
        "    loss: str = 'margin'",
    )
    (tmp_path / "shorter_fgsm.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("shorter-fgsm", "shorter_fgsm:Shorter", "robustbench_vlm.attacks")
    points = EntryPoints([point]).select
    monkeypatch.setattr(plugins, "_points", lambda kind: points(group=f"robustbench_vlm.{kind}"))
    found = discovered()
    assert set(found) == set(plugins.names("attacks"))
    assert found["shorter-fgsm"].loss == "margin"
    assert found["shorter-fgsm"].passes == (1, 1)


def _data(n=20, n_classes=10):
    model = classifier(n_classes)
    return model, *blobs(n, n_classes, seed=1)


def _same(a, b):
    assert a.key == b.key
    assert torch.equal(a.adv, b.adv)
    rest = [{k: v for k, v in vars(f).items() if k != "adv"} for f in (a, b)]
    assert rest[0] == rest[1]


@everywhere
def test_findings_do_not_depend_on_scheduling(name, threat):
    attack, stop = PLUGINS[name]
    model, images, labels = _data()
    before = images.clone()
    whole = findings(model, images, labels, attack, threat, stop=stop)
    assert torch.equal(images, before)
    turned = torch.randperm(20, generator=torch.Generator().manual_seed(3)).tolist()
    for live, order in ((1, turned[:6]), (7, turned), (16, range(20))):
        for found in findings(model, images, labels, attack, threat, stop=stop, batch_size=live, order=order):
            _same(found, whole[int(found.key.rsplit("/")[-1])])


def test_findings_are_equal_for_1_7_and_64_live_rows_near_the_boundary():
    model, images, labels = _data(40)
    attack = Apgd("ce", 10, 0.75, 1, 0)
    assert position_dependence(model, images, 64) == 0
    runs = [findings(model, images, labels, attack, LINF, rows=64, batch_size=live) for live in (1, 7, 64)]
    assert 0.3 <= sum(f.broken for f in runs[0]) / 40 <= 0.7
    for others in runs[1:]:
        for a, b in zip(runs[0], others, strict=True):
            _same(a, b)


@everywhere
def test_every_image_stays_in_ball_and_box_and_the_verdict_is_the_canonical_one(name, threat):
    attack, stop = PLUGINS[name]
    model, images, labels = _data()
    found = findings(model, images, labels, attack, threat, stop=stop)
    adv = torch.stack([f.adv for f in found])
    assert geometry.excess(adv, images, threat).max() <= geometry.slack(threat)
    assert adv.min() >= 0
    assert adv.max() <= 1
    logits = canonical.logits(model, adv, 16)
    assert [f.prediction for f in found] == logits.argmax(1).tolist()
    assert [f.broken for f in found] == (logits.argmax(1) != labels).tolist()
    assert any(f.broken for f in found)
    assert all((f.margin <= 0) == f.broken for f in found)
    attacked = [f for f in found if f.broken and f.forwards]
    assert all(0 <= f.iteration <= f.forwards for f in attacked)


@every
def test_reading_the_flags_an_iteration_behind_changes_nothing(name, monkeypatch):
    """As on a GPU: always, and by turns; while rows become free, and with fewer rows than images."""
    attack, own = PLUGINS[name]
    model, images, labels = _data()
    turns = cycle([True, True, False, True, False, False])
    for stop in STOPS:
        at_once = findings(model, images, labels, attack, _home(attack), stop=stop, batch_size=9)
        behinds = [lambda *_: True, *([lambda *_: next(turns)] if stop == own else [])]
        for behind in behinds:
            with monkeypatch.context() as patch:
                patch.setattr(row_table, "reads_behind", behind)
                later = findings(model, images, labels, attack, _home(attack), stop=stop, batch_size=9)
            for a, b in zip(at_once, later, strict=True):
                _same(a, b)


def test_stopping_at_the_first_success_and_at_the_end_agree():
    model, images, labels = _data(40)
    for attack in (
        Apgd("ce", 20, 0.75, 1, 0),
        Apgd("targeted-margin", 10, 0.75, 1, 3),
        ApgdL1("ce", (4, 4, 6), (3.0, 2.0, 1.0), 1, 0),
        ApgdL1("targeted-margin", (10,), (1.0,), 1, 3),
        Fab(6, 3, 1, 0.1, 1.05, 0.9),
        Square(40, 0.8, 1),
    ):
        first = findings(model, images, labels, attack, _home(attack))
        assert any(f.broken for f in first)
        for stop in ("last", "best"):
            whole = findings(model, images, labels, attack, _home(attack), stop=stop)
            assert [f.broken for f in first] == [f.broken for f in whole]
            assert [f.target for f in first if f.broken] == [f.target for f in whole if f.broken]
            assert [f.iteration for f in first] == [f.iteration for f in whole]


@pytest.mark.parametrize(
    "attack",
    [
        Pgd("margin", 8, "eps/2", 1, True),
        MiFgsm("margin", 8, "eps/2", 1.0),
        Apgd("margin", 12, 0.75, 1, 0),
        ApgdL1("margin", (12,), (1.0,), 1, 0),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_the_best_iterate_has_the_largest_objective_of_all_that_were_met(attack):
    model, images, labels = _data(24)
    right = model(images).argmax(1) == labels
    images, labels, seen = images[right][:16], labels[right][:16], []

    def watched(x):
        logits = model(x)
        if logits.requires_grad:
            seen.append(losses.correct_margin(logits.detach(), labels))
        return logits

    # sixteen rows for sixteen images: row i of every call is image i
    found = findings(watched, images, labels, attack, _home(attack), stop="best", batch_size=16)
    broken = [i for i, f in enumerate(found) if f.broken]
    assert broken
    last = findings(model, images, labels, attack, _home(attack), stop="last")
    for i in broken:
        assert found[i].margin == pytest.approx(min(float(margins[i]) for margins in seen), abs=1e-5)
        assert not last[i].broken or found[i].margin <= last[i].margin + 1e-5


def test_spent_passes_of_a_surviving_image_are_those_of_the_specification():
    model, images, labels = _data(4)
    tiny = Threat("linf", Fraction(1, 25500))
    for attack, forwards, backwards in (
        (Apgd("ce", 100, 0.75, 1, 0), 101, 101),
        (Apgd("targeted-dlr", 100, 0.75, 1, 9), 909, 909),
        (Fab(100, 9, 1, 0.1, 1.05, 0.9), 1800, 900),
        (Fab(10, 0, 2, 0.1, 1.05, 0.9), 40, 180),
        (Pgd("ce", 20, "eps/4", 1, True), 20, 20),
        (Fgsm("ce"), 1, 1),
        (MiFgsm("ce", 10, "eps/10", 1.0), 10, 10),
        (ApgdEot("dlr", 5, 0.75, 1, 0, eot=20), 120, 120),
        (ApgdL1("ce", (30, 30, 40), (3.0, 2.0, 1.0), 5, 0), 515, 515),
        (ApgdL1("targeted-dlr", (30, 30, 40), (3.0, 2.0, 1.0), 1, 5), 515, 515),
    ):
        ball = Threat("l1", Fraction(1, 1000)) if attack.norms == ("l1",) else tiny
        robust = [f for f in findings(model, images, labels, attack, ball) if not f.broken]
        assert {(f.forwards, f.backwards) for f in robust} == {(forwards, backwards)}
        assert attack.cost(10) == (forwards, backwards)
    robust = [f for f in findings(model, images, labels, Square(500, 0.8, 1), tiny) if not f.broken]
    assert all(0.94 * 501 <= f.forwards <= 501 and f.backwards == 0 for f in robust)
    assert any(f.forwards < 501 for f in robust), "a proposal that changes nothing is passed over"


def test_a_linear_classifier_breaks_exactly_beyond_its_known_distance():
    weights = torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4) / 10
    images = (
        torch.full((8, 3, 4, 4), 0.5) + torch.linspace(0.005, 0.05, 8)[:, None, None, None] * weights.sign()
    )

    def model(x):
        score = ((x - 0.5) * weights).flatten(1).sum(1)
        return torch.stack([score, -score], dim=1)

    margin = ((images - 0.5) * weights).flatten(1).sum(1)
    labels = torch.zeros(8, dtype=torch.int64)
    for threat, dual in ((Threat("linf", Fraction(1, 40)), weights.abs().sum()), (L2, weights.norm())):
        reachable = (margin / dual < float(threat.eps)).tolist()
        assert any(reachable)
        assert threat.norm == "l2" or not all(reachable)
        for attack in (
            Apgd("ce", 20, 0.75, 1, 0),
            Apgd("targeted-dlr", 20, 0.75, 1, 9),
            Fab(20, 9, 1, 0.1, 1.05, 0.9),
        ):
            found = findings(model, images, labels, attack, threat)
            assert [f.broken for f in found] == reachable


@pytest.mark.parametrize("n_classes", [2, 3, 4, 5, 8, 10, 1000])
def test_few_classes_never_fail_and_say_what_stands_in(n_classes):
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(48, n_classes, generator=generator)
    images = torch.rand(4, 3, 4, 4, generator=generator)

    def model(x):
        return (x - 0.5).flatten(1) @ head

    labels = model(images).argmax(1)
    for attack in (
        Apgd("dlr", 4, 0.75, 1, 0),
        Apgd("targeted-dlr", 4, 0.75, 1, 9),
        Fab(4, 9, 1, 0.1, 1.05, 0.9),
        Square(4, 0.8, 1),
    ):
        tiny = Threat("linf", Fraction(1, 2550000))
        assert not any(f.broken for f in findings(model, images, labels, attack, tiny))
        targets = getattr(attack, "targets", 0)
        said = " ".join(attack.substitutions(n_classes))
        assert (f"targets {targets} -> {n_classes - 1}" in said) == (n_classes - 1 < targets)
        fewest = {"dlr": 3, "targeted-dlr": 4}.get(getattr(attack, "loss", ""), 0)
        assert ("undefined" in said) == (n_classes < fewest)
        assert attack.target_count(n_classes) == min(targets, n_classes - 1)


def test_seed_and_stage_name_the_noise():
    model, images, labels = _data(4)
    attack = Pgd("ce", 1, "eps/100", 1, True)
    one = findings(model, images, labels, attack, LINF, stop="last")
    for change in ({"seed": 1}, {"stage": "t"}):
        other = findings(model, images, labels, attack, LINF, stop="last", **change)
        assert not torch.equal(one[0].adv, other[0].adv)


@dataclass(frozen=True)
class OnlyLinf(Pgd):
    norms: ClassVar[tuple[str, ...]] = ("linf",)


def test_wrong_input_is_refused_by_name():
    model, images, labels = _data(4)
    attack = Pgd("ce", 2, "eps/4", 1, True)
    with pytest.raises(InputError, match="onlylinf: norm 'l2'; expected linf"):
        findings(model, images, labels, OnlyLinf("ce", 2, "eps/4", 1, True), L2)
    with pytest.raises(InputError, match=r"float32 pixels in \[0, 1\]"):
        findings(model, images * 2, labels, attack, LINF)
    with pytest.raises(InputError, match="batch size: 0"):
        findings(model, images, labels, attack, LINF, batch_size=0)
    with pytest.raises(InputError, match="distinct keys"):
        findings(model, images, labels, attack, LINF, keys=["a", "a", "b", "c"])
    with pytest.raises(InputError, match="targets"):
        Apgd("ce", 10, 0.75, 1, 9)
    with pytest.raises(InputError, match="step size"):
        Pgd("ce", 2, "eps/none", 1, True)


@everywhere
def test_non_finite_numbers_give_no_verdict_and_touch_no_other_image(name, threat):
    attack, stop = PLUGINS[name]
    base, images, labels = _data()
    sick = images[3].mean()

    def model(x):
        # clean logits are fine; anything near image 3 but not equal to it is not
        near = ((x.mean((1, 2, 3)) - sick).abs() < 5e-3) & (x != images[3]).flatten(1).any(1)
        return base(x) * torch.where(near, torch.nan, 1.0)[:, None]

    reach = {"linf": Fraction(1, 2550), "l2": Fraction(1, 200), "l1": Fraction(1, 10)}
    tiny = Threat(threat.norm, reach[threat.norm])
    well = findings(base, images, labels, attack, tiny, stop=stop)
    found = findings(model, images, labels, attack, tiny, stop=stop)
    ill = [i for i, f in enumerate(found) if f.error]
    assert 3 in ill
    assert len(ill) <= 12, "FAB in L1 goes far; eight images or more never come near"
    assert "not finite" in found[3].error
    assert not found[3].broken
    for i in set(range(20)) - set(ill):
        _same(well[i], found[i])


@everywhere
def test_a_gradient_that_is_not_finite_is_an_error_wherever_logits_are_fine(name, threat):
    attack, stop = PLUGINS[name]
    base, images, labels = _data(8)

    def model(x):
        # |0| has the derivative 0, its square root an infinite one: their product is NaN
        return base(x) + 0 * (x - x).abs().sqrt().flatten(1).sum(1, keepdim=True)

    found = findings(model, images, labels, attack, threat, stop=stop)
    right = (base(images).argmax(1) == labels).tolist()
    assert any(right)
    rows = Rows(images, labels, (labels + 1) % 10, Keyed(tuple("abcdefgh")), (0,) * 8, stop)
    one_step = int(attack.step(attack.start(rows, threat), Oracle(base)).backwards[0])
    assert one_step == {"apgd-eot": 2, "fab-best": 9}.get(name, one_step)
    for f in (f for f, attacked in zip(found, right, strict=True) if attacked):
        if attack.cost(10)[1] == 0:  # takes no gradient, so it has a verdict
            assert not f.error
            continue
        assert not f.broken
        assert "a logit or gradient is not finite (iteration 0" in f.error
        line = verdicts.line(f, images[int(f.key.split("/")[-1])], "", 0, threat)
        assert store.sealed(line, "ledger.jsonl"), "a line that can be written"
        assert (f.iteration, f.backwards) == (-1, one_step)


def test_a_gradient_that_is_zero_is_counted_and_one_that_is_missing_raises():
    model, images, labels = _data(2)

    def saturated(x):
        return model(x) * 0 + torch.nn.functional.one_hot(model(x).argmax(1), 10) * 1e4

    attack = Apgd("ce", 5, 0.75, 1, 0)
    (one, _) = findings(saturated, images, saturated(images).argmax(1), attack, LINF)
    assert one.zero_gradients == 6
    with pytest.raises(AttackError, match="no gradient"):
        findings(torch.no_grad()(model), images, labels, attack, LINF)


def test_misclassified_clean_images_are_broken_without_attack():
    model, images, _ = _data(4)
    wrong = (model(images).argmax(1) + 1) % 10
    for f in findings(model, images, wrong, Apgd("ce", 5, 0.75, 1, 0), LINF):
        assert (f.broken, f.forwards, f.iteration) == (True, 0, -1)
    assert torch.equal(findings(model, images, wrong, Square(3, 0.8, 1), LINF)[0].adv, images[0])


def test_an_attack_that_leaves_the_ball_is_caught():
    @dataclass(frozen=True)
    class Cheat(Pgd):
        def start(self, rows, threat):
            return super().start(rows, Threat("linf", threat.eps * 2))

    model, images, labels = _data(4)
    with pytest.raises(AttackError, match="outside linf 5/255"):
        findings(model, images, labels, Cheat("ce", 6, "eps/2", 1, True), LINF, stop="last")


def test_a_success_that_the_canonical_pass_denies_goes_on():
    base, images, labels = _data(8)

    def model(x):
        # wrong wherever a gradient is taken, right in the canonical pass: nothing may count as broken
        bias = torch.nn.functional.one_hot(labels[0], 10) * (-1e3 if torch.is_grad_enabled() else 1e3)
        return base(x) + bias

    attack = Apgd("ce", 5, 0.75, 2, 0)
    found = findings(model, images, labels[:1].expand(8), attack, LINF)
    assert not any(f.broken for f in found)
    assert {f.forwards for f in found} == {12}


def test_parameters_never_receive_a_gradient():
    model, images, labels = _data(4)
    model.requires_grad_(True)
    try:
        for attack, stop in PLUGINS.values():
            findings(model, images, labels, attack, _home(attack), stop=stop)
        ascend(lambda x: model(x).logsumexp(1), images, LINF, steps=2, step_size=0.01)
        assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        model.requires_grad_(False)


@norms
def test_ascent_stays_inside_raises_the_objective_and_is_the_attacks_kernel(threat):
    model, images, labels = _data(8)

    def objective(x):
        return torch.nn.functional.cross_entropy(model(x), labels, reduction="none")

    names = [f"0/blobs/test/{i}/s/-1/0" for i in range(8)]
    start = geometry.uniform_start(images, threat, Keyed(tuple(names)))
    size = float(threat.eps) / 4
    adv = ascend(objective, images, threat, steps=5, step_size=size, start=start)
    assert geometry.excess(adv, images, threat).max() <= geometry.slack(threat)
    assert (objective(adv) > objective(images)).all()
    assert not adv.requires_grad
    found = findings(model, images, labels, Pgd("ce", 5, "eps/4", 1, True), threat, stop="last")
    for i, f in enumerate(found):
        if f.forwards:
            assert torch.allclose(f.adv, adv[i], atol=1e-6)
    with pytest.raises(AttackError, match="not finite"):
        ascend(lambda x: x.flatten(1).sum(1) * torch.nan, images, threat, steps=1, step_size=size)


def test_chains_are_read_and_autoattack_begins_with_aa2():
    chain = {name: reader.read("attacks", name, AttackCard) for name in reader.names("attacks")}
    assert {"pgd20", "pgd100", "aa2", "autoattack", "fare", "plus", "rand", "custom"} <= set(chain)
    assert [s.name for s in chain["autoattack"].stage] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert chain["autoattack"].stage[:2] == chain["aa2"].stage
    assert chain["pgd20"].stop == "last"
    for card in chain.values():
        assert card.rows == 16
        for stage in card.stage:
            plugin = plugins.build("attacks", stage.attack, stage.fields, card.name)
            assert set(vars(plugin)) == set(stage.fields), "every number is written out"
