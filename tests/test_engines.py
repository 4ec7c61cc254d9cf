"""Who attacks: what goes together, what a package is asked for, and what it cannot reach or hide."""

import random
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from attack_models import blobs, classifier
from torch import nn

from robustbench_vlm.attacks.apgd import Apgd
from robustbench_vlm.attacks.apgd_eot import ApgdEot
from robustbench_vlm.attacks.apgd_l1 import ApgdL1
from robustbench_vlm.attacks.fab import Fab
from robustbench_vlm.attacks.fgsm import Fgsm
from robustbench_vlm.attacks.mi_fgsm import MiFgsm
from robustbench_vlm.attacks.pgd import Pgd
from robustbench_vlm.attacks.square import Square
from robustbench_vlm.backends import autoattack, packages, torchattacks
from robustbench_vlm.backends.backend import Backend, installed_packages
from robustbench_vlm.backends.packages import PackageCall, PackageStage
from robustbench_vlm.engine import canonical
from robustbench_vlm.engine.attacked_view import Precision
from robustbench_vlm.engine.job import ImageBlock, Job, Model
from robustbench_vlm.errors import AttackError, InputError
from robustbench_vlm.threat import Threat

LINF, L2, L1 = (Threat(norm, Fraction(eps)) for norm, eps in (("linf", "5/255"), ("l2", "0.4"), ("l1", "4")))
ROWS = 16
CE, DLR, AIMED = Apgd("ce", 6, 0.75, 1, 0), Apgd("dlr", 6, 0.7, 2, 0), Apgd("targeted-dlr", 6, 0.75, 1, 3)
FAB, SQUARE = Fab(5, 3, 1, 0.1, 1.05, 0.9), Square(20, 0.8, 1)
SPARSE = ApgdL1("ce", (3, 3, 4), (3.0, 2.0, 1.0), 5, 0)
PGD = Pgd("ce", 5, "eps/4", 1, True)
CHAIN = [("ce", CE), ("t", AIMED), ("fab", FAB), ("square", SQUARE)]


def data(n=40):
    model = classifier()
    images, labels = blobs(n, 10, seed=1)
    right = canonical.logits(model, images, ROWS).argmax(1) == labels
    return model, images[right], labels[right]


def run(way, model, images, labels, stages=CHAIN, threat=LINF, **more):
    """The last finding of every image, in order, and the cost."""
    found, keys = {}, [f"i{i}" for i in range(len(images))]
    clean = canonical.logits(model, images, ROWS) if len(images) else torch.empty(0, 10)
    block = ImageBlock(images, labels, keys, clean)
    job = Job(stages, threat, ROWS, 10, **more)
    cost = way.run_chain(Model(model), job, block, lambda f: found.__setitem__(f.key, f))
    return [found[key] for key in keys], cost


def generators():
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


# --- what goes together ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "torchatacks"}, "--engine torchatacks: no such engine; did you mean 'torchattacks'"),
        ({"mode": "slow"}, "--mode slow: no such mode; known: fast, reference"),
        ({"name": "torchattacks", "mode": "reference"}, "a mode of the native engine, with --engine torch"),
        ({"mode": "reference", "precision": Precision("bf16")}, "--mode reference: bf16-find"),
        ({"mode": "reference", "precision": Precision(graphs=True)}, "--mode reference"),
        (
            {"name": "autoattack", "precision": Precision(compiled=True)},
            "leave --compile and --cuda-graphs out",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(fields, message):
    with pytest.raises(InputError, match=message) as caught:
        Backend(**fields)
    assert "\n" not in str(caught.value)


def test_every_way_to_attack_has_a_name_of_its_own(monkeypatch):
    monkeypatch.setattr(autoattack, "NAMES", ("torch",))  # any installed package
    monkeypatch.setattr(torchattacks, "NAMES", ("numpy",))
    ways = [Backend(), Backend(mode="reference"), Backend("autoattack"), Backend("torchattacks")]
    assert len({way.label for way in ways}) == 4
    assert ways[0].label == "native/3"
    assert ways[3].label == f"torchattacks/numpy-{np.__version__}/1"
    assert [way.keyed for way in ways] == [True, False, False, False]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (autoattack, r"--engine autoattack: not installed; pip install 'robustbench-vlm\[autoattack\]'"),
        (torchattacks, r"pip install --no-deps torchattacks \(its wheel also carries files of .*robustbench"),
    ],
)
def test_a_missing_package_says_how_to_install_it(module, message, monkeypatch):
    monkeypatch.setattr(module, "NAMES", ("no_such_package",))
    with pytest.raises(InputError, match=message):
        module.package()
    assert installed_packages()[module.__name__.rsplit(".", 1)[-1]] == ("", module.INSTALL)


