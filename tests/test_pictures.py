"""Adversarial images that were kept: as PNG files, in the page, and refused where they are others."""

import base64
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from command_line import run_command
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_page import content

from robustbench_vlm.cards import reader
from robustbench_vlm.errors import DataError, InputError
from robustbench_vlm.results import adversarial_images, evidence, leaderboard, pictures, result_file
from robustbench_vlm.results.page.gallery import Gallery


@pytest.fixture(scope="module")
def tiny_root(tmp_path_factory):
    """Folder of the tiny datasets; the evaluation renders those that it needs."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def evaluated(tiny_root, tmp_path_factory):
    """The folder of an evaluation of the undefended model that kept its images, on two datasets."""
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        words = [
            "eval",
            "--model",
            "tiny",
            "--attack",
            "fgsm",
            "--dataset",
            "tiny-colours,tiny-digits",
            "--n",
            "8",
        ]
        words += ["--suite", "tiny", "--out", out, "--data-root", tiny_root, "--save-adversarial"]
        assert run_command(patch, *words) == 0
    return out


def results(folder):
    return result_file.of_suite(result_file.read(folder), reader.suite("tiny"))


def first_broken(result):
    found = result.verdicts()
    return found[found.broken_by != ""].iloc[0]


def pixels(png):
    return np.moveaxis(np.asarray(Image.open(io.BytesIO(png)), dtype=np.float64), -1, 0) / 255


def test_show_image_writes_the_image_that_broke_the_model(
    evaluated, tiny_root, tmp_path, monkeypatch, capsys
):
    result = results(evaluated)[0]
    verdict = first_broken(result)
    end = verdict.key.rpartition("/")[2]
    name = result.content.sha256[:10]
    words = ["show", "image", name, end, "--results", evaluated, "--out", tmp_path, "--data-root", tiny_root]
    assert run_command(monkeypatch, *words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["key"] == verdict.key
    assert printed["broken_by"] == "fgsm"
    files = {kind: pixels(Path(path).read_bytes()) for kind, path in printed["files"].items()}
    kept = load_file(adversarial_images.path(result))[verdict.key]
    assert np.abs(files["adversarial"] - kept).max() <= 0.5 / 255 + 1e-9
    largest = np.abs(files["adversarial"] - files["clean"]).max()
    assert largest <= 4 / 255 + 0.51 / 255
    assert {files["perturbation"].min(), files["perturbation"].max()} <= {0.0, 1.0}


def test_without_the_dataset_the_adversarial_image_alone_is_written(evaluated, tmp_path, monkeypatch, capsys):
    result = results(evaluated)[0]
    words = [
        "show",
        "image",
        result.path,
        first_broken(result).key,
        "--out",
        tmp_path,
        "--data-root",
        tmp_path,
    ]
    assert run_command(monkeypatch, *words) == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out)["files"]) == ["adversarial"]
    assert "without the clean image: dataset tiny-" in err


def test_images_that_are_not_there_are_refused_with_the_reason(evaluated, tmp_path):
    result = results(evaluated)[0]
    found = result.verdicts()
    with pytest.raises(InputError, match="image 'nothing': no such image; expected a key of fgsm-"):
        adversarial_images.line(result, "nothing")
    for verdict in found[found.broken_by == ""].itertuples():
        with pytest.raises(InputError, match=r"it (survived every attack|is misclassified without attack)"):
            adversarial_images.line(result, verdict.key)
    for name in ("abc", "0000000000"):
        with pytest.raises(InputError, match=f"result '{name}': no such result; expected the path"):
            adversarial_images.find([result], name)
    assert adversarial_images.find(results(evaluated), result.path.stem.rpartition("-")[2][:6]) == result


def test_another_image_than_that_of_the_verdict_is_refused(evaluated, tmp_path, monkeypatch):
    result = results(evaluated)[0]
    verdict = first_broken(result)
    kept = load_file(adversarial_images.path(result))
    changed = tmp_path / "changed.safetensors"
    monkeypatch.setattr(adversarial_images, "path", lambda _: changed)
    with pytest.raises(DataError, match=r"changed\.safetensors: no such file"):
        adversarial_images.read(result, verdict)
    save_file(kept | {verdict.key: kept[verdict.key] * 0.5}, changed)
    with pytest.raises(DataError, match=r"another image .* than that of the verdict"):
        adversarial_images.read(result, verdict)
    save_file({"other": kept[verdict.key]}, changed)
    with pytest.raises(DataError, match=f"no image {verdict.key}; expected every image that was broken"):
        adversarial_images.read(result, verdict)
    changed.write_bytes(b"{}")
    with pytest.raises(DataError, match="not a whole safetensors file"):
        adversarial_images.read(result, verdict)


def test_a_clean_image_at_another_distance_is_refused():
    clean = np.zeros((3, 2, 2), dtype=np.float32)
    for norm, distance in (("linf", 0.25), ("l1", 3.0), ("l2", np.sqrt(12) / 4)):
        adversarial_images.require_distance(clean, clean + 0.25, norm, distance)
        with pytest.raises(DataError, match=r"clean image: the adversarial image is .* away; expected"):
            adversarial_images.require_distance(clean, clean + 0.25, norm, distance * 1.01)


def test_the_page_shows_pictures_of_each_dataset_in_turn(evaluated, tiny_root, tmp_path, monkeypatch):
    words = ["--results", evaluated, "--out", tmp_path, "--gallery", "3", "--data-root", tiny_root]
    assert run_command(monkeypatch, "leaderboard", *words) == 0
    row = content((tmp_path / "tiny.html").read_bytes())["contests"][0]["rows"][0]
    keys = [picture["key"] for picture in row["pictures"]]
    assert [key.partition("/")[0] for key in keys] == ["tiny-colours", "tiny-digits", "tiny-colours"]
    assert [kind for kind, _ in row["pictures"][0]["images"]] == [
        "clean",
        "perturbation, scaled",
        "adversarial",
    ]
    kept = load_file(adversarial_images.path(results(evaluated)[0]))[keys[0]]
    address = row["pictures"][0]["images"][2][1]
    shown = pixels(base64.b64decode(address.removeprefix("data:image/png;base64,")))
    assert np.abs(shown - kept).max() <= 0.5 / 255 + 1e-9


def test_without_kept_images_there_are_no_pictures(evaluated, monkeypatch, tmp_path):
    found = results(evaluated)
    monkeypatch.setattr(adversarial_images, "path", lambda _: tmp_path / "none")
    assert Gallery(3, lambda *_: None).of_row(found) == []
    assert leaderboard.table(found, reader.suite("tiny")).shape[0] == len(found)


@pytest.fixture(scope="module")
def evident(tiny_root, tmp_path_factory):
    """The folder of an evaluation that kept evidence in place of images."""
    out = tmp_path_factory.mktemp("evident")
    words = [
        "--model",
        "tiny",
        "--attack",
        "fgsm",
        "--dataset",
        "tiny-colours",
        "--n",
        "8",
        "--suite",
        "tiny",
    ]
    with pytest.MonkeyPatch.context() as patch:
        more = ["--out", out, "--data-root", tiny_root, "--save-evidence"]
        assert run_command(patch, "eval", *words, *more) == 0
    return out


def test_pictures_are_made_from_evidence_and_the_clean_image(
    evident, tiny_root, tmp_path, monkeypatch, capsys
):
    result = results(evident)[0]
    verdict = first_broken(result)
    words = ["show", "image", result.path, verdict.key, "--out", tmp_path, "--data-root", tiny_root]
    assert run_command(monkeypatch, *words) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    shown = {kind: pixels(Path(path).read_bytes()) for kind, path in files.items()}
    assert list(shown) == ["clean", "perturbation", "adversarial"]
    moved = np.abs(shown["adversarial"] - shown["clean"]).max()
    assert 1.5 / 255 <= moved <= 4 / 255 + 0.51 / 255
    words = ["--results", evident, "--out", tmp_path, "--gallery", "2", "--data-root", tiny_root]
    assert run_command(monkeypatch, "leaderboard", *words) == 0
    row = content((tmp_path / "tiny.html").read_bytes())["contests"][0]["rows"][0]
    address = row["pictures"][0]["images"][2][1]
    in_page = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    assert in_page == Path(files["adversarial"]).read_bytes()


def test_evidence_without_the_dataset_shows_nothing_and_says_why(evident, tmp_path, monkeypatch, capsys):
    result = results(evident)[0]
    words = [
        "show",
        "image",
        result.path,
        first_broken(result).key,
        "--out",
        tmp_path,
        "--data-root",
        tmp_path,
    ]
    assert run_command(monkeypatch, *words) == 2
    assert "a bundle of evidence, which holds the difference from the clean image" in capsys.readouterr().err
    assert Gallery(2, lambda *_: None).of_row([result]) == []


def test_evidence_of_another_result_is_refused(evident, tmp_path, monkeypatch):
    result = results(evident)[0]
    clean = np.zeros((3, 32, 32), np.float32)
    bundle = evidence.read(evidence.path_of(result.path))
    other = dataclasses.replace(bundle, result={**bundle.result, "sha256": "0" * 64})
    for changed, message in (
        (other, "evidence of another result"),
        (dataclasses.replace(bundle, images={}), "no such image; expected every image that was broken"),
    ):
        path = tmp_path / f"{len(changed.images)}.zip"
        path.write_bytes(evidence.encoded(changed))
        monkeypatch.setattr(evidence, "path_of", lambda _, path=path: path)
        with pytest.raises(DataError, match=message):
            pictures.of_verdict(result, first_broken(result), lambda *_: clean)
