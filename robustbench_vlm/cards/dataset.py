"""The record of a dataset."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from pydantic import Field, model_validator

from robustbench_vlm.cards.card import PLAIN
from robustbench_vlm.cards.card import Card as Card
from robustbench_vlm.cards.protocol import CardResize

Metric = Literal["top1", "mean-per-class", "auroc"]
"""How a dataset's makers count: share of right images, its unweighted mean over classes, area under ROC."""


class Source(Card):
    """Where a dataset comes from, so that a missing one can be fetched.

    Attributes:
        hub: dataset repository `ORG/NAME` of the Hugging Face hub; empty if it is not there.
        revision: commit of that repository; empty takes the newest one, and says so.
        url: page of the dataset's makers, for datasets that must be downloaded by hand.
    """

    hub: str = ""
    revision: str = ""
    url: str = ""


class DatasetCard(Card):
    """One dataset: its classes, its sentences, and the canvas on which the ball lies.

    Attributes:
        folder: name of its folder below the data root (clip-benchmark: `wds_<key>`).
        n_classes: number of classes; labels are 0 to n_classes - 1.
        size: images per split, for example `{ test = 1000 }`; `vlmrob data check` counts them.
        canvas: size at which the ball lies: `native`, the images' own; `model`, the model's input.
        native_px: side of the images in pixels, at most 8000; needed when `canvas` is `native`.
        resize: how an image is brought to a model canvas: `model`, as the evaluated model states; `bicubic`
            or `bilinear`, the shorter side to the input size and a centre crop; with `-256`, the shorter side
            to 256/224 of it and a crop; with `-squash`, both sides; with `-longest`, the longer side and
            black borders.
        names: class names in label order; a name may be empty, as one of CLEVR is.
        names_from: `card`: the names of this card; `folder`: those of the folder's `classnames.txt`, for
            datasets without a public list of names.
        wordnet_ids: WordNet id of each class in label order, for class folders that are named by them
            (`n01440764`); empty where the dataset has none.
        wordnet_synsets: the words of these WordNet entries (`tench, Tinca tinca`), for tables that call
            classes by them; empty where the dataset has none.
        templates: sentences with `{c}` for the class name; the mean of their embeddings stands for the class.
        names_sha256: SHA-256 of the newline-joined names, checked when the card is read; empty for no check.
        templates_sha256: the same of the templates.
        metric: what the dataset's makers report. The leaderboard has top-1 of every dataset; where this is
            `mean-per-class`, it has the mean over classes beside it. `auroc` is named, and not computed.
        made_by: `tiny`, a dataset of the tiny world, which this package writes itself; empty for all others.
        licence: licence of the images.
        source: where the images are fetched from.
    """

    name: str
    title: str
    version: int = 1
    folder: str
    n_classes: int = Field(ge=2)
    size: dict[str, Annotated[int, Field(ge=0, strict=True)]]
    canvas: Literal["native", "model"]
    native_px: int = Field(default=0, ge=0, le=8000)
    resize: CardResize = "model"
    names: tuple[str, ...] = ()
    names_from: Literal["card", "folder"] = "card"
    wordnet_ids: tuple[str, ...] = ()
    wordnet_synsets: tuple[str, ...] = ()
    templates: tuple[str, ...]
    names_sha256: str = ""
    templates_sha256: str = ""
    metric: Metric = "top1"
    made_by: Literal["", "tiny"] = ""
    licence: str
    source: Source = Source()
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _whole(self) -> DatasetCard:
        for field, value in (("name", self.name), ("folder", self.folder)):
            if not PLAIN.fullmatch(value):  # they become paths
                raise ValueError(f"{field} must be letters, digits and . _ - (found {value!r:.60})")
        if len(self.names) != (0 if self.names_from == "folder" else self.n_classes):
            raise ValueError(f"names has {len(self.names)} entries, expected n_classes = {self.n_classes}")
        for field in ("wordnet_ids", "wordnet_synsets"):
            count = len(set(getattr(self, field)))
            if count not in (0, self.n_classes):
                raise ValueError(f"{field} has {count} entries, expected {self.n_classes}")
        if not self.templates or any("{c}" not in template for template in self.templates):
            raise ValueError("templates must be sentences that contain {c}")
        if self.canvas == "native" and self.native_px <= 0:
            raise ValueError("canvas = 'native' needs native_px, the side of the images in pixels")
        for field, lines in (("names_sha256", self.names), ("templates_sha256", self.templates)):
            stated = getattr(self, field)
            if stated and lines and stated != lines_sha256(lines):
                raise ValueError(f"{field} is {lines_sha256(lines)}, expected {stated}: the list was changed")
        return self

    @property
    def other_names(self) -> dict[str, tuple[str, ...]]:
        """Further names of the classes in label order, by what such a name is called."""
        return {"WordNet id": self.wordnet_ids, "WordNet synset": self.wordnet_synsets}


def lines_sha256(lines: tuple[str, ...] | list[str]) -> str:
    """SHA-256 of newline-joined lines: the identity of a list of names or templates."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
