"""The reference mode against the reference itself: one seed, one batch, nothing fed; the same verdicts.

For APGD in Linf the images are equal bit for bit; L2 norms are summed in another order.
"""

import compare
import pytest
import theirs
from subjects import NAMES, ROWS, Subject, radius, subject

from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.attacks.fab import Fab
from robustbench_vlm.attacks.square import Square
from robustbench_vlm.backends import reference
from robustbench_vlm.engine.job import ImageBlock, Job, Model

pytestmark = pytest.mark.parity

N, STEPS, TARGETS, QUERIES = 16, 30, 3, 150
norms = pytest.mark.parametrize("norm", ["linf", "l2"])
models = pytest.mark.parametrize("name", NAMES)


def ours(who: Subject, stages, threat, seed=0):
    """What each image ended with."""
    found = {}
    job = Job(stages, threat, ROWS, who.n_classes, seed=seed)
    block = ImageBlock(who.images, who.labels, who.keys)
    reference.run(Model(who.model), job, block, lambda f: found.__setitem__(f.key, f))
    return [found[key] for key in who.keys]


def check(who, attack, run, threat, *, images=False, seed=0):
    found = compare.outcome(
        who, ours(who, [("s", attack)], threat, seed), theirs.run(run, who), images=images
    )
    assert found.flips == []
    assert found.mixed
    assert found.apart < 2e-3
    if images:
        assert found.equal == found.both
    return found


@models
@norms
@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted-dlr"])
def test_apgd_with_its_own_seed(name, norm, loss):
    who, threat = subject(name, N), radius(name, N, norm, 0.4)
    targets = TARGETS if loss == "targeted-dlr" else 0
    model = theirs.Watched(who.model)
    run = theirs.apgd(model, threat, loss, STEPS, targets, seed=0)
    check(who, Apgd(loss, STEPS, 0.75, 1, targets), run, threat, images=norm == "linf")


@norms
@pytest.mark.parametrize("seed", [0, 5])
def test_restarts_and_targets_draw_in_its_order(norm, seed):
    """The draws of a restart have the shape of what is still robust then."""
    who, threat = subject("trained", N), radius("trained", N, norm, 0.4)
    linf = norm == "linf"
    for attack, run in (
        (Apgd("ce", 6, 0.75, 3, 0), theirs.apgd(who.model, threat, "ce", 6, seed=seed, n_restarts=3)),
        (
            Apgd("targeted-dlr", 6, 0.75, 2, 3),
            theirs.apgd(who.model, threat, "", 6, 3, seed=seed, n_restarts=2),
        ),
    ):
        check(who, attack, run, threat, images=linf, seed=seed)
    fab = Fab(8, 3, 2, **compare.FAB)
    check(who, fab, theirs.fab(who.model, threat, 8, 3, seed=seed, n_restarts=2), threat, seed=seed)


@models
@norms
def test_targeted_fab(name, norm):
    who, threat = subject(name, N), radius(name, N, norm, 0.4)
    check(who, Fab(20, TARGETS, 1, **compare.FAB), theirs.fab(who.model, threat, 20, TARGETS), threat)


@norms
def test_untargeted_fab_with_restarts(norm):
    who, threat = subject("plain", N), radius("plain", N, norm, 0.4)
    run = theirs.fab(who.model, threat, 12, 0, seed=0, n_restarts=3)
    check(who, Fab(12, 0, 3, **compare.FAB), run, threat)


@models
@norms
def test_square_with_its_own_seed(name, norm):
    """At a radius at which random search breaks some."""
    who, small = subject(name, N), radius(name, N, norm, 0.0)
    threat = type(small)(norm, small.eps * {"plain": 2, "trained": 2, "clip": 1}[name])
    for seed in (0, 3):
        run = theirs.squares(who.model, threat, QUERIES, seed=seed)
        check(who, Square(QUERIES, 0.8, 1), run, threat, seed=seed)


@pytest.mark.parametrize(("name", "norm"), [("plain", "linf"), ("trained", "l2")])
def test_the_whole_chain_in_batches(name, norm):
    """Its runner repacks the survivors of every attack into batches; seeded again for each."""
    steps, queries = 8, 60
    who = subject(name, 40)
    threat = radius(name, 40, norm, 0.5)
    whole = theirs.chain(theirs.Watched(who.model), threat, "standard", 0, steps, queries)
    adv = whole.run_standard_evaluation(who.images.clone(), who.labels.clone(), batch_size=ROWS)[0].detach()
    found = compare.outcome(
        who, ours(who, compare.stages("autoattack", steps, queries), threat), adv, images=False
    )
    assert found.flips == []
    assert found.mixed
