"""Apply an evaluation protocol to datasets (canvas, resize), models (resize), class sentences and tags."""

from __future__ import annotations

from dataclasses import replace

from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.cards.protocol import CardResize, PromptPack, Protocol
from robustbench_vlm.cards.suite import Suite
from robustbench_vlm.data.dataset import Split
from robustbench_vlm.errors import CardError, InputError
from robustbench_vlm.models.zoo import Loaded


def tags(protocol: Protocol | None, suite: Suite) -> dict[str, str]:
    """Facts that tell results apart beside attack and threat: protocol, and the suite's list of images."""
    protocols = {} if protocol is None else {"protocol": f"{protocol.name}/{protocol.version}"}
    return {**protocols, "subset": suite.subset_sha256 or suite.subset} if suite.subset else protocols


def with_protocol_canvas(card: DatasetCard, protocol: Protocol | None) -> DatasetCard:
    """The dataset card with the canvas and resize of the protocol, which holds for every model."""
    if protocol is None:
        return card
    if card.canvas == "native" and protocol.canvas == "card":
        return card
    native = card.canvas == "native"
    resize: CardResize = protocol.native_resize if native else protocol.resize
    if card.resize != "model" and not native:
        resize = card.resize  # a dataset with a rule of its own, as Hateful Memes
    return card.model_copy(update={"canvas": "model", "resize": resize})


def with_protocol_resize(loaded: Loaded, protocol: Protocol | None) -> Loaded:
    """The model with the protocol's resize inside it.

    Raises:
        InputError: a model with another input size than the protocol's.
    """
    if protocol is None:
        return loaded
    found = loaded.model.image_size
    if protocol.input_px and found != protocol.input_px:
        where = f"--protocol {protocol.name}, model {loaded.id}"
        raise InputError(where, f"input of {found} pixels", f"{protocol.input_px}", "choose another model")
    preprocess = replace(loaded.model.preprocess, antialias=protocol.antialias)
    return replace(loaded, model=loaded.model.replaced(preprocess=preprocess))


def with_protocol_sentences(split: Split, protocol: Protocol | None) -> Split:
    """The split with the class names and templates of the protocol's prompt pack.

    Raises:
        CardError: other sentences than the pack's hash says, or names for another number of classes.
    """
    if protocol is None:
        return split
    pack, card = reader.read("prompts", protocol.prompts, PromptPack), split.card
    try:
        names, templates = pack.words(reader.plain_name(card.name), card.names, card.templates)
    except ValueError as error:
        raise CardError(f"prompts {pack.name}", str(error), do="raise the pack's version") from None
    if len(names) != card.n_classes:
        raise CardError(f"prompts {pack.name}", f"{len(names)} names of {card.name}", f"{card.n_classes}")
    return replace(split, card=card.model_copy(update={"names": names, "templates": templates}))
