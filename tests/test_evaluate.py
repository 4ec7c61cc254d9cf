"""Evaluation: cells, ledgers that are never run twice, nested radii, and what changes no verdict."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
import torch
import toys
from safetensors.torch import load_file

from robustbench_vlm import store
from robustbench_vlm.data.dataset import open_split
from robustbench_vlm.engine import canonical
from robustbench_vlm.evaluation import cells, measure
from robustbench_vlm.models.clip import Classifier
from robustbench_vlm.results import verdicts
from robustbench_vlm.threat import Threat

FULL = ("ce", "t", "fab", "square")


@pytest.fixture(scope="module")
def card():
    return toys.dataset_card()


@pytest.fixture(scope="module")
def root(card, tmp_path_factory):
    return toys.write(card, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def what(card, root):
    return toys.subject(card, root)


def table(path):
    return pd.read_parquet(path.with_suffix(".parquet"))


def ledgers(results):
    """Lines of every ledger, by file name."""
    return {path.name: path.read_bytes().count(b"\n") for path in (results / "ledger").rglob("*.jsonl")}


def pixels(what):
    """(N, 3, H, W) of all images."""
    return what.images.floats(range(len(what.images)))


def without_run(content):
    return {name: value for name, value in content.items() if name != "run"}


def both_kinds(found):
    """Something was attacked, something broke and something stood."""
    attacked = found[found.clean_correct]
    broken = int((attacked.broken_at_eps != "").sum())
    assert 0 < broken < len(attacked), f"{broken} of {len(attacked)} broken"


# --- engines and modes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [{"mode": "reference"}, {"engine": "autoattack"}], ids=str)
def test_a_batch_that_was_cut_off_is_run_again_whole(what, tmp_path, way):
    """Noise is drawn in batches: the same images must stand in them, and known lines are kept."""
    chain = toys.chain("aa", "ce", "square", rows=5)
    ((path, whole),) = toys.run(what, toys.request(tmp_path / "whole", chain, **way))
    both_kinds(table(path))
    ((_, torn),) = toys.run(what, toys.request(tmp_path / "torn", chain, **way))
    files = sorted((tmp_path / "torn" / "ledger").rglob("*.jsonl"))
    complete = [file.read_bytes() for file in files]
    for cell in (tmp_path / "torn" / "cells").rglob("*.*"):
        cell.unlink()
    first = max(files, key=lambda file: file.read_bytes().count(b"\n"))  # of the stage that met every image
    kept = complete[files.index(first)].splitlines(keepends=True)[:7]  # one batch, and two of the next
    first.write_bytes(b"".join(kept) + b'{"key": "torn')
    for file in files:
        if file != first:
            file.unlink()
    ((again, found),) = toys.run(what, toys.request(tmp_path / "torn", chain, **way))
    assert without_run(found) == without_run(torn) == without_run(whole)
    pd.testing.assert_frame_equal(table(again), table(path), check_exact=True)
    assert [sorted(file.read_bytes().splitlines()) for file in files] == [
        sorted(content.splitlines()) for content in complete
    ]


def test_subsets_share_ledgers_only_where_images_are_on_their_own(card, root, tmp_path):
    chain = toys.chain("aa", "ce")
    for name, way in (("fast", {}), ("reference", {"mode": "reference"})):
        for n in (6, 12):
            toys.run(toys.subject(card, root, n), toys.request(tmp_path / name, chain, n=n, **way))
    assert list(ledgers(tmp_path / "fast").values()) == [12]
    assert sorted(ledgers(tmp_path / "reference").values()) == [6, 12]


# --- a cell ------------------------------------------------------------------------------------------------


def test_a_cell_counts_what_its_table_says(what, tmp_path):
    ((path, content),) = toys.run(what, toys.request(tmp_path, toys.chain("aa", *FULL)))
    found, outcome = table(path), content["outcome"]
    both_kinds(found)
    assert outcome["n"] == outcome["clean_correct"] == len(found) == 12
    assert list(outcome["robust"]) == list(FULL)
    assert outcome["robust"]["square"] == int((found.clean_correct & (found.broken_by == "")).sum())
    assert outcome["forwards"] == int(found.forwards.sum())
    assert outcome["verdicts_sha256"] == verdicts.sha256(found)
    hashed = {name: content[name] for name in ("config", "outcome", "model", "stages")}
    assert content["sha256"] == store.fingerprint(hashed)
    assert outcome["flags"] == []
    assert path.parent.parent.name == f"random0-{what.loaded.card.sha256[:8]}"


def test_what_a_run_really_took_stands_beside_the_cell_and_outside_its_address(what, tmp_path):
    chain = toys.chain("aa", "ce", "square")
    ((path, content),) = toys.run(what, toys.request(tmp_path, chain))
    calls = content["run"]["calls"]
    assert calls["gradients"] > 0
    assert calls["forwards"] > 0
    assert calls["canonical"] > 0
    assert calls["unconfirmed"] == 0
    path.unlink()  # its ledgers are still there: nothing is attacked again, and it ends with the same address
    ((_, again),) = toys.run(what, toys.request(tmp_path, chain))
    assert set(again["run"]["calls"].values()) == {0}
    assert again["sha256"] == content["sha256"]


def test_two_classes_run_with_the_stand_ins_written_down(tmp_path):
    card = toys.dataset_card("pair", ("cat", "dog"))
    what = toys.subject(card, toys.write(card, tmp_path))
    ((path, content),) = toys.run(what, toys.request(tmp_path, toys.chain("aa", *FULL), eps=("1/255",)))
    assert content["outcome"]["robust"].keys() == set(FULL)
    assert content["outcome"]["substitutions"] == [
        "t: targeted-dlr -> targeted-margin (undefined for 2 classes)",
        "t: targets 2 -> 1 (2 classes)",
        "fab: targets 2 -> 1 (2 classes)",
    ]
    assert len(table(path)) == 12


@pytest.mark.parametrize(
    ("trained_on", "exposure"),
    [(("toy", "x"), "seen"), (("x",), "unseen"), ((), "unseen"), (None, "unknown")],
)
def test_exposure_comes_from_the_training_list(trained_on, exposure, card, root, tmp_path):
    what = toys.subject(card, root, n=2, trained_on=trained_on)
    ((_, content),) = toys.run(what, toys.request(tmp_path, toys.pgd()))
    assert content["outcome"]["exposure"] == exposure


def test_a_constant_predictor_is_flagged(card, tmp_path):
    what = toys.subject(card, toys.write(card, tmp_path, n=4))
    bank = what.bank.clone()
    tilt = 1e-4 * torch.arange(1, len(bank))[:, None]  # so that no two classes are tied
    bank[1:] = -bank[0] + tilt * bank[0].sign()  # every other class is opposite to the first
    flat = cells.Subject(what.loaded, card, what.images, bank)
    sign = torch.sign(Classifier(what.loaded.model, bank)(pixels(what))[:, 0])
    assert (sign == sign[0]).all()  # so one class is predicted for all of them
    ((_, content),) = toys.run(flat, toys.request(tmp_path, toys.pgd()))
    assert content["outcome"]["flags"] == ["constant-predictor"]
    assert content["outcome"]["largest_prediction_share"] == 1.0


def test_generated_images_are_flagged(card, root, tmp_path):
    toys.write(card, tmp_path, n=3)
    (tmp_path / card.folder / "miniature.txt").write_text("generated\n")
    ((_, content),) = toys.run(toys.subject(card, tmp_path), toys.request(tmp_path, toys.pgd()))
    assert content["outcome"]["flags"] == ["generated-images"]


def test_a_model_that_gives_nan_is_neither_robust_nor_broken(what, tmp_path):
    class Nan(torch.nn.Module):
        """A real model whose embeddings of dark images are not numbers."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.__dict__.update({name: vars(inner)[name] for name in ("facts", "tokenize", "preprocess")})
            self.image_size, self.logit_scale, self.mean = inner.image_size, inner.logit_scale, inner.mean
            self.language, self.logits = inner.language, inner.logits

        def forward(self, images):
            found = self.inner(images)
            dark = images.mean(dim=(1, 2, 3), keepdim=True)[:, :, 0, 0] < self.limit
            return torch.where(dark, torch.full_like(found, torch.nan), found)

    broken = Nan(toys.model())
    means = pixels(what).mean(dim=(1, 2, 3)).sort().values
    broken.limit = float(means[4:6].mean())  # five images of twelve, and what drifts there under attack
    holder = type(what.loaded)("nan", broken, what.loaded.card)
    sick = cells.Subject(holder, what.card, what.images, what.bank)
    sick.__dict__["untrained"] = []
    order = toys.request(tmp_path, toys.chain("aa", *FULL))
    ((path, content),) = toys.run(sick, order)
    found, outcome = table(path), content["outcome"]
    wrong = found[found.error != ""]
    assert 5 <= len(wrong) < 12
    assert not wrong.broken_by.any()
    assert outcome["errors"] == len(wrong)
    assert outcome["robust"]["square"] + len(wrong) + int((found.broken_at_eps != "").sum()) == 12
    assert "error-rows" in outcome["flags"]
    path.unlink()
    assert without_run(toys.run(sick, order)[0][1]) == without_run(content)  # from the ledger alone


