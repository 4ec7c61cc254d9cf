"""Bundles: what is stored is what breaks the model, in the smallest form, and is read back bit by bit."""

import hashlib
import io
import json
import zipfile
from fractions import Fraction

import numpy as np
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.errors import DataError
from robustbench_vlm.evaluation import bundling, verify_images
from robustbench_vlm.evaluation.cells import Cell
from robustbench_vlm.evaluation.chain import Chain
from robustbench_vlm.results import evidence, hash_tree, packing, result_file, verdicts
from robustbench_vlm.results.packing import Packed
from robustbench_vlm.threat import Threat

SUITE = Suite(name="toys", title="Toys", datasets=("toy",), eps=("4/255",), n=12)
LADDER = (Fraction(4, 255),)
LINF = Threat("linf", "4/255")


def pictures(seed, px=6):
    """A clean image of 8-bit pixels, black and white ones among them, and one inside the ball around it."""
    draw = np.random.default_rng(seed)
    clean = (draw.choice([0, 1, 60, 128, 254, 255], (3, px, px)) / 255).astype(np.float32)
    moved = clean + draw.uniform(-4 / 255, 4 / 255, clean.shape).astype(np.float32)
    return clean, np.clip(moved, 0, 1).astype(np.float32)


# --- packing -----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_exact_has_every_bit(seed):
    clean, adv = pictures(seed)
    found = packing.unpack(packing.pack("exact", adv, clean), clean, LINF)
    assert found.tobytes() == adv.tobytes()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_steps_are_the_nearest_8_bit_image(seed):
    clean, adv = pictures(seed)
    found = packing.unpack(packing.pack("steps", adv, clean), clean, LINF)
    assert (found * 255 == np.rint(adv * 255)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_corners_are_in_ball_and_box_and_an_image_in_a_corner_is_unchanged(seed):
    clean, adv = pictures(seed)
    packed = packing.pack("corners", adv, clean)
    assert len(packed.content) == -(-clean.size // 8)  # one bit a value
    corner = packing.unpack(packed, clean, LINF)
    assert np.abs(corner.astype(np.float64) - clean).max() <= 4 / 255 + LINF.slack
    assert corner.min() >= 0
    assert corner.max() <= 1
    again = packing.unpack(packing.pack("corners", corner, clean), clean, LINF)
    assert again.tobytes() == corner.tobytes()


def test_a_value_at_a_limit_of_the_box_stays_there():
    clean = np.array([0, 1], np.float32).reshape(1, 1, 2)
    corner = packing.unpack(packing.pack("corners", clean, clean), clean, LINF)
    assert corner.tolist() == clean.tolist()


@pytest.mark.parametrize("kind", packing.KINDS)
@pytest.mark.parametrize("content", [b"", b"\x00", b"x" * 2000])
def test_other_bytes_are_refused(kind, content):
    clean, _ = pictures(0)
    with pytest.raises(ValueError, match=r"bytes|stream"):
        packing.unpack(Packed(kind, content), clean, LINF)


def test_a_stream_that_grows_is_cut_off():
    clean, _ = pictures(0)
    zeros = packing._coded(bytes(10**7))
    with pytest.raises(ValueError, match="bytes"):
        packing.unpack(Packed("steps", zeros), clean, LINF)


def test_the_tree_is_that_of_rfc_6962():
    def leaf(text):
        return hashlib.sha256(b"\x00" + text).digest()

    def node(a, b):
        return hashlib.sha256(b"\x01" + a + b).digest()

    a, b, c = map(leaf, (b"a", b"b", b"c"))
    assert hash_tree.root([]) == hashlib.sha256().hexdigest()
    assert hash_tree.root([b"a"]) == a.hex()
    assert hash_tree.root([b"a", b"b", b"c"]) == node(node(a, b), c).hex()
    assert hash_tree.root([b"b", b"a", b"c"]) != hash_tree.root([b"a", b"b", b"c"])


# --- bundles -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def what(tmp_path_factory):
    card = toys.dataset_card()
    return toys.subject(card, toys.write(card, tmp_path_factory.mktemp("data")))


def measured(what, folder, **more):
    """The bundles of a run, by the path of the result."""
    order = toys.request(folder, toys.chain("aa", "ce", "square"), suite=SUITE, **more)
    return {path: (content, evidence.read(evidence.path_of(path))) for path, content in toys.run(what, order)}


def test_every_broken_image_is_there_and_a_smaller_radius_counts(what, tmp_path):
    found = measured(what, tmp_path, eps=("2/255", "4/255"))
    inner, outer = (bundle for _, bundle in found.values())
    for path, (content, bundle) in found.items():
        table = result_file.read_one(path).verdicts()
        assert set(bundle.images) == set(table.key[table.broken_by != ""])
        assert content["evidence"] == {"root": bundle.root, "images": bundle.kinds()}
        assert bundle.suite["name"] == "toys"
    assert inner.images
    assert len(outer.images) > len(inner.images)
    assert {key: outer.images[key] for key in inner.images} == inner.images


def test_evidence_changes_no_verdict_and_is_made_later_too(what, tmp_path):
    order = toys.request(tmp_path, toys.chain("aa", "ce", "square"))
    ((path, plain),) = toys.run(what, order)
    assert not evidence.path_of(path).exists()
    ((same, (content, _)),) = measured(what, tmp_path).items()
    assert same == path
    assert content["sha256"] == plain["sha256"]


def test_images_are_packed_in_the_kernels_of_the_attack(what, tmp_path, monkeypatch):
    """Also where workers attack, and this process only packs."""
    seen, still_broken = [], bundling._still_broken

    def watched(*given):
        seen.append(torch.backends.cudnn.benchmark)
        return still_broken(*given)

    monkeypatch.setattr(bundling, "_still_broken", watched)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    order = toys.request(tmp_path, toys.chain("aa", "ce", "square"))
    cell = Cell(what, order.chains[0], order, order.ladder)
    images = what.images.floats(range(len(what.images)))
    bundling.pack(cell, dict(zip(what.split.keys, images, strict=True)))
    assert seen
    assert not any(seen)
    assert torch.backends.cudnn.benchmark


def test_the_bytes_do_not_depend_on_how_the_work_was_done(what, tmp_path):
    whole = measured(what, tmp_path / "whole")
    torn = measured(what, tmp_path / "torn", batch_size=3)
    again = [evidence.path_of(path).read_bytes() for path in (*whole, *torn)]
    assert again[0] == again[1]


@pytest.mark.parametrize(("norm", "eps"), [("linf", "4/255"), ("l2", "0.3")])
def test_a_damaged_bundle_is_made_again_without_a_new_attack(norm, eps, what, tmp_path):
    ((path, (_, bundle)),) = measured(what, tmp_path, norm=norm, eps=(eps,)).items()
    assert set(bundle.kinds()) <= ({*packing.KINDS} if norm == "linf" else {"steps", "exact"})
    file = evidence.path_of(path)
    kept = file.read_bytes()
    file.write_bytes(kept[:-40])
    ((_, (content, _)),) = measured(what, tmp_path, norm=norm, eps=(eps,)).items()
    assert file.read_bytes() == kept
    assert content["run"]["calls"]["gradients"] == 0


def test_a_bundle_holds_the_verdicts_themselves(what, tmp_path):
    ((path, (content, bundle)),) = measured(what, tmp_path).items()
    result = evidence.unpack(bundle, tmp_path / "elsewhere", "x")
    assert result.content.sha256 == content["sha256"]
    table = result_file.read_one(path).verdicts()
    assert verdicts.table_sha256(result.verdicts()) == verdicts.table_sha256(table)


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def written(path, contents, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    path.write_bytes(file.getvalue())


def test_a_bundle_that_is_none_is_refused(what, tmp_path):
    ((result, _),) = measured(what, tmp_path).items()
    path = evidence.path_of(result)
    good = members(path)
    manifest = json.loads(good[evidence.MANIFEST])
    bad = {
        "members": [{**good, "../x": b""}, {name: good[name] for name in evidence.MEMBERS}],
        "hash in the manifest": [{**good, evidence.IMAGES: b"x"}],
        "not JSON": [{**good, evidence.MANIFEST: b"{"}],
        "a list": [{**good, evidence.MANIFEST: b"[]"}],
        "schema": [{**good, evidence.MANIFEST: json.dumps(manifest | {"schema": "x"}).encode()}],
        "another root": [{**good, evidence.MANIFEST: json.dumps(manifest | {"root": "0" * 64}).encode()}],
        "of the wrong kind": [{**good, evidence.MANIFEST: json.dumps(manifest | {"suite": 1}).encode()}],
    }
    for said, files in bad.items():
        for contents in files:
            written(path, contents)
            with pytest.raises(DataError, match=said):
                evidence.read(path)
    written(path, good, zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match="compressed"):
        evidence.read(path)
    written(path, good)
    assert evidence.read(path).root == manifest["root"]


# --- which packing is chosen -------------------------------------------------------------------------------


@pytest.mark.parametrize(("tried", "kinds"), [(("steps",), {"steps", "exact"}), ((), {"exact"})])
def test_the_next_kind_is_taken_where_one_is_not_tried(tried, kinds, what, tmp_path, monkeypatch):
    monkeypatch.setitem(bundling.ENCODED, "linf", tried)
    ((_, (_, bundle)),) = measured(what, tmp_path).items()
    assert bundle.images
    assert {packed.kind for packed in bundle.images.values()} <= kinds


def test_a_corner_that_does_not_break_the_model_is_not_stored(what, tmp_path, monkeypatch):
    """With every bit inverted a corner is the opposite one; what is stored still breaks the model."""
    inverted = {}

    def pack(kind, adv, clean, own=packing.pack):
        packed = own(kind, adv, clean)
        if kind != "corners":
            return packed
        bits = np.packbits(1 - np.unpackbits(np.frombuffer(packed.content, np.uint8))).tobytes()
        return inverted.setdefault(bits, Packed(kind, bits))

    monkeypatch.setattr(bundling.packing, "pack", pack)
    ((path, (_, bundle)),) = measured(what, tmp_path).items()
    assert len(inverted) == len(bundle.images)
    assert {packed.kind for packed in bundle.images.values()} - {"corners"}
    cell = Cell(what, Chain.of(toys.chain("aa", "ce", "square")), toys.request(tmp_path), LADDER)
    table = result_file.read_one(path).verdicts()
    assert [claim.fault for claim in verify_images.forward(cell, table, bundle.images).claims] == [""] * 5


def test_an_image_within_rounding_of_the_boundary_is_accepted_and_counted(what, tmp_path, monkeypatch):
    ((path, (_, bundle)),) = measured(what, tmp_path).items()
    cell = Cell(what, Chain.of(toys.chain("aa", "ce", "square")), toys.request(tmp_path), LADDER)
    table = result_file.read_one(path).verdicts()
    own = bundling.CanonicalPass.__call__

    def shifted(self, images, labels, by):
        predictions, margins = own(self, images, labels)
        return predictions, np.where(margins < 0, by, margins).astype(np.float32)

    for by, near, faults in ((5e-4, len(bundle.images), 0), (5e-3, 0, 1), (np.nan, 0, 1)):
        monkeypatch.setattr(
            bundling.CanonicalPass, "__call__", lambda self, x, y, by=by: shifted(self, x, y, by)
        )
        found = verify_images.forward(cell, table, bundle.images)
        assert found.near == near
        assert sum(bool(claim.fault) for claim in found.claims) == faults
