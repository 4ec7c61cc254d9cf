"""The smaller attacks by hand, random models, few classes, and the chains that are data."""

import dataclasses
from fractions import Fraction

import pytest
import torch
from attack_models import blobs, classifier, findings

import robustbench_vlm
from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.attacks.apgd_eot import ApgdEot
from robustbench_vlm.attacks.fab import Fab
from robustbench_vlm.attacks.fgsm import Fgsm
from robustbench_vlm.attacks.mi_fgsm import MiFgsm
from robustbench_vlm.attacks.pgd import Pgd
from robustbench_vlm.attacks.square import Square
from robustbench_vlm.cards import plugins, reader
from robustbench_vlm.cards.attack import AttackCard
from robustbench_vlm.engine import scheduler, trajectories
from robustbench_vlm.engine.interface import Rows
from robustbench_vlm.engine.job import ImageBlock, Job, Model
from robustbench_vlm.engine.noise import Keyed
from robustbench_vlm.engine.oracle import Oracle
from robustbench_vlm.errors import InputError
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.threat import Threat

LINF, L2 = Threat("linf", Fraction(1, 10)), Threat("l2", Fraction(1, 2))
W = torch.tensor([[3.0, -4.0, 0.0] * 4]).reshape(1, 3, 2, 2)
GREY = torch.full((1, 3, 2, 2), 0.5)


def linear(x, weights=W):
    """Two classes; the margin falls along `weights`."""
    score = ((x - 0.5) * weights).flatten(1).sum(1) - 1
    return torch.stack([-score, score], dim=1)


def run(attack, threat, model=linear, steps=1, stop="last", images=GREY):
    """The state of one row after some steps."""
    n = len(images)
    labels = torch.zeros(n, dtype=torch.int64)
    state = attack.start(Rows(images, labels, labels - 1, Keyed(tuple("ab"[:n])), (0,) * n, stop), threat)
    for _ in range(steps):
        state = attack.step(state, Oracle(model))
    return state


def test_fgsm_is_one_signed_step_and_in_l2_one_along_the_unit_gradient():
    state = run(Fgsm("ce"), LINF)
    assert torch.allclose(state.adv, GREY + 0.1 * W.sign())
    assert bool(state.done)
    state = run(Fgsm("margin"), L2)
    # |W| = sqrt(4 * 25) = 10
    assert torch.allclose(state.adv, GREY + 0.5 * W / 10, atol=1e-6)
    dark = run(Fgsm("ce"), LINF, images=GREY * 0.1)
    assert torch.allclose(dark.adv, (0.05 + 0.1 * W.sign()).clamp(0, 1))


def test_pgd_in_l2_walks_straight_to_the_surface_of_a_linear_model():
    attack = Pgd("margin", 10, "eps/4", 1, random_start=False)
    for steps, length in ((1, 0.125), (3, 0.375), (4, 0.5), (10, 0.5)):
        state = run(attack, L2, steps=steps)
        assert torch.allclose(state.ahead, GREY + length * W / 10, atol=1e-6)


def turning(*gradients):
    """A model whose gradient is another one at each call."""
    left = list(gradients)

    def model(x):
        return linear(x, left.pop(0))

    return model


def test_mi_fgsm_adds_gradients_of_unit_mass_and_steps_along_the_sign_of_the_sum():
    one, two = torch.zeros_like(W), torch.zeros_like(W)
    one[0, 0, 0], two[0, 0, 0], two[0, 1, 0] = 2.0, -30.0, 10.0  # four masses of 1/2, ...
    attack = MiFgsm("margin", 3, "eps/10", 1.0)
    state = run(attack, LINF, turning(one, two), steps=2)
    # after one: 1/2 at two entries; after two: 1/2 - 3/8 there and 1/8 at two others
    sum_ = torch.zeros_like(W)
    sum_[0, 0, 0], sum_[0, 1, 0] = 1 / 2 - 3 / 8, 1 / 8
    assert torch.allclose(state.momentum, sum_, atol=1e-6)
    # so the second step goes on along the first, against its own gradient
    assert torch.allclose(state.ahead, GREY + 0.01 * (one.sign() + sum_.sign()), atol=1e-6)
    half = run(MiFgsm("margin", 3, "eps/10", 0.5), LINF, turning(one, two), steps=2)
    assert torch.equal(half.momentum[0, 0, 0].sign(), -one[0, 0, 0].sign())
    flat = run(MiFgsm("margin", 3, "eps/10", 1.0), L2, turning(one, two), steps=2)
    unit = one / one.norm() + sum_ / sum_.norm()
    assert torch.allclose(flat.ahead, GREY + 0.05 * unit, atol=1e-6)