# --- ledgers -----------------------------------------------------------------------------------------------


def test_a_longer_chain_starts_from_what_a_shorter_one_found(what, tmp_path):
    short = toys.chain("two", "ce", "t")
    toys.run(what, toys.request(tmp_path, short))
    first = ledgers(tmp_path)
    assert len(first) == 2
    seen = []
    ((path, _),) = toys.run(what, toys.request(tmp_path, toys.chain("four", *FULL)), seen)
    then = ledgers(tmp_path)
    assert {name: then[name] for name in first} == first  # not a line was added: nothing was run again
    assert len(then) == 4
    fresh, _ = toys.run(what, toys.request(tmp_path / "fresh", toys.chain("four", *FULL)))[0]
    assert table(path).equals(table(fresh))
    assert [done for name, done, total in seen if "· t ·" in name] == [
        total for name, done, total in seen if "· t ·" in name
    ]  # reported as done from the start


def test_more_images_start_from_fewer(card, root, tmp_path):
    chain = toys.chain("one", "ce")
    toys.run(toys.subject(card, root, n=4), toys.request(tmp_path, chain, n=4))
    assert list(ledgers(tmp_path).values()) == [4]
    ((path, content),) = toys.run(toys.subject(card, root, n=8), toys.request(tmp_path, chain, n=8))
    assert list(ledgers(tmp_path).values()) == [8]  # four lines more, in the same file
    assert (content["outcome"]["n"], len(table(path))) == (8, 8)
    assert len(list((tmp_path / "cells").rglob("*.json"))) == 2


