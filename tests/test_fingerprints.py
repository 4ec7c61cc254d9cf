"""Fingerprints stand: results and ledgers of before this file was written are found again under their names.

`golden/fingerprints.json` holds the fingerprint of every packaged chain and, for a made-up model and split of
each dataset of the tiny suite, those of cells and ledgers. A change here makes every stored result worthless;
whoever means to do that raises the schema of result files and writes a reader for the old ones.
"""

import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from robustbench_vlm import store
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.evaluation.cells import Cell, EvalSettings, Subject
from robustbench_vlm.evaluation.chain import Chain

GOLDEN = json.loads((Path(__file__).parent / "golden" / "fingerprints.json").read_text())
RUNS = [("linf", "2/255,4/255", chain) for chain in ("aa2", "pgd20", "autoattack")]
RUNS += [("l2", "1/2", "aa2"), ("l1", "12", "autoattack-l1")]


def subject(card):
    """A model and images that are nothing but their fingerprints."""
    split = SimpleNamespace(
        keys=("a", "b"), labels=np.array([0, 1]), sha256="5" * 64, split="test", card=card
    )
    model = SimpleNamespace(preprocess=SimpleNamespace(antialias=True))
    loaded = SimpleNamespace(card=SimpleNamespace(sha256="c" * 64, name="somebody"), model=model)
    images = SimpleNamespace(side=32, split=split, sha256=("1" * 64, "2" * 64))
    return Subject(loaded, card, images, torch.eye(card.n_classes, 64))


def found(dataset):
    """Fingerprints of cells and ledgers of the runs above."""
    what = subject(reader.read("datasets", dataset, DatasetCard))
    names = {}
    for norm, ladder, name in RUNS:
        chain = Chain.named(name)
        rungs = tuple(Fraction(eps) for eps in ladder.split(","))
        settings = EvalSettings((chain,), norm, rungs, 2, 0, Path("results"), torch.device("cpu"))
        for last in range(len(rungs)):
            cell = Cell(what, chain, settings, rungs[: last + 1])
            ledgers = [cell.ledger(number).stem for number in range(len(chain.stages))]
            names[f"{name} {norm} {ladder.split(',')[last]}"] = [store.fingerprint(cell.config), *ledgers]
    return names


def test_chains_keep_their_fingerprints():
    chains = {name: Chain.named(name).sha256 for name in GOLDEN["chains"]}
    assert chains == GOLDEN["chains"]


@pytest.mark.parametrize("dataset", reader.read("suites", "tiny", Suite).datasets)
def test_cells_and_ledgers_keep_theirs(dataset):
    assert found(dataset) == GOLDEN["cells"][dataset]
