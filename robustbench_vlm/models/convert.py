"""Weights of other programs -> a checkpoint folder with card and canary, which is loaded once as a check."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from robustbench_vlm import store
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.model import ModelCard
from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models import checkpoint, checkpoint_card, model_ids, zoo
from robustbench_vlm.models.checkpoint_card import CheckpointCard, Parent
from robustbench_vlm.models.foreign import weights_file


def convert(
    source: Path,
    out: Path,
    known: ModelCard,
    limits: Mapping[str, int] | None = None,
) -> CheckpointCard:
    """Write the checkpoint folder `out` of a weights file or a folder of transformers.

    Args:
        source: a weights file, which is read as data in a separate process, or a folder of transformers.
        out: the new folder; must contain no checkpoint yet.
        known: name, base, defense and training data; an empty `trained_on` means unknown.
        limits: `memory` in bytes and `seconds` of the reading process.

    Returns:
        The card that was written.

    Raises:
        WeightsError: refused, damaged, or of another architecture; nothing is written then.
    """
    if (out / "card.json").exists():
        raise WeightsError(f"--out {out}", "a checkpoint is there already", "a new folder")
    if known.sha256 and source.is_file() and (found := store.file_sha256(source)) != known.sha256:
        raise WeightsError(str(source), f"SHA-256 {found[:12]}", f"{known.sha256[:12]} as in its card")
    parents: tuple[Parent, ...] = ()
    if source.is_dir() and model_ids.is_transformers(source):
        made = weights_file.from_transformers(source)
    else:
        if not model_ids.is_weights(source.name):
            expected = f"a file in {', '.join(model_ids.WEIGHTS)}, or a folder of transformers"
            raise WeightsError(str(source), "neither weights by its name nor a model's folder", expected)
        made, base = zoo.read_file(source, known.base, limits)
        if base is not None:
            facts = {"model": base.card.name, "sha256": base.card.sha256, "trained_on": base.card.trained_on}
            parents = (Parent.model_validate({"role": "base", **facts}),)
    digest = store.file_sha256(source) if source.is_file() else ""
    card = checkpoint.describe(
        made.model,
        known.name,
        defense=known.defense,
        trained_on=known.trained_on or None,
        text_from="" if made.own_text else zoo.address(known.base),
        parents=parents,
        recipe={"inner": {"eps": known.eps, "norm": known.norm}} if known.eps else {},
        training={
            "source": known.source or source.name,
            "source_sha256": digest,
            "scheme": made.scheme,
            "left_out": list(made.old),
        },
    )
    rows: frozenset[int] | None = None
    if made.own_text:
        language = made.model.language
        rows = frozenset(range(len(language.get_parameter(checkpoint.token_table(language)))))
    checkpoint.save_folder(out, made.model, card, rows)
    return zoo.load(str(out)).card


def unlisted(name: str, base: str, defense: str, trained_on: tuple[str, ...]) -> ModelCard:
    """The card of weights that are not listed under `models`."""
    facts = {"name": name, "title": name, "defense": defense, "base": base, "trained_on": trained_on}
    return ModelCard.model_validate({**facts, "loader": "weights", "source": "", "licence": "unknown"})


def listed(name: str) -> ModelCard:
    """The card of a public checkpoint."""
    return reader.read("models", name, ModelCard)


def add_canary(name: str) -> Path:
    """Compute the canary of a checkpoint folder or packaged checkpoint anew and write it into its card.

    Returns:
        The card's path.

    Raises:
        WeightsError: no such folder, or weights that do not fit its card.
    """
    folder = model_ids.folder_of(name)
    if folder is None:
        raise WeightsError(f"model {name!r}", "no packaged checkpoint or folder", "a folder with a card.json")
    bare = checkpoint_card.read_card(folder).model_copy(update={"canary": None})
    model = zoo.open_folder(name, folder, bare)
    card = checkpoint.with_canary(model, checkpoint.of_today(bare, model))
    store.write_json(folder / "card.json", card.model_dump(mode="json"))
    return folder / "card.json"
