"""Write generated miniatures of public datasets."""

from __future__ import annotations

import tempfile
from pathlib import Path

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.data import dataset, miniature
from robustbench_vlm.engine import canonical
from robustbench_vlm.evaluation.cells import Subject
from robustbench_vlm.evaluation.stages import Report
from robustbench_vlm.models import zoo
from robustbench_vlm.models.clip import Classifier

ROWS = 32  # shape of the model calls that label a miniature


def make_miniature(
    suite: str, root: Path, n: int, label_with: str, report: Report, per_class: int | None = None
) -> None:
    """Write a miniature of every dataset of a suite, labelled by a model's own predictions when one is named.

    A small or random model is wrong on nearly every generated image of a thousand classes, and an image that
    is wrong from the start is never attacked; labels of its own choosing leave it something to lose.
    """
    chosen = reader.read("suites", suite, Suite)
    loaded = zoo.load(label_with) if label_with else None
    for done, name in enumerate(chosen.datasets):
        report(f"miniatures of {suite}", done, len(chosen.datasets))
        card = reader.read("datasets", name, DatasetCard)
        count = per_class * card.n_classes if per_class else n
        labels = predictions(loaded, card, chosen.split, count) if loaded else None
        miniature.make(card, root, n=count, split=chosen.split, labels=labels)


def predictions(loaded: zoo.Loaded, card: DatasetCard, split: str, n: int) -> dict[str, int]:
    """Member name -> predicted class of the `n` images that a miniature of `card` consists of."""
    with tempfile.TemporaryDirectory() as folder:
        miniature.make(card, Path(folder), n=n, split=split)
        opened = dataset.open_split(card, Path(folder), split)
        subject = Subject.of(loaded, opened.card, opened)
        classify = Classifier(loaded.model, subject.bank)
        found: list[int] = []
        for part in subject.images.parts(range(len(subject.images)), ROWS):
            found += canonical.logits(classify, subject.images.floats(part), ROWS).argmax(1).tolist()
        pairs = zip(subject.split.keys, found, strict=True)
        return {key.rsplit("/", 1)[-1]: label for key, label in pairs}
