"""Open a model and the images of a dataset, and say what a reader of the results should know of them."""

from __future__ import annotations

from collections.abc import Callable

from robustbench_vlm.data.dataset import TOLERATED, Split
from robustbench_vlm.errors import some
from robustbench_vlm.evaluation.cells import Subject
from robustbench_vlm.models.zoo import Loaded


def opened(
    loaded: Loaded, split: Split, remark: Callable[[str], None], tolerated: float = TOLERATED
) -> Subject:
    """A model and the images of a dataset, after the notes on both were made; see `Subject.of`."""
    subject = Subject.of(loaded, split.card, split, tolerated=tolerated)
    for line in subject.split.bad:
        remark(f"note: {split.card.name}: left out: {line}")
    if subject.untrained:
        words = f"a template or class names with words that {loaded.card.name} was never trained on"
        remark(f"note: {split.card.name}: {words}: {some(subject.untrained)}")
    for line in text_notes(subject):
        remark(f"note: {split.card.name}: {line}")
    return subject


def text_notes(subject: Subject) -> list[str]:
    """What the sentences of the classes change in what is measured, one line each."""
    notes, names, tied = [], subject.card.names, subject.tied
    if tied is not None:
        pairs = [f"{k} {names[k]!r} is {tied.first[k]} {names[tied.first[k]]!r}" for k in tied.twins]
        what = "the first of them is predicted, and attacks do not count a twin as another class"
        notes.append(f"classes with the same text: {some(pairs)}; {what}")
    if subject.cut:
        notes.append(f"{len(subject.cut)} sentences are cut at the context length: {some(subject.cut)}")
    return notes