def test_a_package_that_lacks_a_module_says_which(tmp_path, monkeypatch):
    (tmp_path / "half_a_package.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="package half_a_package: it needs not_there_at_all; pip install"):
        packages.load("half_a_package")


def test_what_is_left_is_run_alone_or_in_the_batches_that_it_was_in():
    members, left = list(range(10)), {1, 2, 9}
    assert Backend().batches(members, left, 4) == [1, 2, 9]
    assert Backend(mode="reference").batches(members, left, 4) == [0, 1, 2, 3, 8, 9]
    assert Backend(mode="reference").batches(members, {}, 4) == []


# --- the reference mode ------------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
def test_reference_mode_gives_findings_and_leaves_generators_alone(threat):
    model, images, labels = data()
    before = generators()
    found, cost = run(Backend(mode="reference"), model, images, labels, threat=threat)
    assert generators() == before
    broken = [f.broken for f in found]
    assert 3 <= sum(broken) <= len(broken) - 3
    adv = torch.stack([f.adv for f in found])
    assert (canonical.logits(model, adv, ROWS).argmax(1) != labels).tolist() == broken
    assert all(torch.equal(f.adv, images[i]) for i, f in enumerate(found) if not f.broken)
    assert all(f.stage == "square" for f in found if not f.broken)
    assert cost.gradients > 0
    assert cost.forwards > 0
    fast, _ = run(Backend(), model, images, labels, threat=threat)
    assert sum(a.broken != b.broken for a, b in zip(fast, found, strict=True)) <= 1


def test_reference_mode_is_a_function_of_seed_and_batch():
    model, images, labels = data()
    reference = Backend(mode="reference")

    def advs(seed=0, cut=None):
        found, _ = run(reference, model, images[:cut], labels[:cut], [("ce", CE)], seed=seed)
        return torch.stack([f.adv for f in found])

    assert torch.equal(advs(), advs())
    assert torch.equal(advs(cut=ROWS), advs()[:ROWS]), "batches do not know of each other"
    assert not torch.equal(advs(seed=1), advs())


def test_l2_square_in_reference_mode_searches():
    model, images, labels = data()
    found, _ = run(
        Backend(mode="reference"),
        model,
        images,
        labels,
        [("s", Square(150, 0.8, 1))],
        Threat("l2", Fraction(3)),
    )
    assert sum(f.broken for f in found) >= 3
    assert any(f.broken and f.iteration > 0 for f in found), "not by the start alone"


def sick(model, images):
    """The model, with NaN for images that are a little darker than the darkest of some."""
    limit = float(images.mean(dim=(1, 2, 3)).sort().values[:4].mean())

    def seen(batch):
        dark = batch.mean(dim=(1, 2, 3)) < limit
        return torch.where(dark[:, None], torch.nan, model(batch))

    return seen


@pytest.mark.parametrize("way", [Backend(), Backend(mode="reference")], ids=lambda way: way.title)
def test_rows_with_nan_are_errors_and_no_verdict(way):
    model, images, labels = data()
    found, _ = run(way, sick(model, images), images, labels)
    errors = [f for f in found if f.error]
    assert 1 <= len(errors) < len(found)
    assert not any(f.broken for f in errors)
    assert all("not finite" in f.error for f in errors)


@pytest.mark.parametrize(
    ("attack", "threat", "stop", "message"),
    [
        (
            PGD,
            LINF,
            "last",
            "stage s, pgd in linf; expected apgd, fab or square in linf or l2; type --mode fast",
        ),
        (FAB, L1, "first", "fab in l1"),
        (ApgdEot("ce", 5, 0.75, 1, 0, eot=2), LINF, "first", "apgdeot in linf"),
        (Apgd("margin", 5, 0.75, 1, 0), LINF, "first", "loss 'margin'; expected ce or dlr or targeted-dlr"),
        (CE, LINF, "best", "stop = 'best'; expected 'first' or 'last'"),
    ],
)
def test_what_has_no_reference_mode_is_refused(attack, threat, stop, message):
    with pytest.raises(InputError, match=message):
        Backend(mode="reference").require(Job([("s", attack)], threat, ROWS, 10, stop=stop))


def test_active_rows_are_refused_where_batches_decide():
    with pytest.raises(InputError, match="--batch-size 4: native reference draws its noise in batches"):
        Backend(mode="reference").require(Job(CHAIN, LINF, ROWS, 10, batch_size=4))
    Backend().require(Job(CHAIN, LINF, ROWS, 10, batch_size=4))


# --- what packages are asked for ---------------------------------------------------------------------------


def stage(attack, threat=LINF, n_classes=10, stop="first", shape=(20, 20)):
    job = Job([("s", attack)], threat, ROWS, n_classes, stop=stop, seed=7)
    return PackageStage("s", attack, job, shape)


BALL = {"norm": "Linf", "eps": 5 / 255, "seed": 7}
OURS, THEIRS = autoattack.AutoAttack("x"), torchattacks.TorchAttacks("x")


@pytest.mark.parametrize(
    ("package", "attack", "kind", "settings"),
    [
        (OURS, DLR, "APGDAttack", {"n_iter": 6, "n_restarts": 2, "rho": 0.7, "loss": "dlr", "eot_iter": 1}),
        (OURS, AIMED, "APGDAttack_targeted",
         {"n_iter": 6, "n_restarts": 1, "rho": 0.75, "eot_iter": 1, "n_target_classes": 3}),
        (OURS, FAB, "FABAttack_PT",
         {"n_iter": 5, "n_restarts": 1, "targeted": True, "n_target_classes": 3, "alpha_max": 0.1,
          "eta": 1.05, "beta": 0.9}),
        (OURS, SQUARE, "SquareAttack",
         {"n_queries": 20, "p_init": 0.8, "n_restarts": 1, "resc_schedule": False}),
        (OURS, SPARSE, "APGDAttack",
         {"norm": "L1", "eps": 4.0, "n_iter": 10, "use_largereps": True, "n_restarts": 5, "loss": "ce"}),
        (THEIRS, ApgdEot("dlr", 6, 0.7, 2, 0, eot=4), "APGD",
         {"steps": 6, "n_restarts": 2, "rho": 0.7, "eot_iter": 4, "loss": "dlr"}),
        (THEIRS, AIMED, "APGDT", {"steps": 6, "n_restarts": 1, "rho": 0.75, "eot_iter": 1, "n_classes": 4}),
        (THEIRS, FAB, "FAB",
         {"steps": 5, "n_restarts": 1, "multi_targeted": True, "n_classes": 4, "alpha_max": 0.1, "eta": 1.05,
          "beta": 0.9}),
        (THEIRS, SQUARE, "Square",
         {"n_queries": 20, "p_init": 0.8, "n_restarts": 1, "loss": "margin", "resc_schedule": False}),
    ],
)  # fmt: skip
def test_a_stage_is_the_packages_own_attack_with_our_numbers(package, attack, kind, settings):
    call = package.translate(stage(attack, L1 if attack is SPARSE else LINF))
    assert (call.kind, call.settings) == (kind, BALL | settings)


def test_pgd_is_torchattacks_pgd():
    call = THEIRS.translate(stage(PGD, stop="last"))
    settings = {"eps": 5 / 255, "alpha": 5 / 255 / 4, "steps": 5, "random_start": True}
    assert (call.kind, call.settings) == ("PGD", settings)
    assert OURS.translate(stage(FAB, L1)).settings["norm"] == "L1"
    assert THEIRS.translate(stage(PGD, L2, stop="last")).kind == "PGDL2"
    assert THEIRS.translate(stage(Fgsm("ce"))) == PackageCall("FGSM", {"eps": 5 / 255})
    call = THEIRS.translate(stage(MiFgsm("ce", 7, "1/255", 0.9), stop="last"))
    settings = {"eps": 5 / 255, "alpha": 1 / 255, "steps": 7, "decay": 0.9}
    assert (call.kind, call.settings) == ("MIFGSM", settings)


def test_few_classes_cap_the_targets():
    assert OURS.translate(stage(FAB, n_classes=2)).settings["n_target_classes"] == 1
    assert THEIRS.translate(stage(FAB, n_classes=2)).settings["n_classes"] == 2
    assert OURS.translate(stage(AIMED, n_classes=4)).settings["n_target_classes"] == 3


@dataclass(frozen=True)
class Patient(Apgd):
    """APGD with a field that no adapter knows."""

    patience: int = 1


@pytest.mark.parametrize("package", [OURS, THEIRS], ids=["autoattack", "torchattacks"])
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (stage(Apgd("margin", 5, 0.75, 1, 0)), "no apgd with loss = 'margin'; use --engine native"),
        (stage(CE, stop="best"), "no apgd with stop = 'best'"),
        (stage(AIMED, n_classes=3), "no apgd with loss = 'targeted-dlr' and 3 classes"),
        (stage(DLR, n_classes=2), "no apgd with loss = 'dlr' and 2 classes"),
        (stage(SQUARE, L2, shape=(12, 12)), r"no square with norm 'l2' on images of \(12, 12\) pixels"),
        (stage(Patient("ce", 5, 0.75, 1, 0, patience=2)), "no patient with patience = 2"),
    ],
)  # fmt: skip
def test_what_a_package_cannot_express_is_refused_in_one_line(package, asked, message):
    with pytest.raises(InputError, match=message) as caught:
        package.translate(asked)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("package", "asked", "message"),
    [
        (OURS, stage(PGD, stop="last"), "stage s: the package has no pgd; use"),
        (OURS, stage(ApgdL1("ce", (4, 3, 3), (3.0, 2.0, 1.0), 5, 0), L1), r"steps = \(4, 3, 3\) at radii"),
        (THEIRS, stage(SPARSE, L1), "stage s: the package has no apgdl1; use"),
        (THEIRS, stage(SQUARE, L1), "no square with norm 'l1'"),
        (THEIRS, stage(FAB, L1), "no fab with norm 'l1'"),
        (THEIRS, stage(Fgsm("ce"), L2), "no fgsm with norm 'l2'"),
        (THEIRS, stage(MiFgsm("ce", 7, "1/255", 0.9)), "no mifgsm with stop = 'first'"),
        (THEIRS, stage(PGD), "no pgd with stop = 'first'"),
        (THEIRS, stage(Pgd("ce", 5, "eps/4", 2, True), stop="last"), "no pgd with restarts = 2"),
        (THEIRS, stage(Pgd("margin", 5, "eps/4", 1, True), stop="last"), "no pgd with loss = 'margin'"),
        (THEIRS, stage(SQUARE, shape=(20, 16)), r"images of \(20, 16\) pixels"),
    ],
)
def test_what_one_package_cannot_do(package, asked, message):
    with pytest.raises(InputError, match=message):
        package.translate(asked)
    assert OURS.translate(stage(Patient("ce", 5, 0.75, 1, 0))).kind == "APGDAttack", "a default is no wish"


