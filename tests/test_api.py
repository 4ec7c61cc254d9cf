"""The Python interface: any callable of pixels; verdicts that depend on neither order, batch nor position."""

import pandas as pd
import pytest
import torch
from attack_models import blobs, classifier
from toys import PGD, SHORT, toml

import robustbench_vlm
from robustbench_vlm.errors import InputError
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


@pytest.mark.parametrize("live", [1, 7])
def test_live_rows_change_nothing(chain, data, reference, live):
    found = robustbench_vlm.attack(classifier(), *data, EPS, chain=chain, live=live)
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


def test_a_threat_may_be_given_whole(chain, data, reference):
    threat = Threat("linf", parse_eps(EPS))
    found = robustbench_vlm.attack(classifier(), *data, threat, chain=chain)
    pd.testing.assert_frame_equal(found.verdicts, reference.verdicts)


@pytest.mark.parametrize(
    ("more", "engine", "precision"),
    [
        ({"mode": "reference"}, "native-reference/1", "fp32"),
        ({"precision": "bf16"}, "native/1", "bf16-find"),
        ({"engine": "autoattack"}, "autoattack/", "fp32"),
    ],
)
def test_another_way_to_attack_is_named_and_agrees(chain, data, reference, more, engine, precision):
    _, labels = data
    found = robustbench_vlm.attack(classifier(), *data, EPS, chain=chain, **more)
    assert found.engine.startswith(engine)
    assert found.precision == precision
    assert (reference.engine, reference.precision) == ("native/1", "fp32")
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
        ({"live": 0}, "live"),
        ({"engine": "torchatacks"}, "did you mean 'torchattacks'"),
        ({"engine": "autoattack", "mode": "reference"}, "a mode of the native engine"),
        ({"engine": "autoattack", "live": 4}, "--batch-size 4: autoattack draws its noise in batches"),
        ({"precision": "fp16"}, "fp32 or bf16"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(chain, data, more, message):
    threat = more.pop("threat", EPS)
    with pytest.raises(InputError, match=message):
        robustbench_vlm.attack(classifier(), *data, threat, **{"chain": chain} | more)
