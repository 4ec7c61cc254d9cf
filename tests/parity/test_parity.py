"""The native attacks against the reference implementation, image by image.

Both sides see the model through the same fixed shape, and the reference's random draws are answered with our
named noise: what differs then is the algorithm, and nothing may.
"""

from fractions import Fraction

import pytest
import torch
from attack_models import blobs, classifier, findings

from robustbench_vlm import rng
from robustbench_vlm.attacks import external
from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.attacks.fab import Fab
from robustbench_vlm.attacks.square import Square
from robustbench_vlm.threat import Threat

reference = pytest.importorskip("pyautoattack")

pytestmark = pytest.mark.parity

ROWS = 16
SIDE = 16  # the reference's L2 Square fails where a fifth of the side fits more than five times, as at 12
THREATS = {"Linf": Threat("linf", Fraction(4, 255)), "L2": Threat("l2", Fraction(3, 10))}
norms = pytest.mark.parametrize("norm", THREATS)


def _data(n):
    model = classifier(10, SIDE)
    images, labels = blobs(n, 10, seed=2, side=SIDE)
    right = model(images).argmax(1) == labels
    return model, images[right], labels[right]


def _padded(model):
    """The model in our fixed shape, for callers with any number of rows."""

    def classify(images):
        found = []
        for chunk in torch.split(images, ROWS):
            filler = chunk[:1].expand(ROWS - len(chunk), *chunk.shape[1:])
            found.append(model(torch.cat([chunk, filler]))[: len(chunk)])
        return torch.cat(found)

    return classify


def _wrong(model, images, labels):
    return (_padded(model)(images).argmax(1) != labels).tolist()


def _feed(monkeypatch, names):
    """Answer the reference's draws, one image each, with the noise of these names."""
    feed = iter(names)

    def answer(draw):
        def drawn(*shape, **_):
            size = tuple(shape[0]) if isinstance(shape[0], (tuple, list)) else shape
            return torch.from_numpy(draw(next(feed), size[1:]))[None]

        return drawn

    monkeypatch.setattr(torch, "rand", answer(rng.uniform))
    monkeypatch.setattr(torch, "randn", answer(rng.normal))


@norms
@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted-dlr"])
def test_apgd_walks_the_same_iterates_from_the_same_start(norm, loss, monkeypatch):
    steps, threat = 50, THREATS[norm]
    model, images, labels = _data(16 if "targeted" in loss else 32)
    targets = 3 if "targeted" in loss else 0
    attack = Apgd(loss, steps, 0.75, 1, targets)
    first = findings(model, images, labels, attack, threat, rows=ROWS)
    last = findings(model, images, labels, attack, threat, rows=ROWS, stop="last")

    common = {"n_iter": steps, "norm": norm, "eps": float(threat.eps), "device": "cpu"}
    bits, verdicts = 0, []
    for i in range(len(images)):
        ranked = [
            k for k in model(images[i : i + 1]).argsort(dim=1, descending=True)[0].tolist() if k != labels[i]
        ]
        names = [f"0/{first[i].key}/s/{k}/0" for k in (ranked[:targets] or [-1])]
        with monkeypatch.context() as patch:
            _feed(patch, names)
            if targets:
                run = reference.autopgd_base.APGDAttack_targeted(
                    _padded(model), n_target_classes=targets, **common
                )
            else:
                run = reference.autopgd_base.APGDAttack(_padded(model), loss=loss, **common)
            adv = run.perturb(images[i : i + 1].clone(), labels[i : i + 1].clone())
        verdicts += _wrong(model, adv, labels[i : i + 1])
        if verdicts[-1]:
            bits += bool(torch.equal(adv[0], last[i].adv))
            assert (adv[0] - last[i].adv).abs().max() < 1e-2
    assert verdicts == [f.broken for f in first] == [f.broken for f in last]
    assert any(verdicts)
    assert not all(verdicts)
    if norm == "Linf":
        assert bits == sum(verdicts), "every returned image is equal bit for bit"


@norms
def test_fab_gives_the_same_verdicts(norm):
    threat = THREATS[norm]
    model, images, labels = _data(32)
    found = findings(model, images, labels, Fab(25, 9, 1, 0.1, 1.05, 0.9), threat, rows=ROWS)
    run = reference.fab_pt.FABAttack_PT(
        _padded(model), norm=norm, n_iter=25, eps=float(threat.eps), targeted=True, device="cpu"
    )
    verdicts = _wrong(model, run.perturb(images.clone(), labels.clone()), labels)
    assert verdicts == [f.broken for f in found]
    assert any(verdicts)
    assert not all(verdicts)


@norms
def test_square_is_within_the_spread_of_seeds(norm):
    threat = THREATS[norm]
    model, images, labels = _data(40)
    ours, theirs = [], []
    for seed in range(3):
        found = findings(model, images, labels, Square(300, 0.8, 1), threat, rows=ROWS, seed=seed)
        ours.append(sum(f.broken for f in found))
        run = reference.square.SquareAttack(
            _padded(model), norm=norm, n_queries=300, eps=float(threat.eps), p_init=0.8, resc_schedule=False,
            seed=seed, device="cpu",
        )  # fmt: skip
        theirs.append(sum(_wrong(model, run.perturb(images.clone(), labels.clone()), labels)))
    assert min(theirs) - 1 <= sum(ours) / 3 <= max(theirs) + 1, (ours, theirs)
    assert 0 < sum(ours) < 3 * len(images)


def test_aa2_agrees_whatever_the_noise():
    """Own noise on both sides: verdicts of the chain are at most one image apart."""
    threat = THREATS["Linf"]
    model, images, labels = _data(24)
    common = {"norm": "Linf", "eps": float(threat.eps), "device": "cpu"}
    adv = images.clone()
    for run in (
        reference.autopgd_base.APGDAttack(_padded(model), n_iter=30, **common),
        reference.autopgd_base.APGDAttack_targeted(_padded(model), n_iter=20, **common),
    ):
        left = ~torch.tensor(_wrong(model, adv, labels))
        adv[left] = run.perturb(images[left].clone(), labels[left].clone())
    theirs = _wrong(model, adv, labels)
    ce = findings(model, images, labels, Apgd("ce", 30, 0.75, 1, 0), threat, rows=ROWS)
    dlr = findings(model, images, labels, Apgd("targeted-dlr", 20, 0.75, 1, 9), threat, rows=ROWS)
    ours = [a.broken or b.broken for a, b in zip(ce, dlr, strict=True)]
    assert sum(a != b for a, b in zip(ours, theirs, strict=True)) <= 1


def test_the_package_is_an_engine_of_ours():
    """Its standard chain on images that its first attack breaks, through the same findings."""
    threat = Threat("linf", Fraction(24, 255))
    model, images, labels = _data(4)
    found, keys = [], list("abcd")
    more = {"version": "standard", "seed": 0, "rows": ROWS, "on_finding": found.append}
    external.run(model, images, labels, keys, threat, **more)
    assert [f.key for f in found] == keys
    assert all(f.broken and f.margin < 0 for f in found)
