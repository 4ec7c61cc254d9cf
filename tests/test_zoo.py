"""No honest model of the zoo is suspected, and no broken one is believed: see `model_zoo`.

A broken model is found out if a check of it fails, if the attack refuses it with a message, or if the count
of robust images is not above the true one.
"""

import warnings
from fractions import Fraction

import model_zoo
import pytest
import torch
import toys

import robustbench_vlm
from robustbench_vlm.errors import AttackError
from robustbench_vlm.threat import Threat

TOLERANCE = 1  # image of 40 by which two attacks of about equal strength may differ

APGD = {"attack": "apgd", "steps": 20, "rho": 0.75, "restarts": 1}
FAB = {"attack": "fab", "steps": 5, "restarts": 1, "alpha_max": 0.1, "eta": 1.05, "beta": 0.9}
STAGES = [
    {"name": "apgd-ce", **APGD, "loss": "ce", "targets": 0},
    {"name": "apgd-t", **APGD, "loss": "targeted-dlr", "targets": 4},
    {"name": "fab-t", **FAB, "targets": 4},
    {"name": "square", "attack": "square", "queries": 60, "p": 0.8, "restarts": 1},
]

BY_AA2 = (
    *("plain", "adversarial", "batch norm", "cosine", "transformer", "max pooling", "two classes"),
    *("logits x 100", "logits + 10000", "bf16", "rounding", "half of the columns detached", "k-WTA"),
    *("images detached off the grid", "gradient mirrored x 1e-4", "gradient is noise, logits + 10000"),
    *("remembers images", "gradient is noise from the twelfth backward on"),
)
"""Those that are given to `aa2` too."""


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A chain of AutoAttack's four attacks with few steps."""
    path = tmp_path_factory.mktemp("chain") / "short.toml"
    path.write_text(
        toys.toml({"name": "short", "title": "Short", "rows": 64, "stop": "first", "stage": STAGES})
    )
    return str(path)


def attacked(case, chain):
    images, labels = case.data
    ball = Threat("linf", Fraction(case.eps).limit_denominator(255))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # that a check failed
        torch.manual_seed(0)
        return robustbench_vlm.attack(case.make(), images, labels, ball, chain=chain)


def cases(zoo, chain):
    for name in zoo:
        if chain == "short" or name in BY_AA2:
            yield pytest.param(name, chain, id=f"{name}-{chain}")


@pytest.mark.parametrize(
    ("name", "chain"), [case for chain in ("short", "aa2") for case in cases(model_zoo.HONEST, chain)]
)
def test_an_honest_model_is_not_suspected_and_gets_its_true_count(name, chain, short):
    case = model_zoo.HONEST[name]
    truth = case.truth()
    assert 0.2 * model_zoo.N <= truth <= 0.8 * model_zoo.N
    found = attacked(case, short if chain == "short" else chain)
    assert found.checks.failed == []
    robust = list(found.robust.values())[-1]
    assert abs(robust - truth) <= TOLERANCE
    images, labels = case.data
    lost = found.verdicts.clean_correct & (found.verdicts.broken_by != "")
    wrong = case.judge()(found.images.clone()).argmax(1) != labels
    assert wrong[torch.tensor(lost.to_numpy())].all()
    assert float((found.images - images).abs().max()) <= case.eps + 1e-6


@pytest.mark.parametrize(
    ("name", "chain"), [case for chain in ("short", "aa2") for case in cases(model_zoo.BROKEN, chain)]
)
def test_a_broken_model_is_found_out(name, chain, short):
    case = model_zoo.BROKEN[name]
    truth = case.truth()
    refusal = None
    try:
        found = attacked(case, short if chain == "short" else chain)
    except AttackError as error:
        refusal = str(error)
    if refusal is not None:  # a model that cannot be attacked is found out as well
        assert "\n" not in refusal
        return
    robust = list(found.robust.values())[-1]
    assert found.checks.failed or robust <= truth + TOLERANCE, (robust, truth)


BEFORE = {
    "nothing": (lambda x: x, ()),
    "clamping": (lambda x: x.clamp(0, 1), ()),
    "averaging neighbours": (lambda x: 0.5 * x + 0.5 * model_zoo.blurred(x), ()),
    "bf16": (lambda x: x.bfloat16().float(), ()),
    "rounding": (model_zoo.rounded, ("zero-gradient", "no-progress")),
    "detached images off the grid": (
        lambda x: model_zoo.grid_gap(x).flatten(1).any(1)[:, None, None, None] * (x.detach() - x) + x,
        ("gradient-mismatch",),
    ),
    "mirrored gradients, scaled": (
        lambda x: model_zoo._Backward.apply(x, model_zoo.scaled(model_zoo.mirrored, 1e-4)),
        ("gradient-mismatch",),
    ),
    "noise keyed by content": (
        lambda x: x + 0.01 * torch.sin(1e6 * x.detach().sum((1, 2, 3), keepdim=True)) * x.detach().sign(),
        ("gradient-mismatch",),
    ),
    "detached blur": (lambda x: 0.5 * x + 0.5 * model_zoo.blurred(x).detach(), ("gradient-mismatch",)),
}
"""What is done to the images before a CLIP sees them, and flags that its result has to carry."""


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    card = toys.dataset_card()
    return toys.subject(card, toys.write(card, tmp_path_factory.mktemp("data")))


@pytest.mark.parametrize("name", BEFORE)
def test_an_evaluation_flags_the_broken_and_not_the_honest(name, subject, tmp_path):
    change, expected = BEFORE[name]
    order = toys.request(tmp_path, toys.chain("aa", "ce", "t", "fab", "square"), eps=("8/255",))
    ((_, content),) = toys.run(toys.changed(subject, change), order)
    flags = content["outcome"]["flags"]
    assert set(expected) <= set(flags)
    assert bool(flags) == bool(expected)
    failed = {check["name"] for check in content["checks"]["checks"] if check["level"] == "fail"}
    assert failed == set(flags)
    assert content["outcome"]["clean_correct"] > 0
