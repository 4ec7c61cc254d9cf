"""How sources evaluate: from their protocol cards, and from `settings.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.protocol import Protocol


class Setting(BaseModel):
    """What one source states; an empty text is not stated.

    Attributes:
        source: how the source of its rows begins in `published.csv`.
        protocol: card whose canvas, resize, prompts and number of images it has.
        not_datasets: datasets of which this was not established.
        canvas, images, prompts, metric: in words, instead of a card's.
        clean_images: images of the clean accuracy, where they are others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    protocol: str = ""
    not_datasets: tuple[str, ...] = ()
    canvas: str = ""
    images: str = ""
    clean_images: str = ""
    prompts: str = ""
    metric: str = ""


@dataclass(frozen=True)
class Facts:
    """How one number was measured, in words; an empty text is not stated."""

    canvas: str = ""
    resize: str = ""
    images: str = ""
    prompts: str = ""
    metric: str = ""


@cache
def _settings() -> tuple[Setting, ...]:
    text = (Path(__file__).parent / "settings.toml").read_text("utf-8")
    found = [Setting(**entry) for entry in tomllib.loads(text)["setting"]]
    return tuple(sorted(found, key=lambda setting: -len(setting.source)))


@cache
def facts(source: str, protocol: str, dataset: str, field: str) -> Facts:
    """What is known about a printed number.

    Args:
        source: as in `published.csv`.
        protocol: of the row, `fare/1`, or empty.
        dataset: of the row; a card's name, or the name of an average.
        field: `clean` or `robust`.
    """
    setting = next(
        (entry for entry in _settings() if source.startswith(entry.source)), Setting(source=source)
    )
    if dataset in setting.not_datasets:
        return Facts(metric=setting.metric)
    name = protocol.partition("/")[0] or setting.protocol
    card = reader.read("protocols", name, Protocol) if name else None
    images = (str(card.n) if card.n else "whole split") if card else setting.images
    if field == "clean" and setting.clean_images:
        images = setting.clean_images
    return Facts(
        canvas=_canvas(card, dataset) if card else setting.canvas,
        resize=_resize(card, dataset) if card else "",
        images=images,
        prompts=f"prompt pack {card.prompts}" if card else setting.prompts,
        metric=setting.metric,
    )


def _is_native(dataset: str) -> bool:
    """Whether a dataset's card has a native canvas; an average has none."""
    return (
        reader.has("datasets", dataset) and reader.read("datasets", dataset, DatasetCard).canvas == "native"
    )


def _resize(card: Protocol, dataset: str) -> str:
    """How images come to the model under a protocol."""
    if not _is_native(dataset):
        return card.resize
    return card.native_resize if card.canvas == "model" else "inside the model"


def _canvas(card: Protocol, dataset: str) -> str:
    """Where the ball lies under a protocol; of an average, where it lies for the small images in it."""
    if card.canvas == "model":
        return "model input"
    if not reader.has("datasets", dataset):
        return "native for CIFAR and STL"
    if not _is_native(dataset):
        return "model input"
    return f"native {reader.read('datasets', dataset, DatasetCard).native_px} px"