def test_mi_fgsm_goes_on_along_its_momentum_where_the_gradient_is_zero_and_is_scale_free():
    zero = torch.zeros_like(W)
    state = run(MiFgsm("margin", 3, "eps/10", 1.0), LINF, turning(zero, W, zero), steps=3)
    assert torch.allclose(state.ahead, GREY + 0.02 * W.sign(), atol=1e-6)
    assert int(state.zero_gradients) == 2
    assert not bool(state.nonfinite)
    faint = run(MiFgsm("margin", 3, "eps/10", 1.0), LINF, turning(W * 1e-24, W, W), steps=1)
    assert torch.allclose(faint.momentum, W / W.abs().sum(), rtol=1e-4)


def test_wrong_fields_are_refused():
    for build, message in (
        (lambda: Fgsm("targeted-dlr"), "fgsm.loss"),
        (lambda: MiFgsm("ce", 0, "eps/10", 1.0), "at least 1 step"),
        (lambda: MiFgsm("ce", 5, "eps/10", 1.5), r"decay in \[0, 1\]"),
        (lambda: MiFgsm("ce", 5, "a lot", 1.0), "a lot"),
        (lambda: ApgdEot("ce", 5, 0.75, 1, 0, 0), "apgd-eot.eot"),
    ):
        with pytest.raises(InputError, match=message):
            build()


# --- random models -----------------------------------------------------------------------------------------


def drawn(gradients, values):
    """A model whose margin has these gradients and values, one after the other."""
    calls = list(zip(gradients, values, strict=True))

    def model(x):
        gradient, value = calls.pop(0)
        score = ((x - x.detach()) * gradient).flatten(1).sum(1) + value
        return torch.stack([torch.zeros_like(score), score], dim=1)

    return model


def test_a_gradient_is_the_mean_of_all_draws_and_the_last_one_decides():
    one, two = torch.zeros_like(W), torch.zeros_like(W)
    one[0, 0], two[0, 0], two[0, 1] = 1.0, -3.0, 5.0
    attack = ApgdEot("margin", 4, 0.75, 1, 0, eot=2)
    state = run(attack, LINF, drawn([one, two], [3.0, -2.0]), stop="first")
    assert torch.equal(state.gradient, (one + two) / 2)
    assert not bool(state.broken), "the first draw was wrong, the last one right"
    assert float(state.best_value) == -2
    state = run(attack, LINF, drawn([one, two], [-3.0, 2.0]), stop="first")
    assert bool(state.broken)
    assert (int(state.forwards), int(state.backwards), int(state.iteration)) == (2, 2, 1)
    sick = run(attack, LINF, drawn([one * torch.nan, two], [-3.0, -2.0]), stop="first")
    assert bool(sick.nonfinite), "of any draw"
    even = run(attack, LINF, drawn([one, -one], [-3.0, -2.0]), stop="first")
    assert int(even.zero_gradients) == 1


def test_on_a_model_that_is_not_random_the_mean_is_the_gradient():
    model, (images, labels) = classifier(10), blobs(12, 10, seed=1)
    threat = Threat("linf", Fraction(5, 255))
    plain = findings(model, images, labels, Apgd("ce", 8, 0.75, 1, 0), threat)
    mean = findings(model, images, labels, ApgdEot("ce", 8, 0.75, 1, 0, eot=4), threat)
    for a, b in zip(plain, mean, strict=True):
        assert torch.equal(a.adv, b.adv)
        assert (4 * a.forwards, 4 * a.backwards) == (b.forwards, b.backwards)
        assert (a.broken, a.iteration) == (b.broken, b.iteration)


def test_draws_are_no_business_of_other_stages():
    eot, plain = ApgdEot("ce", 8, 0.75, 1, 0, eot=4), Apgd("dlr", 8, 0.75, 1, 0)
    assert not plain.shares_rows(eot)
    assert not eot.shares_rows(plain)
    assert not eot.shares_rows(dataclasses.replace(eot, loss="dlr"))


# --- chains ------------------------------------------------------------------------------------------------

CHAINS = reader.names("attacks")


