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
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from robustbench_vlm import store, text_files
from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models import configuration, loaded_towers, openclip, prompts
from robustbench_vlm.models.canary import check_canary, take
from robustbench_vlm.models.checkpoint_card import (
    EARLIER,
    SCHEMA,
    CheckpointCard,
    Parent,
    PreprocessFacts,
    PromptFacts,
)
from robustbench_vlm.models.clip import Clip, PromptSizes
from robustbench_vlm.models.preprocess import Preprocess

TOKENS = "net.token_embedding.weight"
TABLE = "token_embedding.weight"  # last parts of the name of the token table, wherever the tower has it


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
        logit_bias=model.logit_bias,
        config=dict(facts.config),
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
        ids, table = torch.tensor(sorted(trained_tokens), dtype=torch.int64), token_table(model.language)
        state[table] = state[table][ids].contiguous()
        if hasattr(model.tokenize, "save_pretrained"):  # a tokenizer of transformers, made of files
            model.tokenize.save_pretrained(str(folder))
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


def token_table(language: nn.Module) -> str:
    """The name of the token table among the parameters of a text tower.

    Raises:
        WeightsError: a text tower without a table of that name, as those of transformers.
    """
    names = [name for name, _ in language.named_parameters() if name.endswith(TABLE)]
    if len(names) != 1:
        raise WeightsError(
            "text tower", f"{len(names)} token tables", "one, as in the text towers of open_clip"
        )
    return names[0]


def spread_rows(rows: Tensor, ids: Tensor, language: nn.Module) -> Tensor:
    """The (vocabulary, D) token table of `language`: `rows` at `ids`, and their mean in all other rows."""
    vocabulary = dict(language.named_parameters())[token_table(language)].shape[0]
    table = rows.mean(0, keepdim=True).repeat(vocabulary, 1)
    table[ids] = rows
    return table


def fill(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load tensors strictly: the names and shapes must be those of the module.

    Raises:
        WeightsError: a tensor is missing, unexpected, of another shape or not finite; the message names the
            first.
    """
    own = module.state_dict()
    for name in sorted(own.keys() - state.keys()):
        expected, do = (
            "the architecture that its card names",
            "copy the checkpoint again, or convert it again",
        )
        raise WeightsError(where, f"tensor {name!r} is missing", expected, do)
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
    loaded_towers.require_finite(state, where)
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
    state, table = read_state(path), token_table(module)
    if "token_ids" not in state or table not in state:
        raise WeightsError(str(path), "no token table with ids", "a text tower that vlmrob wrote")
    ids, rows = state.pop("token_ids"), state[table]
    vocabulary, width = dict(module.named_parameters())[table].shape
    if ids.dtype != torch.int64 or not ((ids >= 0) & (ids < vocabulary)).all():
        raise WeightsError(str(path), "a token id outside the vocabulary", f"ids from 0 to {vocabulary - 1}")
    if rows.shape != (len(ids), width):
        raise WeightsError(str(path), f"token rows of shape {tuple(rows.shape)}", f"({len(ids)}, {width})")
    state[table] = spread_rows(rows, ids, module)
    fill(module, state, str(path))
    return frozenset(int(i) for i in ids)


def fill_prompts(language: nn.Module, saved: Mapping[str, Tensor], where: str) -> None:
    """Load the prompts of a text tower, strictly.

    Raises:
        WeightsError: a tensor is missing, unexpected or of another shape; the message names the first.
    """
    own = prompts.state(language)
    for name in sorted(own.keys() ^ saved.keys()):
        raise WeightsError(where, f"prompt {name!r} is in one of file and card only", "the same in both")
    with torch.no_grad():
        for name, value in own.items():
            if value.shape != saved[name].shape:
                shapes = f"prompt {name!r} has shape {tuple(saved[name].shape)}"
                raise WeightsError(where, shapes, str(tuple(value.shape)))
            value.copy_(saved[name])


def check(model: Clip, card: CheckpointCard, where: str) -> None:
    """Compare a model on the CPU with the hashes and the canary in its card.

    Raises:
        WeightsError: a hash differs, so the weights are not the card's; or the canary differs, so the same
            weights give other outputs.
    """
    prints = model.fingerprints()
    if card.schema_version == EARLIER:
        prints["model"] = _earlier_fingerprint(model, prints)
    for part, stated in (("image", card.image_sha256), ("text", card.text_sha256), ("model", card.sha256)):
        if prints[part] != stated:
            found, do = (
                f"{part} fingerprint is {prints[part][:12]}",
                "copy the folder again, or train it again",
            )
            raise WeightsError(where, found, f"{stated[:12]} as in card.json", do)
    if card.canary is not None:
        check_canary(model, card.canary, where)


def _earlier_fingerprint(model: Clip, prints: Mapping[str, str]) -> str:
    """The fingerprint of a whole model as version 1 of the card has it."""
    names = ("image_size", "mean", "std", "antialias")
    return store.fingerprint(
        {
            "image": prints["image"],
            "text": prints["text"],
            "preprocess": {name: getattr(model.preprocess, name) for name in names},
            "logit_scale": model.logit_scale,
            "arch": model.facts.arch,
            "quick_gelu": model.facts.quick_gelu,
        }
    )


def of_today(card: CheckpointCard, model: Clip) -> CheckpointCard:
    """The card of a checked model in the current version, with its fingerprint of today."""
    if card.schema_version == SCHEMA:
        return card
    changes = {"schema_version": SCHEMA, "sha256": model.fingerprints()["model"]}
    return card.model_copy(update=changes | {"config": dict(model.facts.config)})


def open_folder(folder: Path, card: CheckpointCard, text: Clip | None) -> Clip:
    """The model of a checkpoint folder on the CPU, whose hashes and canary are those of `card`.

    Args:
        folder: with `image.safetensors`, and `text.safetensors` if the text tower is its own.
        card: of that folder.
        text: the model that `card.text_from` names, whose text tower is shared; `None` if there is none.

    Raises:
        WeightsError: weights that do not fit the card.
    """
    tokenize = None if text is None else text.tokenize
    stated = {**card.config} or None
    if tokenize is None and stated is not None:
        tokenize = configuration.tokenizer(stated.get("text_cfg", {}), (folder,), f"model {folder}")
    model = openclip.build(card.arch, quick_gelu=card.quick_gelu, stated=stated, tokenize=tokenize)
    preprocess = Preprocess(**card.preprocess.model_dump())
    if preprocess.image_size != model.image_size:
        raise WeightsError(
            str(folder / "card.json"),
            f"preprocess.image_size is {preprocess.image_size}",
            f"{model.image_size}, the input of {card.arch}",
        )
    if text is None:
        trained: frozenset[int] | None = fill_text(model.language, folder / "text.safetensors")
        facts = replace(model.facts, trained_tokens=trained)
    else:
        facts = replace(model.facts, trained_tokens=text.facts.trained_tokens, text=text.facts.text)
    model = model.replaced(
        preprocess=preprocess,
        language=model.language if text is None else text.language,
        logit_scale=card.logit_scale,
        logit_bias=card.logit_bias,
        facts=facts,
    )
    if card.prompts is not None:
        model = prompts.attach(model, PromptSizes(**card.prompts.model_dump()))
        if card.prompts.text:
            path = folder / "prompts.safetensors"
            fill_prompts(model.language, read_state(path), str(path))
    image = folder / "image.safetensors"
    fill(model.visual, read_state(image), str(image))
    return model.eval()
