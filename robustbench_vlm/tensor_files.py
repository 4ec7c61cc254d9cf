"""Tensor files that the package writes for itself: safetensors with a checksum that the reader checks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from robustbench_vlm import store
from robustbench_vlm.errors import WeightsError

CHECKSUM = "sha256"
"""The entry of a file's metadata that has the checksum of its tensors and of the other entries."""


@dataclass(frozen=True)
class TensorFile:
    """What is in a tensor file.

    Attributes:
        tensors: by name, on the CPU.
        facts: what the file says about itself, as text.
        sealed: whether it has a checksum; files of before there were checksums have none.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, str]
    sealed: bool


def checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of tensors, and of the facts beside them."""
    digest = hashlib.sha256(store.canonical(dict(facts)))
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(store.canonical([name, str(value.dtype), list(value.shape)]))
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write tensors and facts with their checksum, whole or not at all; equal content gives equal bytes."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    content = save(plain, metadata={**facts, CHECKSUM: checksum(plain, facts)})
    header, values = _sorted_metadata(content)
    store.write(path, header, values)


def _sorted_metadata(content: bytes) -> tuple[bytes, memoryview]:
    """The header of a safetensors file with its metadata in sorted order, and the rest of the file.

    The library keeps the metadata in a hash map, so their order differs from one call to the next. A file
    begins with the length of its header, as 8 bytes; the header is JSON, with spaces up to a multiple of 8.
    """
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, memoryview(content)[8 + length :]


def read(path: Path, do: str = "delete it") -> TensorFile:
    """The content of a tensor file, compared with its checksum if it has one.

    Args:
        path: the file.
        do: what to do about a damaged file, for the message.

    Raises:
        WeightsError: missing, not safetensors, or other content than its checksum says.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise WeightsError(str(path), "no such file", "a file written by vlmrob") from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(str(path), f"not a whole safetensors file ({error})", do=do) from None
    stated = facts.pop(CHECKSUM, None)
    if stated is not None and stated != checksum(tensors, facts):
        found = "its content does not match its checksum"
        raise WeightsError(str(path), found, "the file as it was written", do)
    return TensorFile(tensors, facts, stated is not None)
