"""Results with evidence, and forgeries of them: every hash and count is made to fit what was changed."""

import copy
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import toys

from robustbench_vlm import store
from robustbench_vlm.results import evidence, packing, result_file, verdicts
from robustbench_vlm.results.result_file import HASHED
from robustbench_vlm.threat import Threat, eps_text, parse_eps

TIED = ("cat", "dog", "cat")


def make_home(root):
    """Data, cards and two models; `tied` has a class twice, so that its results carry a flag."""
    datasets = [toys.dataset_card("toy"), toys.dataset_card("tied", TIED)]
    for card in datasets:
        toys.write(card, root / "data")
    for seed in (0, 1):
        toys.save_model(root / "models" / f"m{seed}", seed)
    toys.write_include(root / "cards", datasets, [toys.chain("aa", "ce", "square")])
    return root


def bundle_of(results, model="random0", dataset="toy"):
    """The only bundle of a model on a dataset."""
    (path,) = (results / "cells").glob(f"{model}-*/{dataset}/*{evidence.SUFFIX}")
    return path


def unpacked(path):
    """What is in a bundle, to be changed: blocks, table, images, suite and chain."""
    bundle = evidence.read(path)
    return SimpleNamespace(
        blocks=copy.deepcopy(dict(bundle.result)),
        table=pd.read_parquet(io.BytesIO(bundle.verdicts)),
        images=dict(bundle.images),
        suite=copy.deepcopy(dict(bundle.suite)),
        chain=copy.deepcopy(dict(bundle.chain)),
    )


def rewrite(path, parts, *, files=True):
    """Write a bundle, and the result beside it, with counts and hashes that fit."""
    blocks = parts.blocks
    config = blocks["config"]
    eps = eps_text(config["norm"], parse_eps(config["eps"], config["norm"]))
    stages = [stage["name"] for stage in blocks["stages"]]
    blocks["outcome"] |= verdicts.counts(parts.table, stages, eps)
    config["subset_sha256"] = store.fingerprint(
        [[key, int(label)] for key, label in zip(parts.table.key, parts.table.label, strict=True)]
    )
    config["images_sha256"] = store.fingerprint(parts.table.image_sha256.tolist())
    config["attack_sha256"] = store.fingerprint(parts.chain)
    blocks["sha256"] = store.fingerprint({name: blocks[name] for name in HASHED})
    parquet = parts.table.to_parquet(index=False)
    bundle = evidence.Bundle(blocks, parquet, parts.images, parts.suite, parts.chain)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(evidence.encoded(bundle))
    if files:
        json_path = evidence.result_of(path)
        json_path.write_text(json.dumps(blocks | {"evidence": {"root": bundle.root}}))
        json_path.with_suffix(".parquet").write_bytes(parquet)
    return path


def forge(path, change):
    """Change a bundle in place: `change` is given its parts."""
    parts = unpacked(path)
    change(parts)
    return rewrite(path, parts)


def relabel_model(parts, other):
    """Say that a result is another model's."""
    for block, names in (("config", ("model", "model_sha256", "bank_sha256")), ("model", None)):
        for name in names or other.blocks[block]:
            parts.blocks[block][name] = other.blocks[block][name]


def survive(parts, i):
    """Say that image `i` survived, and leave out its evidence."""
    table = parts.table
    parts.images.pop(table.key[i])
    for name in ("broken_by", "broken_at_eps"):
        table.loc[i, name] = ""
    for name in ("target", "restart", "iteration"):
        table.loc[i, name] = -1
    table.loc[i, "adv_prediction"] = table.label[i]
    table.loc[i, "adv_margin"] = np.float32(0.1)


def clean_of(home, key, dataset="toy"):
    """(3, H, W) float32 pixels of an image."""
    names = toys.NAMES if dataset == "toy" else TIED
    subject = toys.subject(toys.dataset_card(dataset, names), home / "data")
    return subject.images.floats([subject.split.keys.index(key)])[0].numpy()


def image_of(home, parts, key):
    """(3, H, W) the adversarial image that a bundle has."""
    threat = Threat("linf", parts.blocks["config"]["eps"])
    return packing.unpack(parts.images[key], clean_of(home, key), threat)


def copied(results, to):
    shutil.copytree(results, to)
    return to


def read_results(results):
    return [result_file.read_one(path) for path in sorted((results / "cells").rglob("*.json"))]
