"""Bundles of evidence: one file a result, with which anybody can check it by forward passes.

A bundle is a zip file without compression, `<result>.evidence.zip`, of four members:

    manifest.json       suite, chain, hash of every member, root of the hash tree over the images
    result.json         the result as its JSON file has it, without date, machine and costs
    verdicts.parquet    the verdicts of every image
    images.safetensors  the packed adversarial image of each broken one, as bytes named `<kind>/<key>`

The hash tree has an entry an image: its row of the verdicts and the hash of what is stored for it.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load, save

from robustbench_vlm import store
from robustbench_vlm.errors import DataError
from robustbench_vlm.results import hash_tree, result_file
from robustbench_vlm.results.packing import KINDS, Kind, Packed
from robustbench_vlm.results.result_file import Result

SCHEMA = "vlmrob-evidence/1"
SUFFIX = ".evidence.zip"
RESULT, VERDICTS, IMAGES, MANIFEST = "result.json", "verdicts.parquet", "images.safetensors", "manifest.json"
MEMBERS = (RESULT, VERDICTS, IMAGES)
"""Members beside the manifest, which has their hashes."""

MOST_JSON = 64 * 2**20  # bytes of a JSON member that are read
PROVED = ("key", "label", "image_sha256", "clean_prediction", "broken_by", "broken_at_eps", "error")
"""Columns of the verdicts that an entry of the hash tree has."""

DO = "delete it and run the same eval again with --save-evidence"


@dataclass(frozen=True)
class Bundle:
    """The evidence of one result.

    Attributes:
        result: the JSON of the result, without what differs between two measurements of it.
        verdicts: its Parquet file.
        images: the packed adversarial image of every broken image, by key.
        suite: the card of the suite, as plain values.
        chain: rows, stop rule and stages of the chain: what its fingerprint is taken of.
    """

    result: Mapping[str, Any]
    verdicts: bytes
    images: Mapping[str, Packed]
    suite: Mapping[str, Any]
    chain: Mapping[str, Any]

    @cached_property
    def root(self) -> str:
        """The root of the hash tree."""
        table = pd.read_parquet(io.BytesIO(self.verdicts))
        entries = []
        for row in table[list(PROVED)].to_dict("records"):
            packed = self.images.get(row["key"])
            stored = [] if packed is None else [packed.kind, hashlib.sha256(packed.content).hexdigest()]
            entries.append(store.canonical([*row.values(), stored]))
        return hash_tree.root(entries)

    def kinds(self) -> dict[str, list[int]]:
        """By kind of packing: the number of images, and their bytes."""
        found: dict[str, list[int]] = {}
        for kind in KINDS:
            sizes = [len(packed.content) for packed in self.images.values() if packed.kind == kind]
            found |= {kind: [len(sizes), sum(sizes)]} if sizes else {}
        return found


def path_of(result: Path) -> Path:
    """The bundle beside the JSON file of a result."""
    return result.with_suffix(SUFFIX)


def result_of(bundle: Path) -> Path:
    """The JSON file of the result that a bundle stands beside."""
    return bundle.with_name(bundle.name.removesuffix(SUFFIX) + ".json")


def encoded(bundle: Bundle) -> bytes:
    """The bytes of a bundle's file; the same bundle gives the same bytes."""
    tensors = {
        f"{packed.kind}/{key}": np.frombuffer(packed.content, np.uint8)
        for key, packed in bundle.images.items()
    }
    members = {
        RESULT: store.canonical(dict(bundle.result)),
        VERDICTS: bundle.verdicts,
        IMAGES: save(tensors),
    }
    manifest = {
        "schema": SCHEMA,
        "root": bundle.root,
        "suite": dict(bundle.suite),
        "chain": dict(bundle.chain),
        "members": {name: hashlib.sha256(content).hexdigest() for name, content in members.items()},
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {MANIFEST: store.canonical(manifest), **members}.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # dated 1980: the same bytes at any time
    return file.getvalue()


def read(path: Path) -> Bundle:
    """The bundle in a file, whose hashes are checked. What it claims is not: that is what `verify` is for.

    Raises:
        DataError: no bundle; a member that is missing, cut or another one than its hash says; or a root that
            is not that of the images.
    """
    members = _members(path)
    manifest = _json(path, MANIFEST, members)
    kinds = {"schema": str, "root": str, "suite": dict, "chain": dict, "members": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(manifest.get(key), kind)]
    if wrong or manifest["schema"] != SCHEMA:
        found = f"{wrong[0]} of the wrong kind" if wrong else f"schema {manifest['schema']!r:.40}"
        raise DataError(f"{path}, {MANIFEST}", found, SCHEMA, DO)
    for name in MEMBERS:
        if manifest["members"].get(name) != hashlib.sha256(members[name]).hexdigest():
            raise DataError(f"{path}, {name}", "other bytes than its hash in the manifest says", do=DO)
    bundle = Bundle(
        _json(path, RESULT, members),
        members[VERDICTS],
        _images(path, members[IMAGES]),
        manifest["suite"],
        manifest["chain"],
    )
    try:
        root = bundle.root
    except (ValueError, OSError, KeyError, TypeError) as error:
        found = f"unreadable ({str(error).splitlines()[0]:.120})"
        raise DataError(f"{path}, {VERDICTS}", found, "verdicts", DO) from None
    if root != manifest["root"]:
        raise DataError(f"{path}, {MANIFEST}", "another root than that of its images", root[:12], DO)
    return bundle


def unpack(bundle: Bundle, folder: Path, name: str) -> Result:
    """Write JSON and Parquet of a bundle below a folder, and read them as any result is read.

    Args:
        bundle: of `read`.
        folder: an empty one.
        name: of the files, without ending.

    Raises:
        DataError: see `result_file.read_one`.
    """
    path = folder / f"{name}.json"
    store.write(path.with_suffix(".parquet"), bundle.verdicts)
    store.write_json(path, dict(bundle.result))
    return result_file.read_one(path)


def _members(path: Path) -> dict[str, bytes]:
    """The content of every member; nothing in the file can make it longer than the file is."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            found = sorted(info.filename for info in infos)
            if found != sorted((MANIFEST, *MEMBERS)):
                raise DataError(str(path), f"members {', '.join(found)[:120]}", ", ".join(MEMBERS), DO)
            if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos):
                raise DataError(str(path), "a member that is compressed or encrypted", "plain members", DO)
            return {info.filename: archive.read(info) for info in infos}
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise DataError(str(path), f"not a whole zip file ({error!s:.120})", "a bundle", DO) from None


def _json(path: Path, name: str, members: Mapping[str, bytes]) -> dict[str, Any]:
    content = members[name]
    try:
        if len(content) > MOST_JSON:
            raise ValueError(f"{len(content)} bytes")
        found = json.loads(content)
        store.canonical(found)  # refuses numbers that are not finite and half characters
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, {name}", f"not JSON ({error!s:.120})", "an object", DO) from None
    if not isinstance(found, dict):
        raise DataError(f"{path}, {name}", f"a {type(found).__name__}", "an object", DO)
    return found


def _images(path: Path, content: bytes) -> dict[str, Packed]:
    where = f"{path}, {IMAGES}"
    try:
        tensors = load(content)
    except (SafetensorError, ValueError) as error:
        raise DataError(where, f"not safetensors ({error!s:.120})", do=DO) from None
    found: dict[str, Packed] = {}
    for name, value in tensors.items():
        kind, _, key = name.partition("/")
        if kind not in KINDS or value.dtype != np.uint8 or value.ndim != 1 or key in found:
            raise DataError(where, f"{name!r:.80}", f"bytes of {' or '.join(KINDS)}, once an image", DO)
        found[key] = Packed(cast("Kind", kind), value.tobytes())
    return found
