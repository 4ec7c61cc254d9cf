"""Class names and templates -> text bank: one unit text embedding a class."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the customary name

from robustbench_vlm import devices, tensor_files
from robustbench_vlm.errors import InputError, WeightsError
from robustbench_vlm.models.context_length import Tokenize, require_distinct
from robustbench_vlm.store import cache_folder, fingerprint
from robustbench_vlm.types import TEMPLATES

TEXT_ROWS = 64
"""Fixed shape of a call of the text tower, so that a bank does not depend on how it is cut."""


class TextEncoder(Protocol):
    """The text half of an encoder, as far as a text bank needs it."""

    tokenize: Tokenize

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        ...

    def text(self, sentences: Sequence[str]) -> Tensor:
        """N sentences -> (N, D) float32, unit length, without gradient."""
        ...

    def text_fingerprint(self) -> str:
        """Hash of everything that decides a text embedding."""
        ...

    def untrained_words(self, sentences: Sequence[str]) -> list[str]:
        """Sentences with a token that the text tower never met in training."""
        ...


def render(names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """The sentences of each class: every template with `{c}` replaced by the name."""
    return [[template.replace("{c}", name) for template in templates] for name in names]


def require_sentences(names: Sequence[str], templates: Sequence[str]) -> None:
    """Refuse class names and templates that make no text bank.

    Raises:
        InputError: a single string, an empty list, an entry that is no string, or a template without `{c}`.
    """
    for where, given, example in (
        ("class_names", names, '["cat", "dog"]'),
        ("templates", templates, str(list(TEMPLATES))),
    ):
        if isinstance(given, str) or not given or not all(isinstance(entry, str) for entry in given):
            raise InputError(where, f"{given!r:.60}", f"a list of strings such as {example}")
    for template in templates:
        if "{c}" not in template:
            do = "write {c} where the class name goes"
            raise InputError("templates", f"{template!r:.60} without {{c}}", TEMPLATES[0], do)


def untrained(model: TextEncoder, names: Sequence[str], template: str) -> list[str]:
    """What has a word that the text tower never met in training: the template as it stands, class names."""
    found = set(model.untrained_words(names))
    around = [template] if model.untrained_words([template.replace("{c}", "")]) else []
    return [*around, *(name for name in names if name in found)]


def text_bank(model: TextEncoder, sentences: Sequence[Sequence[str]]) -> Tensor:
    """One unit row per class: normalise each sentence's embedding, average, normalise again.

    This is the prompt ensemble of CLIP (Radford et al. 2021, section 3.1.4). The bank is stored on disk under
    the fingerprint of the text encoder, its sentences and the kernels that encode them, since encoding the
    80,000 sentences of ImageNet costs as much as an attack. So a bank has the same bits whether it was stored
    or not.

    Args:
        model: whose text tower encodes the sentences.
        sentences: those of each of C classes.

    Returns:
        (C, D) float32 on the model's device.

    Raises:
        InputError: two classes whose sentences differ only behind the end of the tower's context.
    """
    require_distinct(model.tokenize, sentences)
    key, path = _place(model, sentences)
    try:
        bank = _stored(path, key)
    except (OSError, WeightsError):  # not there yet, or not as it was written: encode and write it
        flat = [sentence for group in sentences for sentence in group]
        embeddings = model.text(flat).cpu()
        sizes = [len(group) for group in sentences]
        bank = torch.stack([F.normalize(part.mean(0), dim=0) for part in torch.split(embeddings, sizes)])
        with suppress(OSError):  # a folder that cannot be written costs time, never the run
            tensor_files.write(path, {"bank": bank}, {"key": key})
    return bank.to(model.device)


def calls(model: TextEncoder, sentences: Sequence[Sequence[str]]) -> int:
    """How often the text tower is called to make a bank; 0 if there is a file of it, whatever its content."""
    _, path = _place(model, sentences)
    return 0 if path.is_file() else -(-sum(map(len, sentences)) // TEXT_ROWS)


def _place(model: TextEncoder, sentences: Sequence[Sequence[str]]) -> tuple[str, Path]:
    """The key of a bank, and the file in which it is stored."""
    texts = [list(group) for group in sentences]
    facts = {"text": model.text_fingerprint(), "sentences": texts, **devices.kernels(model.device)}
    key = fingerprint(facts)
    return key, cache_folder() / "text" / f"{key}.safetensors"


def _stored(path: Path, key: str) -> Tensor:
    """A bank of the cache.

    Raises:
        WeightsError: missing, changed, of another key, or of before banks had a checksum.
    """
    found = tensor_files.read(path)
    if not found.sealed or found.facts.get("key") != key or "bank" not in found.tensors:
        raise WeightsError(str(path), "not the text bank that was stored there", do="delete it")
    return found.tensors["bank"]