def chain(name, **short):
    """(stage, attack) of a chain with fewer steps, queries, draws and restarts."""
    card = reader.read("attacks", name, AttackCard)
    found = []
    for stage in card.stage:
        fields = {**stage.fields}
        if isinstance(fields.get("steps"), list):
            fields["steps"] = [2] * len(fields["steps"])
        elif "steps" in fields:
            fields["steps"] = short.get("steps", 2)
        fields |= {"queries": short.get("queries", 4)} if "queries" in fields else {}
        fields |= {"eot": 2} if "eot" in fields else {}
        fields |= {"restarts": 1} if "restarts" in fields else {}
        found.append((stage.name, plugins.build("attacks", stage.attack, fields, name)))
    return card, found


def attacked(model, images, labels, name, threat, n_classes, **short):
    """Findings of a chain by (key, stage)."""
    card, stages = chain(name, **short)
    left, found = list(range(len(images))), {}
    for group in trajectories.groups(stages):
        job = Job(group, threat, 8, n_classes, stop=card.stop)
        block = ImageBlock(images[left], labels[left], [str(i) for i in left])
        scheduler.run(
            Model(model),
            job,
            [block],
            lambda finding: found.__setitem__((finding.key, finding.stage), finding),
        )
        lost = {key for (key, _), finding in found.items() if finding.broken}
        left = [i for i in left if str(i) not in lost]
    return found


def wide(n_classes, n, seed=0, scale=1.0):
    """A linear model and images that it labels."""
    make = torch.Generator().manual_seed(seed)
    head = torch.randn(192, n_classes, generator=make)
    images = torch.rand(n, 3, 8, 8, generator=make)

    def model(x):
        return scale * ((x - 0.5).flatten(1) @ head)

    return model, images, model(images).argmax(1)


@pytest.mark.parametrize("n_classes", [2, 3, 4, 5, 8, 10, 1000])
@pytest.mark.parametrize("name", CHAINS)
def test_every_chain_runs_whatever_the_number_of_classes(name, n_classes):
    if n_classes == 1000 and name == "plus":
        name = "fare"  # untargeted FAB would take 999 gradients an iteration
    model, images, labels = wide(n_classes, 3)
    norm = "l1" if name.endswith("l1") else "linf"
    tiny = Threat(norm, Fraction(1, 2550000))
    found = attacked(model, images, labels, name, tiny, n_classes)
    assert len(found) == 3 * len(chain(name)[1])
    assert not any(finding.broken or finding.error for finding in found.values())


def test_what_stands_in_is_said_with_its_reason():
    def said(name, n_classes):
        card = reader.read("attacks", name, AttackCard)
        return {name: attack.substitutions(n_classes) for name, attack in Chain.of(card).stages}

    assert said("autoattack", 2) == {
        "apgd-ce": [],
        "apgd-t": [
            "targeted-dlr -> targeted-margin (undefined for 2 classes)",
            "targets 9 -> 1 (2 classes)",
        ],
        "fab-t": ["targets 9 -> 1 (2 classes)"],
        "square": [],
    }
    assert said("autoattack", 3)["apgd-t"][1] == "targets 9 -> 2 (3 classes)"
    assert said("autoattack", 4)["apgd-t"] == ["targets 9 -> 3 (4 classes)"]
    assert not any(said("autoattack", 10).values())
    assert said("rand", 2)["apgd-dlr"] == ["dlr -> margin (undefined for 2 classes)"]
    assert said("plus", 2)["apgd-dlr"] == ["dlr -> margin (undefined for 2 classes)"]
    assert said("autoattack-l1", 5)["apgd-t"] == ["targets 5 -> 4 (5 classes)"]
    assert said("fgsm", 2) == {"fgsm": []}