def test_a_finished_cell_is_left_alone(what, tmp_path):
    order = toys.request(tmp_path, toys.chain("one", "ce"))
    ((path, _),) = toys.run(what, order)
    before = (path.stat().st_mtime_ns, ledgers(tmp_path))
    seen = []
    toys.run(what, order, seen)
    assert (path.stat().st_mtime_ns, ledgers(tmp_path)) == before
    assert seen == []


def test_a_cell_without_its_verdicts_is_not_finished(what, tmp_path):
    order = toys.request(tmp_path, toys.chain("one", "ce"))
    ((path, content),) = toys.run(what, order)
    path.with_suffix(".parquet").unlink()
    assert without_run(toys.run(what, order)[0][1]) == without_run(content)
    assert len(table(path)) == 12


def test_relabelled_data_make_another_cell(card, tmp_path):
    order = toys.request(tmp_path / "results", toys.chain("one", "ce"))
    ((first, _),) = toys.run(toys.subject(card, toys.write(card, tmp_path / "a", n=4)), order)
    labels = toys.predicted(card, toys.pictures(card, 4))
    labels[2] = (labels[2] + 1) % 6
    ((path, content),) = toys.run(
        toys.subject(card, toys.write(card, tmp_path / "b", n=4, labels=labels)), order
    )
    assert path != first
    assert content["outcome"]["clean_correct"] == 3
    assert not table(path).clean_correct[2]


def drifting(what):
    """A subject whose logits change with every call, a little, so that only checks after attacks see it."""
    calls = []

    def change(images):
        calls.append(len(images))
        return images + 1e-4 * len(calls)

    return toys.changed(what, change)


def kept_failures(results):
    """Names of the failed checks beside ledgers, sorted."""
    found = (results / "ledger").rglob("*.checks.jsonl")
    return sorted({line["name"] for path in found for line in store.records(path)})


