"""The files of a dataset when it was last known to be whole: names, sizes and SHA-256.

The manifest is `manifest.json` beside the splits. A download writes it from the hub's listing, and the first
check from the files it has read; every later check compares the folder with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from robustbench_vlm import store
from robustbench_vlm.errors import DataError

FILE = "manifest.json"
SCHEMA = "vlmrob-manifest/1"


@dataclass(frozen=True)
class Manifest:
    """Files of a dataset's folder.

    Attributes:
        dataset: name of the card.
        hub: repository that they were fetched from; empty for others.
        revision: its commit.
        files: (bytes, SHA-256 in hex) by path below the folder.
        images: images of each split that was checked.
    """

    dataset: str
    hub: str = ""
    revision: str = ""
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)

    def with_files(self, files: dict[str, tuple[int, str]]) -> Manifest:
        """The manifest with these files added or replaced."""
        return replace(self, files=self.files | files)

    def with_images(self, split: str, count: int) -> Manifest:
        """The manifest with the number of images of a split."""
        return replace(self, images=self.images | {split: count})


def read(folder: Path) -> Manifest | None:
    """The manifest of a folder; `None` if it was never checked.

    Raises:
        DataError: the file there is no manifest.
    """
    path = folder / FILE
    if not path.exists():
        return None
    table = store.read_json(path)
    try:
        return _parsed(table)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(str(path), "not a manifest", SCHEMA, "delete it and check again") from None


def _parsed(table: dict[str, Any]) -> Manifest:
    if table["schema"] != SCHEMA:
        raise ValueError(table["schema"])
    files = {str(path): (int(fact["size"]), str(fact["sha256"])) for path, fact in table["files"].items()}
    images = {str(split): int(count) for split, count in table["images"].items()}
    return Manifest(str(table["dataset"]), str(table["hub"]), str(table["revision"]), files, images)


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder, paths sorted."""
    files = {path: {"size": size, "sha256": sha} for path, (size, sha) in sorted(manifest.files.items())}
    facts = {"dataset": manifest.dataset, "hub": manifest.hub, "revision": manifest.revision}
    images = dict(sorted(manifest.images.items()))
    store.write_json(folder / FILE, {"schema": SCHEMA, **facts, "images": images, "files": files})


def files_of(folder: Path, split: str) -> list[Path]:
    """Every file of a split and every text file of the folder, sorted, without hidden files."""
    found = [path for path in folder.glob("*.txt") if path.is_file()]
    found += [path for path in (folder / split).rglob("*") if path.is_file()]
    hidden = (path for path in found if any(part[0] == "." for part in path.relative_to(folder).parts))
    return sorted(set(found) - set(hidden))


def facts(folder: Path, paths: Iterable[Path]) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of files by path below `folder`."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, store.file_sha256(path)) for path in paths
    }


def differences(known: Manifest, found: dict[str, tuple[int, str]], split: str) -> list[str]:
    """One line for each file of a split, or of the folder itself, that has changed; sorted by path."""
    expected = {path for path in known.files if "/" not in path or path.startswith(f"{split}/")}
    whole = any(path.startswith(f"{split}/") for path in expected)  # else only other splits were checked
    lines = []
    for path in sorted(expected | found.keys()):
        if path not in found:
            lines.append(f"{path}: missing; the manifest has it")
        elif path not in known.files:
            if whole:
                lines.append(f"{path}: not in the manifest")
        elif found[path] != known.files[path]:
            (size, sha), (was, had) = found[path], known.files[path]
            what = f"{size} bytes, {was}" if size != was else f"SHA-256 {sha[:12]}, {had[:12]}"
            lines.append(f"{path}: {what} in the manifest")
    return lines