# --- what packages cannot reach or hide --------------------------------------------------------------------


@dataclass(frozen=True)
class Rough:
    """A package with every bad habit: a step of FGSM that seeds, spoils logits, and calls `backward`."""

    name: str = "rough"
    reach: float = 1.0

    def translate(self, asked):
        return PackageCall("fgsm", {"eps": float(asked.job.threat.eps) * self.reach})

    def build(self, call, model, device):
        def perturb(images, labels):
            torch.manual_seed(3)
            model.train()
            leaf = images.clone().requires_grad_()
            logits = model(leaf)
            nn.functional.cross_entropy(logits, labels).backward()
            model(images).mul_(0)
            torch.rand(7)
            return (images + call.settings["eps"] * leaf.grad.nan_to_num(0).sign()).clamp(0, 1)

        return perturb


def rough(model, images, labels, reach=1.0, view=None):
    found, keys = {}, [f"i{i}" for i in range(len(images))]
    cost = packages.run(
        Rough(reach=reach), Model(model, view), Job([("a", CE), ("b", CE)], LINF, ROWS, 10),
        ImageBlock(images, labels, keys), lambda f: found.setdefault(f.key, []).append(f),
    )  # fmt: skip
    return [found[key] for key in keys], cost


class Remembers(nn.Module):
    """A classifier that hands out the logits that it keeps."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.kept = inner, []

    def forward(self, images):
        self.kept.append(self.inner(images))
        return self.kept[-1]


def test_nothing_of_a_package_reaches_the_model_or_the_world():
    inner, images, labels = data()
    model = Remembers(nn.Sequential(*inner)).requires_grad_(True).eval()
    try:
        before = generators()
        found, cost = rough(model, images, labels)
        assert generators() == before
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert not model.training
        assert all(float(kept.detach().abs().sum()) > 0 for kept in model.kept)
    finally:
        model.requires_grad_(False)
    batches = -(-len(images) // ROWS)
    survivors = sum(len(met) == 2 for met in found)
    calls = batches - (-survivors // ROWS)
    assert (cost.forwards, cost.gradients) == (calls, calls)
    assert cost.canonical == batches + calls
    broken = [met[-1].broken for met in found]
    assert 3 <= sum(broken) <= len(broken) - 3
    wrong = canonical.logits(inner, torch.stack([met[-1].adv for met in found]), ROWS).argmax(1) != labels
    assert wrong.tolist() == broken
    for met in found:
        assert [f.stage for f in met] == ["a", "b"][: len(met)]
        assert (met[-1].margin < 0) == met[-1].broken


def test_a_package_that_leaves_the_ball_is_stopped():
    with pytest.raises(AttackError, match=r"a: rough left i\d+ .* outside linf 5/255"):
        rough(*data(), reach=1.2)


def test_a_gradient_that_is_not_finite_is_an_error_even_if_the_package_makes_it_zero():
    model, images, labels = data(ROWS)
    ill = images[2].mean()

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.means = x.mean(dim=(1, 2, 3))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return torch.where((ctx.means == ill)[:, None, None, None], torch.nan, gradient)

    found, _ = rough(lambda x: model(Spoil.apply(x)), images, labels)
    errors = [bool(met[-1].error) for met in found]
    assert errors == [i == 2 for i in range(len(images))]
    assert "a logit, a gradient or a pixel is not finite" in found[2][-1].error
    assert not found[2][-1].broken


def test_a_model_without_gradient_is_an_error_and_not_robust():
    model, images, labels = data(ROWS)
    with pytest.raises(AttackError, match="no gradient"):
        rough(lambda x: model(x.detach()), images, labels)
    weight = torch.ones(1, requires_grad=True)
    with pytest.raises(AttackError, match="do not depend on the image"):
        rough(lambda x: model(x.detach()) * weight, images, labels)


def test_lower_precision_finds_and_the_plain_model_decides():
    model, images, labels = data()

    def liar(x):
        return -model(x)

    honest, _ = rough(model, images, labels)
    found, _ = rough(model, images, labels, view=liar)
    assert sum(met[-1].broken for met in found) < sum(met[-1].broken for met in honest)
    for met, label in zip(found, labels, strict=True):
        assert met[-1].broken == (int(model(met[-1].adv[None]).argmax()) != int(label))


def test_no_images_cost_nothing():
    model, images, labels = data()
    for way in (Backend(), Backend(mode="reference")):
        found, cost = run(way, model, images[:0], labels[:0])
        assert (found, cost.gradients, cost.forwards) == ([], 0, 0)
