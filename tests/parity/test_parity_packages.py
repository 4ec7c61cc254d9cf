"""The packages as engines: their own attacks through our interface, and their verdicts beside ours."""

import pytest
import torch
from attack_models import blobs, classifier
from subjects import radius, subject
from toys import toml

import robustbench_vlm
from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.attacks.apgd_eot import ApgdEot
from robustbench_vlm.attacks.apgd_l1 import ApgdL1
from robustbench_vlm.attacks.fab import Fab
from robustbench_vlm.attacks.fgsm import Fgsm
from robustbench_vlm.attacks.mi_fgsm import MiFgsm
from robustbench_vlm.attacks.pgd import Pgd
from robustbench_vlm.attacks.square import Square
from robustbench_vlm.backends.backend import Backend
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.engine.job import ImageBlock, Job, Model

pytestmark = pytest.mark.parity

N, ROWS = 16, 16
PULL = {"alpha_max": 0.1, "eta": 1.05, "beta": 0.9}
ATTACKS = {
    "ce": Apgd("ce", 20, 0.75, 2, 0),
    "dlr": Apgd("dlr", 20, 0.75, 1, 0),
    "t": Apgd("targeted-dlr", 20, 0.75, 1, 3),
    "fab-t": Fab(12, 3, 1, **PULL),
    "fab": Fab(8, 0, 2, **PULL),
    "square": Square(120, 0.8, 1),
}


def run(way, who, attack, threat, stop="first"):
    found = {}
    before = torch.get_rng_state()
    job = Job([("s", attack)], threat, ROWS, who.n_classes, stop=stop)
    block = ImageBlock(who.images, who.labels, who.keys)
    cost = way.run(Model(who.model), job, [block], lambda f: found.__setitem__(f.key, f))
    assert torch.equal(torch.get_rng_state(), before)
    return [found[key] for key in who.keys], cost


def flips(one, other):
    return sum(a.broken != b.broken for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_of_both_packages_agrees_with_ours(name, norm):
    who, threat = subject("plain", N), radius("plain", N, norm, 0.4)
    if name == "square":
        threat = type(threat)(norm, threat.eps * 4)
    native, _ = run(Backend(), who, ATTACKS[name], threat)
    reference, spent = run(Backend(mode="reference"), who, ATTACKS[name], threat)
    theirs, took = run(Backend("autoattack"), who, ATTACKS[name], threat)
    others, _ = run(Backend("torchattacks"), who, ATTACKS[name], threat)
    assert 0 < sum(f.broken for f in theirs) < N
    assert flips(reference, theirs) == 0
    if name != "square":  # of which test_parity_chain looks at the spread over seeds
        assert flips(native, theirs) == 0, "with noise of each side's own"
    if (name, norm) == ("square", "l2"):
        assert flips(others, theirs) <= 2, "it measures its windows otherwise"
    else:
        assert flips(others, theirs) == 0
    assert took.gradients >= spent.gradients, "the reference repeats what we keep"


def test_pgd_of_torchattacks_judges_the_last_iterate():
    for norm in ("linf", "l2"):
        who, threat = subject("trained", N), radius("trained", N, norm, 0.4)
        for attack in (Pgd("ce", 20, "eps/4", 1, True), Pgd("ce", 10, "eps/4", 1, False)):
            native, _ = run(Backend(), who, attack, threat, "last")
            found, cost = run(Backend("torchattacks"), who, attack, threat, "last")
            assert 0 < sum(f.broken for f in found) < N
            assert flips(native, found) <= 1
            assert cost.gradients == attack.steps


def test_fgsm_and_its_momentum():
    who, threat = subject("trained", N), radius("trained", N, "linf", 0.4)
    for attack, stop in ((Fgsm("ce"), "first"), (MiFgsm("ce", 10, "eps/4", 1.0), "last")):
        native, _ = run(Backend(), who, attack, threat, stop)
        found, _ = run(Backend("torchattacks"), who, attack, threat, stop)
        assert 0 < sum(f.broken for f in found) < N
        assert flips(native, found) == 0


def test_l1_and_mean_gradients():
    who, threat = subject("plain", N), radius("plain", N, "l1", 0.4)
    sparse = ApgdL1("ce", (9, 9, 12), (3.0, 2.0, 1.0), 2, 0)
    for attack in (sparse, ApgdL1("targeted-dlr", (30,), (1.0,), 1, 3), Fab(12, 3, 1, **PULL)):
        native, _ = run(Backend(), who, attack, threat)
        found, cost = run(Backend("autoattack"), who, attack, threat)
        assert 0 < sum(f.broken for f in found) < N
        assert flips(native, found) <= 1
        if attack is sparse:
            assert cost.gradients == 2 * (30 + 3)  # restarts; three starts are evaluated

    who, threat = subject("plain", N), radius("plain", N, "linf", 0.4)
    mean = ApgdEot("ce", 10, 0.75, 1, 0, eot=3)
    native, _ = run(Backend(), who, mean, threat)
    for engine in ("autoattack", "torchattacks"):
        found, cost = run(Backend(engine), who, mean, threat)
        assert flips(native, found) == 0
        assert cost.gradients == 3 * 11


def test_two_classes():
    model, (images, labels) = classifier(2), blobs(N, 2, seed=1)
    right = model(images).argmax(1) == labels
    images, labels = images[right], labels[right]
    keys = [str(i) for i in range(len(images))]
    threat = radius("plain", N, "linf", 0.4)
    threat = type(threat)("linf", threat.eps * 2)
    for attack in (ATTACKS["ce"], ATTACKS["fab-t"]):
        sides = []
        for way in (Backend(), Backend("autoattack"), Backend("torchattacks")):
            found = {}
            way.run(
                Model(model), Job([("s", attack)], threat, ROWS, 2), [ImageBlock(images, labels, keys)],
                lambda f, found=found: found.__setitem__(f.key, f.broken),
            )  # fmt: skip
            sides.append([found[key] for key in keys])
        assert sides[0] == sides[1] == sides[2]
        assert any(sides[0])


@pytest.fixture
def chain(tmp_path):
    short = {"steps": 12, "queries": 60, "targets": 3}
    stages = [
        {
            "name": stage.name,
            "attack": stage.attack,
            **{k: short.get(k, v) if v else v for k, v in stage.fields.items()},
        }
        for stage in reader.read("attacks", "autoattack", AttackCard).stage
    ]
    path = tmp_path / "short.toml"
    path.write_text(toml({"name": "short", "title": "Short", "rows": 16, "stop": "first", "stage": stages}))
    return str(path)


def test_the_python_interface_takes_an_engine(chain):
    model = classifier()
    images, _ = blobs(24, 10, seed=1)
    labels = model(images).argmax(1)
    ways = {
        "native/3": {},
        "native-reference/1": {"mode": "reference"},
        "autoattack/pyautoattack-": {"engine": "autoattack"},
        "torchattacks/torchattacks-": {"engine": "torchattacks"},
    }
    broken = {}
    for name, more in ways.items():
        found = robustbench_vlm.attack(model, images, labels, "5/255", chain=chain, **more)
        assert found.engine.startswith(name)
        assert found.precision == "fp32"
        broken[name] = (found.verdicts.broken_by != "").tolist()
        assert (model(found.images).argmax(1) != labels).tolist() == broken[name]
        assert found.robust["square"] == 24 - sum(broken[name])
    native, *others = broken.values()
    assert 3 <= sum(native) <= 21
    for other in others:
        assert sum(a != b for a, b in zip(native, other, strict=True)) <= 1
    assert broken["native-reference/1"] == broken["autoattack/pyautoattack-"]
