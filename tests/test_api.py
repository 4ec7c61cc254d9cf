"""The Python interface: any callable of pixels; verdicts that depend on neither order, batch nor position."""

import doctest
import importlib
import inspect
import subprocess
import sys
import warnings
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import pandas as pd
import pytest
import torch
from attack_models import blobs, classifier
from toys import PGD, SHORT, toml

import robustbench_vlm
from robustbench_vlm.attacks.pgd import Pgd
from robustbench_vlm.cards import plugins
from robustbench_vlm.data import layout
from robustbench_vlm.data.tiny import write
from robustbench_vlm.data.tiny.worlds import WORLDS
from robustbench_vlm.errors import AttackError, DataError, InputError, UntrustedResultWarning
from robustbench_vlm.models.clip import InBf16
from robustbench_vlm.models.text_bank import render, text_bank
from robustbench_vlm.threat import Threat, parse_eps

EPS = "5/255"
N = 12


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A chain of all four stages, as a TOML file."""
    stages = [{"name": name, **fields} for name, fields in SHORT.items()]
    path = tmp_path_factory.mktemp("chain") / "short.toml"
    path.write_text(toml({"name": "short", "title": "Short", "rows": 16, "stop": "first", "stage": stages}))
    return str(path)


@pytest.fixture(scope="module")
def data():
    images, _ = blobs(N, 10, seed=1)
    return images, classifier()(images).argmax(1)


@pytest.fixture(scope="module")
def reference(chain, data):
    return robustbench_vlm.attack(classifier(), *data, EPS, chain=chain)


def test_some_break_some_stand_and_the_images_prove_it(reference, data):
    images, labels = data
    found = reference.verdicts
    broken = torch.tensor((found.broken_by != "").tolist())
    assert 2 <= int(broken.sum()) <= N - 2
    assert reference.robust["square"] == N - int(broken.sum())
    assert list(reference.robust) == list(SHORT)
    assert (reference.images - images).abs().max() <= 5 / 255 + 1e-6
    assert 0 <= reference.images.min() <= reference.images.max() <= 1
    fooled = classifier()(reference.images).argmax(1) != labels
    assert torch.equal(fooled, broken)


@pytest.mark.parametrize("size", [1, 7, 16, 64])
def test_a_batch_size_changes_nothing(chain, data, reference, size):
    found = robustbench_vlm.attack(classifier(), *data, EPS, chain=chain, batch_size=size)
    pd.testing.assert_frame_equal(found.verdicts, reference.verdicts, check_exact=True)
    assert torch.equal(found.images, reference.images)


def test_order_changes_nothing(chain, data, reference):
    images, labels = data
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    found = robustbench_vlm.attack(classifier(), images[order], labels[order], EPS, chain=chain)
    expected = reference.verdicts.iloc[order.tolist()].reset_index(drop=True)
    pd.testing.assert_frame_equal(found.verdicts, expected, check_exact=True)
    assert torch.equal(found.images, reference.images[order])


def test_company_changes_nothing(chain, data, reference):
    images, labels = data
    found = robustbench_vlm.attack(classifier(), images[3:6], labels[3:6], EPS, chain=chain)
    expected = reference.verdicts.iloc[3:6].reset_index(drop=True)
    pd.testing.assert_frame_equal(found.verdicts, expected, check_exact=True)


def test_keys_come_from_content_and_a_repeated_image_is_counted(chain, data):
    images, labels = data
    twice = torch.cat([images[:2], images[:1]]), torch.cat([labels[:2], labels[:1]])
    keys = robustbench_vlm.attack(classifier(), *twice, EPS, chain=chain).verdicts.key.tolist()
    assert keys[2] == f"{keys[0]}/2"
    assert len(set(keys)) == 3
    assert all(key.split("/")[1] == str(int(label)) for key, label in zip(keys, twice[1], strict=True))


def test_noise_is_a_function_of_key_and_seed(data, tmp_path):
    path = tmp_path / "noisy.toml"
    path.write_text(
        toml({"name": "n", "title": "N", "rows": 16, "stop": "last", "stage": [{"name": "p", **PGD}]})
    )

    def images(**more):
        return robustbench_vlm.attack(classifier(), *data, EPS, chain=str(path), **more).images

    keys = [f"image{i}" for i in range(N)]
    assert torch.equal(images(keys=keys), images(keys=keys))
    assert not torch.equal(images(keys=keys), images(keys=keys, seed=1))
    assert not torch.equal(images(keys=keys), images(keys=keys[::-1]))


@pytest.mark.parametrize("threat", [Threat("linf", parse_eps(EPS)), 5 / 255, 5, 5.0, 0.0196])
def test_a_radius_may_be_given_in_every_way_that_can_be_typed(chain, data, reference, threat):
    found = robustbench_vlm.attack(classifier(), *data, threat, chain=chain)
    pd.testing.assert_frame_equal(found.verdicts, reference.verdicts)


@pytest.mark.parametrize(
    ("more", "engine", "precision"),
    [
        ({"mode": "reference"}, "native-reference/1", "fp32"),
        ({"precision": "bf16"}, "native/3", "bf16-find"),
        ({"engine": "autoattack"}, "autoattack/", "fp32"),
    ],
)
def test_another_way_to_attack_is_named_and_agrees(chain, data, reference, more, engine, precision):
    _, labels = data
    found = robustbench_vlm.attack(classifier(), *data, EPS, chain=chain, **more)
    assert found.engine.startswith(engine)
    assert found.precision == precision
    assert (reference.engine, reference.precision) == ("native/3", "fp32")
    broken = (found.verdicts.broken_by != "").tolist()
    assert (classifier()(found.images).argmax(1) != labels).tolist() == broken
    there = (reference.verdicts.broken_by != "").tolist()
    assert sum(a != b for a, b in zip(broken, there, strict=True)) <= 1


def test_a_model_that_gives_nan_yields_errors_not_robustness(chain, data):
    images, labels = data
    inner = classifier()
    limit = float(images.mean(dim=(1, 2, 3)).sort().values[3:5].mean())

    def sick(batch):
        dark = batch.mean(dim=(1, 2, 3)) < limit
        return torch.where(dark[:, None], torch.nan, inner(batch))

    found = robustbench_vlm.attack(sick, images, labels, EPS, chain=chain)
    wrong = found.verdicts.error != ""
    assert 4 <= wrong.sum() < N
    assert not found.verdicts.broken_by[wrong].any()
    assert found.robust["square"] == N - wrong.sum() - (found.verdicts.broken_by != "").sum()


def normalised(images):
    return (images - torch.tensor([0.48, 0.46, 0.41]).view(1, 3, 1, 1)) / 0.27


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, y: (normalised(i), y), r"images: float32 in \[-1.* unnormalised pixels"),
        (lambda i, y: (i.double(), y), "float64"),
        (lambda i, y: ((i * 255).to(torch.uint8), y), "uint8"),
        (lambda i, y: (i.clone().fill_(torch.nan), y), "nan"),
        (lambda i, y: (i[:, :1], y), r"shape \(12, 1, 12, 12\)"),
        (lambda i, y: (i[:0], y[:0]), "at least 1"),
        (lambda i, y: (i, y[:-1]), "labels"),
        (lambda i, y: (i, y.float()), "int64"),
        (lambda i, y: (i, y - 20), "labels"),
        (lambda i, y: (i, y + 10), "below 10"),
        (lambda i, y: (i * 255, y), r"float32 in \[0, 255\]; expected float32 pixels"),
        (lambda i, y: (i.numpy(), y), "images: a ndarray; expected a torch.Tensor"),
        (lambda i, y: (i, y.tolist()), "labels: a list; expected a torch.Tensor"),
        (lambda i, y: (i, y.to("meta")), "labels: on meta; expected on cpu, where the images are"),
        (lambda i, y: (i.to_sparse(), y), r"images: a tensor of torch.sparse_coo .* a dense tensor of real"),
        (
            lambda i, y: (torch.complex(i, i), y),
            "images: .* with numbers of torch.complex64; expected a dense",
        ),
        (lambda i, y: (i, y[:, None]), r"int64 of shape \(12, 1\); expected int64 class indices"),
    ],
)
def test_bad_tensors_are_refused_in_one_line(chain, data, change, message):
    with pytest.raises(InputError, match=message) as caught:
        robustbench_vlm.attack(classifier(), *change(*data), EPS, chain=chain)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"keys": ["a"] * N}, "12 distinct names"),
        ({"keys": ["a"]}, "12 distinct names"),
        ({"chain": "autoatack"}, "did you mean 'autoattack'"),
        ({"threat": "1.5"}, "ambiguous"),
        ({"batch_size": 0}, "batch_size: 0; expected a whole number from 1 to 8192, or None"),
        ({"batch_size": 2.5}, "batch_size: 2.5; expected a whole number"),
        ({"batch_size": "4"}, "batch_size: '4'; expected a whole number"),
        ({"batch_size": True}, "batch_size: True; expected a whole number"),
        ({"seed": "x"}, "seed: 'x'; expected a whole number"),
        ({"seed": None}, "seed: None; expected a whole number"),
        ({"seed": 1.5}, "seed: 1.5; expected a whole number"),
        ({"live": 4}, r"attack\(live=...\): no such argument; "),
        ({"prcision": "bf16"}, "did you mean 'precision'"),
        ({"engine": "torchatacks"}, "did you mean 'torchattacks'"),
        ({"engine": "autoattack", "mode": "reference"}, "a mode of the native engine"),
        ({"engine": "autoattack", "batch_size": 4}, "--batch-size 4: autoattack draws its noise in batches"),
        ({"precision": "fp16"}, "fp32 or bf16"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(chain, data, more, message):
    threat = more.pop("threat", EPS)
    with pytest.raises(InputError, match=message):
        robustbench_vlm.attack(classifier(), *data, threat, **{"chain": chain} | more)


def test_a_model_that_was_made_in_inference_mode_is_refused_in_one_line(chain, data):
    with torch.inference_mode():
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 12 * 12, 10)).eval()
    with pytest.raises(InputError, match=r"model: weights that were made inside torch.inference_mode"):
        robustbench_vlm.attack(model, *data, EPS, chain=chain)


def test_too_little_memory_is_not_blamed_on_the_images(chain, data):
    def model(images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        robustbench_vlm.attack(model, *data, EPS, chain=chain)


def test_images_on_another_device_than_the_model_are_refused(chain, data):
    images, labels = data
    away = torch.nn.Conv2d(3, 10, 12, device="meta")
    with pytest.raises(InputError, match=r"images: on cpu; expected on meta, .*images.to\('meta'\)"):
        robustbench_vlm.attack(away, images, labels, EPS, chain=chain)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda z: z.sum(), r"float32 of shape \(\) for 16 images; expected logits of shape \(16, classes\)"),
        (lambda z: z[:, 0], r"shape \(16,\)"),
        (lambda z: z[:, :1], r"shape \(16, 1\)"),
        (lambda z: z[:5], r"shape \(5, 10\)"),
        (lambda z: z.argmax(1, keepdim=True).expand(-1, 2), "int64 of shape"),
        (lambda z: (z, z), "the model returns a tuple; expected a tensor of logits"),
        (lambda z: z.detach().numpy(), "the model returns a ndarray"),
        (lambda z: None, "the model returns a NoneType"),
    ],
)
def test_a_model_that_returns_no_logits_is_refused_in_one_line(chain, data, spoil, message):
    with pytest.raises(AttackError, match=message) as caught:
        robustbench_vlm.attack(lambda x: spoil(classifier()(x)), *data, EPS, chain=chain)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_single_finite_logit_gives_error_rows_and_no_crash(chain, data):
    found = robustbench_vlm.attack(lambda x: classifier()(x) * torch.nan, *data, EPS, chain=chain)
    assert (found.verdicts.error == "a logit of the clean image is not finite").all()
    assert set(found.robust.values()) == {0}
    assert not found.verdicts.broken_by.any()
    assert found.checks.failed == ["non-finite"]


PGD_STAGE = {"name": "p", **PGD}
BAD_STAGES = {
    "unknown attack": ({"attack": "pgdd"}, "unknown attack 'pgdd': no such plug-in; did you mean 'pgd'"),
    "unknown field": ({"stepsize": "eps/4"}, "unknown key 'stepsize' for pgd; did you mean 'step_size'"),
    "no steps": ({"steps": 0}, "pgd: steps 0, restarts 1; expected at least 1 of each"),
    "unknown loss": ({"loss": "cee"}, "loss"),
    "a word for a number": ({"steps": "many"}, "pgd: steps = 'many'; expected a valid integer"),
    "no queries": ({**dict.fromkeys(PGD), **SHORT["square"], "queries": 0}, "square: queries 0"),
}


@pytest.mark.parametrize("case", BAD_STAGES)
def test_a_stage_that_cannot_run_is_refused_before_the_model_is_called(data, tmp_path, case):
    change, message = BAD_STAGES[case]
    stage = {key: value for key, value in {**PGD_STAGE, **change}.items() if value is not None}
    path = tmp_path / "bad.toml"
    path.write_text(toml({"name": "bad", "title": "Bad", "rows": 16, "stop": "last", "stage": [stage]}))
    with pytest.raises(InputError) as caught:
        robustbench_vlm.attack(untouched, *data, EPS, chain=str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def untouched(x):
    raise AssertionError("the model was called")


@dataclass(frozen=True)
class OnlyLinf(Pgd):
    """PGD as it would be with one norm."""

    norms: ClassVar[tuple[str, ...]] = ("linf",)


def test_a_norm_that_an_attack_lacks_is_refused_before_the_model_is_called(data, tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "_code_allowed", True)
    path = tmp_path / "pgd.toml"
    stages = [{**PGD_STAGE, "attack": "test_api:OnlyLinf"}]
    path.write_text(toml({"name": "p", "title": "P", "rows": 16, "stop": "last", "stage": stages}))
    threat = Threat("l1", Fraction(1))
    with pytest.raises(
        InputError, match="attack p, stage p: norm 'l1'; expected linf; chains for l1: autoattack-l1"
    ):
        robustbench_vlm.attack(untouched, *data, threat, chain=str(path))


@pytest.mark.parametrize("eps", ["0", "0/255", "0.0"])
def test_radius_zero_says_that_it_is_the_clean_accuracy(chain, data, eps):
    with pytest.raises(InputError, match="at radius 0 no attack is run: robust accuracy is the clean acc"):
        robustbench_vlm.attack(untouched, *data, eps, chain=chain)
    with pytest.raises(InputError, match="at radius 0 no attack is run"):
        Threat("linf", Fraction(0))


def test_an_encoder_is_refused_and_its_classifier_is_attacked():
    encoder = robustbench_vlm.load_model("tiny")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(2, dtype=torch.int64)
    for model in (encoder, InBf16(encoder)):
        with pytest.raises(
            InputError, match=r"model: an encoder: pixels -> embeddings; expected a classifier"
        ) as caught:
            robustbench_vlm.attack(model, images, labels, EPS)
        assert str(caught.value).endswith("type encoder.classifier(class_names)")
    with pytest.raises(InputError, match=r"model: a str; expected a classifier.*load_model\(ID\).classifier"):
        robustbench_vlm.attack("tiny", images, labels, EPS)
    classifier = encoder.classifier(["circle", "square", "red star"])
    assert isinstance(classifier, robustbench_vlm.Classifier)
    assert not isinstance(classifier, robustbench_vlm.Encoder)
    assert isinstance(encoder, robustbench_vlm.Encoder)
    found = robustbench_vlm.attack(classifier, images, classifier(images).argmax(1), EPS, chain="fgsm")
    assert found.verdicts.label.max() < 3
    bank = text_bank(encoder, render(["circle", "square", "red star"], ["a photo of a {c}."]))
    assert torch.equal(classifier.bank, bank)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("cat",), "class_names: 'cat'; expected a list of strings"),
        (([],), "class_names"),
        (([1, 2],), "class_names"),
        ((["a"], "a {c}"), "templates: 'a {c}'; expected a list of strings"),
        (
            (["a"], ["a photo"]),
            "templates: 'a photo' without {c}; expected a photo of a {c}.; write {c} where",
        ),
    ],
)
def test_class_names_and_templates_that_make_no_classifier_are_refused(words, message):
    with pytest.raises(InputError) as caught:
        robustbench_vlm.load_model("tiny").classifier(*words)
    assert str(caught.value).startswith(message)


def test_a_failed_examination_warns_with_its_sentence(chain, data):
    images, _ = data
    constant = torch.arange(10.0).expand(N, 10)
    with pytest.warns(UntrustedResultWarning, match="zero-gradient"):
        found = robustbench_vlm.attack(
            lambda x: constant[: len(x)] + 0 * x.sum((1, 2, 3))[:, None] if len(x) <= N else
            torch.arange(10.0).expand(len(x), 10) + 0 * x.sum((1, 2, 3))[:, None],
            images, torch.full((N,), 9), EPS, chain=chain,
        )  # fmt: skip
    assert found.checks.failed


def test_the_public_names_are_listed_and_cost_no_torch():
    names = dir(robustbench_vlm)
    assert names == robustbench_vlm.__all__
    assert all(getattr(robustbench_vlm, name) is not None for name in names)
    with pytest.raises(AttributeError, match="no attribute 'atack'"):
        robustbench_vlm.atack  # noqa: B018 - the access is the test
    lists = [name for name in names if name.startswith("list_")]
    code = "import sys, robustbench_vlm as r; "
    code += "; ".join(f"assert r.{name}()" for name in lists) + "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "module", ["", ".api.attack", ".api.commands", ".cards.plugins", ".catalogue", ".threat", ".models.clip"]
)
def test_the_examples_of_the_docstrings_run(module, tmp_path, monkeypatch):
    """Every public function has one; `tiny-seen` has few images here, so that nothing long is rendered."""
    monkeypatch.chdir(tmp_path)
    world = WORLDS["tiny-seen"]
    layout.write_texts(tmp_path / "data" / world.folder, list(world.classes), world.templates)
    for split in world.size:
        folder = tmp_path / "data" / world.folder
        layout.write_split(folder, split, write.samples("tiny-seen", split, 8), 100)
    found = importlib.import_module(f"robustbench_vlm{module}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrustedResultWarning)  # four images raise flags
        finder = doctest.DocTestFinder(exclude_empty=True)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        tests = [test for test in finder.find(found, extraglobs={"torch": torch}) if test.examples]
        for test in sorted(tests, key=lambda test: ("compare" in test.name, "leaderboard" in test.name)):
            runner.run(test)
    assert runner.tries >= 1
    assert runner.failures == 0


def test_every_public_function_has_an_example():
    for name in robustbench_vlm.__all__:
        found = getattr(robustbench_vlm, name)
        if inspect.isfunction(found):
            assert ">>> " in found.__doc__, name


def test_results_that_are_not_there_are_an_error(tmp_path):
    with pytest.raises(DataError, match="nowhere: no "):
        robustbench_vlm.leaderboard(tmp_path / "nowhere")


def test_evaluate_refuses_in_one_line():
    for more, message in (
        (
            {"datasets": "tiny-digit"},
            "--dataset tiny-digit: not in suite tiny; .* did you mean 'tiny-digits'",
        ),
        ({"suite": "tinny"}, "did you mean 'tiny'"),
        ({"eps": 1.5}, "ambiguous"),
        ({"dataset": "tiny-digits"}, r"evaluate\(dataset=...\): no such argument; did you mean 'datasets'"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            robustbench_vlm.evaluate("tiny", "fgsm", **more)
        assert "\n" not in str(caught.value)
