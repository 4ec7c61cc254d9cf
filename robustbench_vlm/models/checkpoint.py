"""The checkpoint folder: `image.safetensors`, `card.json`, and its own text tower or the name of another one.

Every training method here keeps the text tower frozen. So a checkpoint names the model whose text tower it
was trained against (`text_from`) instead of containing a copy. Both towers are compared with the hashes in
the card. A folder with its own text tower stores only the token rows that occur in its captions:
`text.safetensors` contains them with their ids, and every other row of the table is the mean of the stored
rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from robustbench_vlm import store, text_files
from robustbench_vlm.cards import reader
from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models import openclip, prompts
from robustbench_vlm.models.canary import Canary, check_canary, take
from robustbench_vlm.models.clip import Clip, Preprocess, PromptSizes

SCHEMA = "vlmrob-checkpoint/1"
TOKENS = "net.token_embedding.weight"


class PreprocessFacts(BaseModel):
    """`Preprocess` as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    antialias: bool


class Parent(BaseModel):
    """A model that this model was made from: its start, or a teacher."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    role: str
    model: str
    sha256: str
    trained_on: tuple[str, ...] | None


class PromptFacts(BaseModel):
    """`models.prompts` as JSON: how many tokens in which tower, and in how many layers."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    image: int
    text: int
    depth: int