@pytest.mark.filterwarnings("ignore")
def test_what_an_attack_brought_to_light_stands_in_every_result_of_its_findings(card, root, what, tmp_path):
    """As `--until` and `race` do it, more images, a longer chain, and one that is made again."""
    sick, quiet = drifting(what), lambda *_: None
    few = drifting(toys.subject(card, root, n=4))
    measure.tables(few, (order := toys.request(tmp_path, toys.chain("one", "ce"))).chains[0], order, quiet)
    failed = kept_failures(tmp_path)
    assert "outputs-changed" in failed
    calm = toys.changed(what, lambda images: images)  # the same fingerprint, and nothing to be seen
    calm_few = toys.changed(toys.subject(card, root, n=4), lambda images: images)
    for subject, n, stages in ((calm_few, 4, ["ce"]), (calm, 0, ["ce"]), (calm, 0, ["ce", "t"])):
        ((_, content),) = toys.run(subject, toys.request(tmp_path, toys.chain("one", *stages), n=n))
        assert {*failed} <= {*content["outcome"]["flags"]}
        assert {*failed} <= {one["name"] for one in content["checks"]["checks"] if one["level"] == "fail"}
    assert kept_failures(tmp_path) == failed  # each name once
    # a result of before failures were kept beside ledgers, that lacks its verdicts
    ((path, first),) = toys.run(sick, order)
    for kept in (tmp_path / "ledger").rglob("*.checks.jsonl"):
        kept.unlink()
    path.with_suffix(".parquet").unlink()
    ((_, second),) = toys.run(calm, order)
    assert without_run(second)["outcome"] == first["outcome"]


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_attack_keeps_what_it_brought_to_light(what, tmp_path):
    def interrupted(name, done, total):
        if done == 6:
            raise KeyboardInterrupt

    order = toys.request(tmp_path, toys.chain("one", "ce"))
    with pytest.raises(KeyboardInterrupt):
        list(measure.evaluate(drifting(what), order, interrupted))
    assert "outputs-changed" in kept_failures(tmp_path)
    ((_, content),) = toys.run(toys.changed(what, lambda images: images), order)
    assert "outputs-changed" in content["outcome"]["flags"]


def test_a_half_written_ledger_line_is_run_again(what, tmp_path):
    order = toys.request(tmp_path, toys.chain("one", "ce"))
    ((path, content),) = toys.run(what, order)
    (ledger,) = (tmp_path / "ledger").rglob("*.jsonl")
    ledger.write_bytes(ledger.read_bytes()[:-40])
    path.unlink()
    ((_, again),) = toys.run(what, order)
    assert without_run(again) == without_run(content)
    assert len(list(store.records(ledger))) == 12


# --- nested radii ------------------------------------------------------------------------------------------


def test_a_ladder_is_monotone_and_names_the_smaller_radius(what, tmp_path):
    eps = ("1/255", "2/255", "4/255", "8/255")
    order = toys.request(tmp_path, toys.chain("aa", "ce", "square"), eps=eps, save_images=True)
    cells = toys.run(what, order)
    assert [content["config"]["eps_ladder"][-1] for _, content in cells] == list(eps)
    finals = [content["outcome"]["robust"]["square"] for _, content in cells]
    assert finals == sorted(finals, reverse=True)
    assert len(set(finals)) >= 3  # it falls on the way, so that being monotone says something
    small, large = table(cells[1][0]), table(cells[3][0])
    inherited = small[small.broken_at_eps != ""]
    assert len(inherited) >= 1
    kept = large.loc[inherited.index]
    assert kept.broken_at_eps.tolist() == inherited.broken_at_eps.tolist()
    assert "8/255" in set(large.broken_at_eps)
    assert kept.adv_sha256.tolist() == inherited.adv_sha256.tolist()
    assert kept.forwards.sum() == 0  # nothing was spent on them again
    images = load_file(cells[3][0].with_suffix(".safetensors"))
    assert set(images) == set(large.key[large.broken_at_eps != ""])


def test_a_ladder_in_l1_is_monotone_too(what, tmp_path):
    chain = toys.chain("sparse", "l1", "square")
    order = toys.request(tmp_path, chain, eps=("1", "4", "16"), norm="l1")
    cells = toys.run(what, order)
    finals = [content["outcome"]["robust"]["square"] for _, content in cells]
    assert finals == sorted(finals, reverse=True)
    assert len(set(finals)) >= 2
    largest = table(cells[-1][0])
    broken = largest[largest.broken_at_eps != ""]
    assert len(set(broken.broken_at_eps)) >= 2
    radii = broken.broken_at_eps.astype(float)
    assert (broken.distance <= radii * (1 + 1e-5)).all()
    assert (broken.distance > 0).all()


def test_the_ladder_is_part_of_the_cell(what, tmp_path):
    chain = toys.chain("one", "ce")
    alone = toys.run(what, toys.request(tmp_path, chain, eps=("4/255",)))[-1]
    after = toys.run(what, toys.request(tmp_path, chain, eps=("2/255", "4/255")))[-1]
    assert alone[0] != after[0]
    assert alone[1]["config"] | {"eps_ladder": 0} == after[1]["config"] | {"eps_ladder": 0}


# --- what changes nothing ----------------------------------------------------------------------------------


