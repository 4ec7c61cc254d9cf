"""Download datasets from the hub: one split and the text files, at a pinned commit, checked by hash.

Files are collected in `<folder>/.fetch/`; the split gets its own name when all its files are there and
correct. A killed download continues where it was, and no existing file is overwritten.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from robustbench_vlm import store
from robustbench_vlm.cards import reader
from robustbench_vlm.cards.dataset import DatasetCard
from robustbench_vlm.data import hub, manifest, miniature
from robustbench_vlm.errors import DataError

PARTS = ".fetch"
COLUMNS = ("dataset", "repository", "commit", "licence", "files", "MB", "still to fetch, MB")
MARGIN = 2**28  # bytes of disk that stay free

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Parcel:
    """The files to download for one dataset.

    Attributes:
        files: of the split, and the text files.
        left: bytes of them that are not on disk yet.
        pinned: whether the card or an earlier download names the commit.
    """

    card: DatasetCard
    split: str
    at: hub.Commit
    files: tuple[hub.File, ...]
    left: int
    pinned: bool

    @property
    def texts(self) -> list[str]:
        """The values of `COLUMNS`."""
        size = sum(file.size for file in self.files)
        licence = f"{self.card.licence}; hub: {self.at.licence or 'not stated'}"
        counts = [str(len(self.files)), f"{size / 1e6:.1f}", f"{self.left / 1e6:.1f}"]
        return [self.card.name, self.at.repo, self.at.sha[:12], licence, *counts]


def present(card: DatasetCard, root: Path, split: str) -> bool:
    """Whether the split is there, by its name."""
    return (root / card.folder / split / "nshards.txt").is_file()


def plan(card: DatasetCard, root: Path, split: str, where: hub.Site) -> Parcel:
    """The files of a dataset on the hub, and how many bytes are missing here; nothing is downloaded.

    The commit is the card's, else that of an earlier download into the same folder, else the newest.

    Raises:
        DataError: the card names no repository; a miniature or other files are in the way; or the repository
            has no such split.
        Incomplete: no connection.
    """
    folder = root / card.folder
    if not card.source.hub:
        raise DataError(f"dataset {card.name}", "no hub repository", do=_by_hand(card, root))
    if (folder / miniature.MARKER).exists():
        raise DataError(str(folder), "a miniature with generated images", "none", "choose another --root")
    if (folder / split).is_dir() and not present(card, root, split):
        do = "move it away, or choose another --root"
        raise DataError(str(folder / split), "files that no fetch has finished", "a whole split or none", do)
    known = manifest.read(folder)
    pinned = card.source.revision or (known.revision if known else "") or _begun(folder)
    at = hub.commit(where, card.source.hub, pinned or "main")
    files = tuple(_wanted(hub.files(where, at), split, f"{at.repo} at {at.sha[:12]}"))
    left = sum(file.size - min(file.size, _there(folder, file)) for file in files)
    return Parcel(card, split, at, files, left, bool(pinned))


def require_space(parcels: list[Parcel], root: Path) -> None:
    """Refuse downloads that do not fit on the disk, before the first byte.

    Raises:
        DataError: the message gives the bytes needed and free.
    """
    existing = next(path for path in (root, *root.absolute().parents) if path.exists())
    needed, free = sum(parcel.left for parcel in parcels) + MARGIN, shutil.disk_usage(existing).free
    if needed > free:
        found = f"{free / 1e9:.1f} GB free"
        raise DataError(str(root), found, f"{needed / 1e9:.1f} GB", "free some, or choose another --root")


def fetch(parcel: Parcel, root: Path, where: hub.Site, report: Report) -> None:
    """Download the missing files of a parcel, verify every file by size and hash, and write the manifest.

    Raises:
        DataError: a file on disk or from the server is not the listed one.
        Incomplete: the connection was lost; the same call continues.
    """
    folder = root / parcel.card.folder
    parts = folder / PARTS
    total = sum(file.size for file in parcel.files)
    store.write(parts / "commit", parcel.at.sha.encode())
    done, facts = 0, {}
    for file in parcel.files:

        def meter(there: int, before: int = done) -> None:
            report(f"fetch {parcel.card.name}", before + there, total)

        final, part = folder / file.path, parts / file.path
        if final.exists():
            facts[file.path] = (file.size, _same(final, file, parcel.at))
        elif part.exists():
            facts[file.path] = (file.size, _same(part, file, parcel.at))
        else:
            facts[file.path] = (file.size, hub.download(where, parcel.at, file, part, meter))
        done += file.size
        meter(0, done)
    for file in parcel.files:  # texts first: a folder with the split's own name is whole
        if "/" not in file.path and (parts / file.path).exists():
            (parts / file.path).replace(folder / file.path)
    if (parts / parcel.split).is_dir():
        (parts / parcel.split).replace(folder / parcel.split)
    known = manifest.read(folder) or manifest.Manifest(parcel.card.name)
    fetched = manifest.Manifest(parcel.card.name, parcel.at.repo, parcel.at.sha, known.files, known.images)
    manifest.write(folder, fetched.with_files(facts))
    (parts / "commit").unlink()
    if not any(parts.iterdir()):
        parts.rmdir()


def _wanted(files: list[hub.File], split: str, where: str) -> list[hub.File]:
    """The text files and the shards of a split, without the other files of a repository."""
    shard = re.compile(rf"{re.escape(split)}/(nshards\.txt|\d{{1,7}}\.tar)")
    chosen = [
        file
        for file in files
        if shard.fullmatch(file.path) or (file.path.endswith(".txt") and "/" not in file.path)
    ]
    chosen = [file for file in chosen if hub.plain(file.path)]
    if not any(file.path == f"{split}/nshards.txt" for file in chosen):
        raise DataError(where, f"no {split}/nshards.txt", "the clip-benchmark layout", "check card and split")
    return sorted(chosen, key=lambda file: ("/" in file.path, file.path))  # texts first


def _begun(folder: Path) -> str:
    """The commit of an interrupted download; empty if there is none."""
    path = folder / PARTS / "commit"
    text = path.read_bytes()[:64].decode("ascii", "replace") if path.exists() else ""
    return text if re.fullmatch("[0-9a-f]{40}", text) else ""


def _there(folder: Path, file: hub.File) -> int:
    """Bytes of a file that are on disk already."""
    part = folder / PARTS / file.path
    for path in (folder / file.path, part, part.with_name(part.name + ".part")):
        if path.exists():
            return path.stat().st_size
    return 0


def _same(path: Path, file: hub.File, at: hub.Commit) -> str:
    """SHA-256 of a file on disk, which must be that of the commit."""
    sha = hub.hashed(path, file)
    if sha is None:
        found, do = f"another file than that of {at.repo} at {at.sha[:12]}", "move it away and fetch again"
        raise DataError(str(path), found, f"{file.size} bytes with its hash", do)
    return sha


def _by_hand(card: DatasetCard, root: Path) -> str:
    where = f"get it from {card.source.url}, then type: " if card.source.url else "type: "
    to, name = shlex.quote(str(root)), reader.plain_name(card.name)
    return f"{where}vlmrob data export FOLDER --to {to} --name {name} (licence: {card.licence})"