@pytest.mark.parametrize("name", ["autoattack", "aa2", "fare", "custom", "plus", "rand", "apgd-cw"])
def test_two_classes_and_logits_too_large_for_cross_entropy_do_not_save_a_model(name):
    """Where softmax is 1 to the last digit cross-entropy has no gradient; a margin in the chain has."""
    modest, images, labels = wide(2, 8, scale=1.0)
    model = wide(2, 8, scale=100.0)[0]
    threat, reachable = Threat("linf", Fraction(10, 255)), []
    logits = model(images)
    _, ce = chain("aa2", steps=20)[1][0]
    before = findings(modest, images, labels, ce, threat, rows=8)
    alone = findings(model, images, labels, ce, threat, rows=8)
    assert sum(f.zero_gradients > 0 for f in alone) > 4
    found = attacked(model, images, labels, name, threat, 2, steps=20)
    broken = {key for (key, _), finding in found.items() if finding.broken}
    # what a linear model can stand is known: the margin against eps times the L1 norm of its gradient
    slope = (model(torch.eye(192).reshape(192, 3, 8, 8)) - model(torch.zeros(1, 3, 8, 8))).diff(dim=1)
    for i in range(8):
        margin = float(logits[i].amax() - logits[i].amin())
        reachable += [str(i)] if margin < float(threat.eps) * float(slope.abs().sum()) * 0.9 else []
    assert len(reachable) >= 4
    assert set(reachable) <= {f.key.rsplit("/")[-1] for f in before if f.broken}
    assert sum(f.broken for f in alone) < len(reachable) / 2, "a hundred times larger, and nearly all stand"
    assert set(reachable) <= broken
    assert len(broken) < 8


def test_a_norm_that_a_chain_cannot_do_names_the_chains_that_can():
    model, images, labels = wide(4, 2)
    wanted = r"stage apgd-ce: norm 'l1'; expected linf or l2; chains for l1: autoattack-l1"
    with pytest.raises(InputError, match=wanted):
        robustbench_vlm.attack(model, images, labels, Threat("l1", Fraction(1)))
    with pytest.raises(InputError, match=r"norm 'linf'; expected l1; chains for linf: aa2, apgd-cw, autoatt"):
        robustbench_vlm.attack(model, images, labels, "4/255", chain="autoattack-l1")


def test_l1_goes_all_the_way_from_pixels_to_a_table():
    model, images, labels = classifier(10), *blobs(12, 10, seed=1)
    found = robustbench_vlm.attack(
        model, images, labels, Threat("l1", Fraction(1)), chain="autoattack-l1", batch_size=12
    )
    table = found.verdicts
    assert list(found.robust) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert 0 < found.robust["square"] < 12
    lengths = (found.images.double() - images.double()).abs().flatten(1).sum(1)
    assert (lengths <= 1 + 1e-5).all()
    assert table.distance.to_numpy() == pytest.approx(lengths.numpy(), rel=1e-6)


def test_the_names_of_the_literature_are_the_same_cards():
    assert reader.read("attacks", "standard", AttackCard) == reader.read("attacks", "autoattack", AttackCard)
    for file, name in reader.SAME.items():
        assert file not in {("attacks", known) for known in reader.names("attacks")}
        assert name in reader.names("attacks")


def test_chains_are_those_of_the_released_code():
    def stages(name):
        card = reader.read("attacks", name, AttackCard)
        return dict(Chain.of(card).stages)

    fab = {"alpha_max": 0.1, "eta": 1.05, "beta": 0.9}
    plus = stages("plus")
    assert list(plus) == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert plus["fab"] == Fab(steps=100, targets=0, restarts=5, **fab)
    assert plus["fab-t"] == Fab(steps=100, targets=9, restarts=1, **fab)
    assert plus["apgd-dlr"] == Apgd("dlr", 100, 0.75, 5, 0)
    assert plus["apgd-t"] == Apgd("targeted-dlr", 100, 0.75, 1, 9)
    assert stages("rand")["apgd-dlr"] == ApgdEot("dlr", 100, 0.75, 1, 0, eot=20)
    assert stages("custom")["apgd-ce"] == Apgd("ce", 100, 0.75, 5, 0)
    l1 = stages("autoattack-l1")
    assert (l1["apgd-ce"].restarts, l1["apgd-t"].restarts, l1["apgd-t"].targets) == (5, 1, 5)
    assert l1["apgd-ce"].steps == l1["apgd-t"].steps == (30, 30, 40)
    assert l1["square"] == Square(5000, 0.8, 1)
    assert stages("mi-fgsm")["mi-fgsm"] == MiFgsm("ce", 10, "eps/10", 1.0)
    # what each costs an image that survives, with ten classes: forwards, gradients
    costs = {name: [a.cost(10) for a in stages(name).values()] for name in ("plus", "rand", "autoattack-l1")}
    assert costs["rand"] == [(2020, 2020)] * 2
    assert costs["autoattack-l1"] == [(515, 515), (515, 515), (1800, 900), (5001, 0)]
    assert costs["plus"] == [(505, 505)] * 2 + [(1000, 4500), (5001, 0), (909, 909), (1800, 900)]