def evidence(path):
    images = {
        key: value.numpy().tobytes() for key, value in load_file(path.with_suffix(".safetensors")).items()
    }
    return table(path), images


def test_live_rows_and_the_order_on_disk_change_no_bit(card, tmp_path):
    n = 12
    chain = toys.chain("aa", *FULL, rows=64)
    root = toys.write(card, tmp_path / "straight", n=n)
    what = toys.subject(card, root)
    found = {}
    for live in (1, 7, 64):
        order = toys.request(tmp_path / f"live{live}", chain, save_images=True, batch_size=live)
        ((path, content),) = toys.run(what, order)
        found[live] = evidence(path), content["sha256"]
    shuffled = np.random.default_rng(0).permutation(n).tolist()
    other = toys.subject(card, toys.write(card, tmp_path / "shuffled", n=n, order=shuffled))
    ((path, content),) = toys.run(other, toys.request(tmp_path / "order", chain, save_images=True))
    found["order"] = evidence(path), content["sha256"]
    (reference, images), sha = found[64]
    both_kinds(reference)
    broken = int((reference.broken_at_eps != "").sum())
    assert 0.3 * n <= broken <= 0.7 * n, f"{broken} of {n} are broken: choose another radius"
    for name, ((verdict, adversarial), fingerprint) in found.items():
        pd.testing.assert_frame_equal(verdict, reference, check_exact=True, obj=str(name))
        assert adversarial == images, name
        assert fingerprint == sha, name


def test_logits_of_an_image_do_not_depend_on_its_company(what):
    classify = Classifier(what.loaded.model, what.bank)
    images = pixels(what)
    together = canonical.logits(classify, images, 64)
    alone = torch.cat([canonical.logits(classify, image[None], 64) for image in images])
    turned = canonical.logits(classify, images.flip(0), 64).flip(0)
    assert torch.equal(together, alone)
    assert torch.equal(together, turned)


# --- evidence ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "eps"), [("linf", "4/255"), ("l2", "0.3"), ("l1", "4")])
def test_kept_images_lie_in_the_ball_and_fool_the_model_in_one_pass(what, tmp_path, norm, eps):
    from robustbench_vlm.threat import parse_eps

    chain = toys.chain("aa", *(("l1", "fab", "square") if norm == "l1" else FULL))
    order = toys.request(tmp_path, chain, eps=(str(parse_eps(eps, norm)),), norm=norm, save_images=True)
    ((path, _),) = toys.run(what, order)
    found = table(path).set_index("key")
    both_kinds(found)
    kept = load_file(path.with_suffix(".safetensors"))
    assert set(kept) == set(found.index[found.broken_at_eps != ""])
    radius = float(Threat(norm, parse_eps(eps, norm)).eps)
    clean = dict(zip(what.split.keys, pixels(what), strict=True))
    keys = list(kept)
    adversarial = torch.stack([kept[key] for key in keys])
    logits = canonical.logits(Classifier(what.loaded.model, what.bank), adversarial, chain.rows)
    for key, image, row in zip(keys, adversarial, logits, strict=True):
        assert 0 <= float(image.min()) <= float(image.max()) <= 1
        delta = (image.double() - clean[key].double()).flatten()
        length = float(delta.norm(p={"linf": torch.inf, "l2": 2, "l1": 1}[norm]))
        assert length <= radius + max(1e-6, 1e-6 * radius)
        assert length == pytest.approx(found.distance[key], abs=1e-7)
        assert int(row.argmax()) == found.adv_prediction[key] != found.label[key]
        assert hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest() == found.adv_sha256[key]


def test_images_can_be_asked_for_later(what, tmp_path):
    chain = toys.chain("one", "ce")
    ((path, content),) = toys.run(what, toys.request(tmp_path, chain))
    assert not path.with_suffix(".safetensors").exists()
    ((again, kept),) = toys.run(what, toys.request(tmp_path, chain, save_images=True))
    assert again == path
    assert without_run(kept) == without_run(content)
    assert load_file(path.with_suffix(".safetensors"))


def test_a_subset_is_named_in_the_cell(card, root, tmp_path):
    split = open_split(card, root, "test").subset(3, 0)
    ((path, content),) = toys.run(
        toys.subject(card, root, n=3), toys.request(tmp_path, toys.chain("one", "ce"), n=3)
    )
    assert content["config"]["subset_sha256"] == split.sha256
    assert (content["config"]["n_requested"], content["outcome"]["n"]) == (3, 3)
    assert json.loads(path.read_text())["config"] == content["config"]
