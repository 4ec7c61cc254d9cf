"""No honest model of the zoo is suspected, and no broken one is believed: see `model_zoo`.

A broken model is found out if a check of it fails, if the attack refuses it with a message, or if the count
of robust images is not above the true one.
"""

import copy
import dataclasses
import json
import warnings
from fractions import Fraction
from functools import cache

import model_zoo
import pytest
import torch
import toys
from command_line import run_command

import robustbench_vlm
from robustbench_vlm.errors import AttackError
from robustbench_vlm.models import zoo
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


@cache
def truth_of(name):
    """The true robust count of a model, which several chains are compared with."""
    return (model_zoo.HONEST | model_zoo.BROKEN)[name].truth()


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
    truth = truth_of(name)
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
    truth = truth_of(name)
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
def home(tmp_path_factory):
    """Data of a random model's own labels, and cards of a suite and of a short AutoAttack."""
    root = tmp_path_factory.mktemp("home")
    card = toys.dataset_card()
    toys.write(card, root / "data")
    toys.write_include(root / "cards", [card], [toys.chain("aa", "ce", "t", "fab", "square")])
    return root


def with_change(change):
    """The random model of `toys`, as it is loaded, with something done to its images first."""
    model = copy.copy(toys.model())
    model.forward = lambda images: toys.model()(change(images))
    return dataclasses.replace(toys.loaded(), model=model)


@pytest.mark.parametrize("name", BEFORE)
def test_the_command_flags_the_broken_and_not_the_honest(name, home, tmp_path, monkeypatch, capsys):
    """`vlmrob eval --strict` as it is typed; only what a model's name loads is put in its place."""
    change, expected = BEFORE[name]
    monkeypatch.setattr(zoo, "load", lambda *_: with_change(change))
    monkeypatch.chdir(tmp_path)
    line = f"--include {home}/cards eval --model tiny --attack aa --suite toys --data-root {home}/data"
    code = run_command(
        monkeypatch, *line.split(), *["--eps", "8", "--n", "0", "--device", "cpu", "--strict", "--json"]
    )
    out, err = capsys.readouterr()
    flags = {flag for row in json.loads(out) for flag in row["flag"].split(";") if flag}
    assert set(expected) <= flags
    assert bool(flags) == bool(expected)
    assert code == (3 if expected else 0), err
    told = {line for line in err.splitlines() if line.startswith("flag: ")}
    assert told == ({f"flag: random0 on toy: {';'.join(sorted(flags))}"} if flags else set())
    (path,) = tmp_path.rglob("results/cells/**/*.json")
    content = json.loads(path.read_text())
    failed = {check["name"] for check in content["checks"]["checks"] if check["level"] == "fail"}
    assert failed == flags
    assert content["outcome"]["clean_correct"] > 0


def test_the_zoo_is_as_large_as_it_is_said_to_be():
    assert len(model_zoo.HONEST) >= 20
    assert len(model_zoo.BROKEN) >= 30