class CheckpointCard(BaseModel):
    """The record in `card.json`.

    Attributes:
        text_from: model id whose text tower belongs to this image tower; empty if stored in this folder.
        trained_on: datasets seen by this model and all its parents, with `"unknown"` among them if some saw
            more than is listed; `None` if nothing is known.
        prompts: learned tokens inside the towers; those of the text tower are in `prompts.safetensors`.
        sha256: fingerprint of the whole model (towers, preprocessing, activation, logit scale).
        canary: outputs on fixed inputs; `None` in cards that are older than the canary.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: str = SCHEMA
    name: str
    arch: str
    quick_gelu: bool
    preprocess: PreprocessFacts
    logit_scale: float
    text_from: str
    prompts: PromptFacts | None = None
    image_sha256: str
    text_sha256: str
    sha256: str
    defense: str
    trained_on: tuple[str, ...] | None
    parents: tuple[Parent, ...] = ()
    parameters: int
    recipe: dict[str, Any] = {}
    training: dict[str, Any] = {}
    canary: Canary | None = None


def describe(
    model: Clip,
    name: str,
    *,
    defense: str,
    trained_on: tuple[str, ...] | None,
    text_from: str,
    parents: tuple[Parent, ...] = (),
    recipe: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> CheckpointCard:
    """The card of `model`, with its fingerprints taken now."""
    prints = model.fingerprints()
    facts = model.facts
    return CheckpointCard(
        prompts=PromptFacts(**asdict(facts.prompts)) if facts.prompts else None,
        name=name,
        arch=facts.arch,
        quick_gelu=facts.quick_gelu,
        preprocess=PreprocessFacts(**asdict(model.preprocess)),
        logit_scale=model.logit_scale,
        text_from=text_from,
        image_sha256=prints["image"],
        text_sha256=prints["text"],
        sha256=prints["model"],
        defense=defense,
        trained_on=trained_on,
        parents=parents,
        parameters=sum(parameter.numel() for parameter in model.visual.parameters()),
        recipe=dict(recipe or {}),
        training=dict(training or {}),
    )


def save_folder(
    folder: Path, model: Clip, card: CheckpointCard, trained_tokens: frozenset[int] | None = None
) -> None:
    """Write the folder; the card comes last, so a folder that has a card is complete.

    Args:
        folder: created if needed.
        model: its image tower is written, and its text tower when `trained_tokens` is given.
        card: from `describe`.
        trained_tokens: ids of the token rows to store with the text tower.
    """
    card = with_canary(model, card)
    visual = {name: value.detach().cpu().contiguous() for name, value in model.visual.state_dict().items()}
    store.write(folder / "image.safetensors", save(visual))
    if trained_tokens is not None:
        state = {
            name: value.detach().cpu().contiguous() for name, value in model.language.state_dict().items()
        }
        ids = torch.tensor(sorted(trained_tokens), dtype=torch.int64)
        state[TOKENS] = state[TOKENS][ids].contiguous()
        store.write(folder / "text.safetensors", save({**state, "token_ids": ids}))
    learned = prompts.state(model.language)
    if learned:
        rows = {name: value.detach().cpu().contiguous() for name, value in learned.items()}
        store.write(folder / "prompts.safetensors", save(rows))
    store.write_json(folder / "card.json", card.model_dump(mode="json"))


def with_canary(model: Clip, card: CheckpointCard) -> CheckpointCard:
    """The card with its canary; where it has none, the canary is computed now, on the CPU."""
    if card.canary is not None:
        return card
    device = model.device
    try:
        return card.model_copy(update={"canary": take(model.cpu())})
    finally:
        model.to(device)


def spread_rows(rows: Tensor, ids: Tensor, language: nn.Module) -> Tensor:
    """The (vocabulary, D) token table of `language`: `rows` at `ids`, and their mean in all other rows."""
    vocabulary = dict(language.named_parameters())[TOKENS].shape[0]
    table = rows.mean(0, keepdim=True).repeat(vocabulary, 1)
    table[ids] = rows
    return table


def read_card(folder: Path) -> CheckpointCard:
    """The card of a checkpoint folder.

    Raises:
        WeightsError: no card, or a card of another schema.
        CardError: unknown or missing keys.
    """
    path = folder / "card.json"
    if not path.is_file():
        raise WeightsError(f"model {folder}", "no card.json", "a folder that vlmrob wrote, or ARCH:TAG")
    table = store.read_json(path)
    if not isinstance(table, dict) or table.get("schema_version") != SCHEMA:
        raise WeightsError(str(path), "not a checkpoint card of this schema", SCHEMA)
    return reader.parse(table, CheckpointCard, str(path))  # type: ignore[type-var]


def fill(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load tensors strictly: the names and shapes must be those of the module.

    Raises:
        WeightsError: a tensor is missing, unexpected or of another shape; the message names the first.
    """
    own = module.state_dict()
    for name in sorted(own.keys() - state.keys()):
        raise WeightsError(where, f"tensor {name!r} is missing", "the architecture that its card names")
    for name in sorted(state.keys() - own.keys()):
        raise WeightsError(
            where, f"tensor {name!r} is not of this architecture", "the one that its card names"
        )
    for name, value in own.items():
        if value.shape != state[name].shape:
            shapes = f"tensor {name!r} has shape {tuple(state[name].shape)}"
            raise WeightsError(
                where, shapes, f"{tuple(value.shape)}: this is a checkpoint of another architecture"
            )
    module.load_state_dict(state, strict=True)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        WeightsError: missing, or not safetensors.
    """
    try:
        text_files.require_regular(path)
        state: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise WeightsError(str(path), "no such file", "the weights that card.json describes") from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(str(path), f"not a whole safetensors file ({error})", do="copy it again") from None
    return state


def fill_text(module: nn.Module, path: Path) -> frozenset[int]:
    """Load a stored text tower and return the ids of the token rows that were trained."""
    state = read_state(path)
    if "token_ids" not in state or TOKENS not in state:
        raise WeightsError(str(path), "no token table with ids", "a text tower that vlmrob wrote")
    ids, rows = state.pop("token_ids"), state[TOKENS]
    vocabulary, width = dict(module.named_parameters())[TOKENS].shape
    if ids.dtype != torch.int64 or not ((ids >= 0) & (ids < vocabulary)).all():
        raise WeightsError(str(path), "a token id outside the vocabulary", f"ids from 0 to {vocabulary - 1}")
    if rows.shape != (len(ids), width):
        raise WeightsError(str(path), f"token rows of shape {tuple(rows.shape)}", f"({len(ids)}, {width})")
    state[TOKENS] = spread_rows(rows, ids, module)
    fill(module, state, str(path))
    return frozenset(int(i) for i in ids)


def fill_prompts(language: nn.Module, path: Path) -> None:
    """Load the prompts of a text tower, strictly.

    Raises:
        WeightsError: a tensor is missing, unexpected or of another shape; the message names the first.
    """
    own, saved = prompts.state(language), read_state(path)
    for name in sorted(own.keys() ^ saved.keys()):
        raise WeightsError(str(path), f"prompt {name!r} is in one of file and card only", "the same in both")
    with torch.no_grad():
        for name, value in own.items():
            if value.shape != saved[name].shape:
                shapes = f"prompt {name!r} has shape {tuple(saved[name].shape)}"
                raise WeightsError(str(path), shapes, str(tuple(value.shape)))
            value.copy_(saved[name])


def check(model: Clip, card: CheckpointCard, where: str) -> None:
    """Compare a model on the CPU with the hashes and the canary in its card.

    Raises:
        WeightsError: a hash differs, so the weights are not the card's; or the canary differs, so the same
            weights give other outputs.
    """
    prints = model.fingerprints()
    for part, stated in (("image", card.image_sha256), ("text", card.text_sha256), ("model", card.sha256)):
        if prints[part] != stated:
            raise WeightsError(
                where, f"{part} fingerprint is {prints[part][:12]}", f"{stated[:12]} as in card.json"
            )
    if card.canary is not None:
        check_canary(model, card.canary, where)


def open_folder(folder: Path, card: CheckpointCard, text: Clip | None) -> Clip:
    """The model of a checkpoint folder on the CPU, whose hashes and canary are those of `card`.

    Args:
        folder: with `image.safetensors`, and `text.safetensors` if the text tower is its own.
        card: of that folder.
        text: the model that `card.text_from` names, whose text tower is shared; `None` if there is none.

    Raises:
        WeightsError: weights that do not fit the card.
    """
    model = openclip.build(card.arch, quick_gelu=card.quick_gelu)
    preprocess = Preprocess(**card.preprocess.model_dump())
    if preprocess.image_size != model.image_size:
        raise WeightsError(
            str(folder / "card.json"),
            f"preprocess.image_size is {preprocess.image_size}",
            f"{model.image_size}, the input of {card.arch}",
        )
    if text is None:
        trained: frozenset[int] | None = fill_text(model.language, folder / "text.safetensors")
    else:
        trained = text.facts.trained_tokens
    model = model.replaced(
        preprocess=preprocess,
        language=model.language if text is None else text.language,
        logit_scale=card.logit_scale,
        facts=replace(model.facts, trained_tokens=trained),
    )
    if card.prompts is not None:
        model = prompts.attach(model, PromptSizes(**card.prompts.model_dump()))
        if card.prompts.text:
            fill_prompts(model.language, folder / "prompts.safetensors")
    image = folder / "image.safetensors"
    fill(model.visual, read_state(image), str(image))
    return model.eval()
