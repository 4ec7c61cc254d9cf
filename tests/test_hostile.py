"""Files made to hurt: none runs anything, none ends in a traceback, each is one line with a reason."""

import io
import pickle
import struct
import sys
import tarfile
import zlib

import numpy as np
import pytest
from folders import NAMES, TEMPLATES, encode, noise, tar_bytes
from PIL import Image

from robustbench_vlm import cli
from robustbench_vlm.cards import reader
from robustbench_vlm.data import layout

CARD = f"""name = "toy"
title = "Toy"
folder = "wds_toy"
n_classes = 3
size = {{}}
canvas = "native"
native_px = 8
names = {list(NAMES)}
templates = {list(TEMPLATES)}
licence = "none"
"""
PNG = encode(noise(0))
RAN = "a hostile file ran"


class Bomb:
    def __reduce__(self):
        return (pytest.fail, (RAN,))


def pair(image=PNG, label=b"0", name="s0", suffix="png"):
    return [(f"{name}.{suffix}", image), (f"{name}.cls", label)]


def shard(*members, form=tarfile.USTAR_FORMAT):
    return tar_bytes([*members], form)


def patched(content, where, field):
    """A tar with a header field replaced and its checksum made right again."""
    block = bytearray(content)
    block[where : where + len(field)] = field
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block[:512]):06o}\0 ".encode()
    return bytes(block)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, data, depth=8, colour=2):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def member(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


LINK = member("s0.png", tarfile.SYMTYPE, "/etc/passwd")
SHARDS = {
    "pickle only": shard(("s0.pkl", pickle.dumps(Bomb())), ("s0.cls", b"0")),
    "pickle as shard": pickle.dumps(Bomb()),
    "link as image": shard((LINK, None), ("s0.cls", b"0")),
    "hard link as image": shard((member("s0.png", tarfile.LNKTYPE, "s0.cls"), None), ("s0.cls", b"0")),
    "fifo as label": shard(("s0.png", PNG), (member("s0.cls", tarfile.FIFOTYPE), None)),
    "shell as name": shard(*pair(name="$(touch ran)"), ("s1.png", PNG)),
    "pipe as name": shard(("pipe:touch ran.png", PNG)),
    "escape codes as name": shard(*pair(name="\x1b[2J")),
    "line break as name": shard(*pair(name="a\nb")),
    "negative size": patched(shard(*pair()), 124, b"\xff" * 12),
    "size past the end": patched(shard(*pair()), 124, b"77777777777\0"),
    "huge base-256 size": patched(shard(*pair()), 124, b"\x80" + b"\x7f" * 11),
    "header of nines": b"9" * 4096,
    "gzip": b"\x1f\x8b\x08" + bytes(600),
    "zip": b"PK\x03\x04" + bytes(600),
    "web page": b"<!DOCTYPE html><script>alert(1)</script>".ljust(2048),
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "two archives": shard(*pair()) + shard(*pair(name="s1")),
    "endless label": shard(*pair(label=b"1" * 10**6)),
    "code as label": shard(*pair(label=b"__import__('os').system('touch ran')")),
    "label of another alphabet": shard(*pair(label="\u0663".encode())),
    "pax header bomb": shard((tarfile.TarInfo("x" * 5000), b""), *pair()[:1], form=tarfile.PAX_FORMAT),
    "endless stored key": shard(*pair(), ("s0.key", b"k" * 10**6)),
    "traversal and no label": shard(("../../ran.png", PNG)),
}
IMAGES = {
    "pixel bomb": png(60000, 60000, zlib.compress(bytes(1000))),
    "inflating text": PNG[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8))) + PNG[33:],
    "sides of zero": png(0, 0, b""),
    "eps with code": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(ran) (w) file\n",
    "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>x</script></svg>',
    "cut tiff": saved(Image.fromarray(noise(1)), "TIFF")[:150],
    "ico": saved(Image.fromarray(noise(1)), "ICO"),
    "float tiff": saved(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"),
    "pickle": pickle.dumps(Bomb()),
    "cut png": PNG[: len(PNG) // 2],
    "cut jpeg": saved(Image.fromarray(noise(2, 64)), "JPEG")[:300],
    "wrong crc": PNG[:-20] + bytes([PNG[-20] ^ 255]) + PNG[-19:],
    "deep chunk": b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 2**31 - 1) + b"IHDR" + bytes(40),
    "empty": b"",
    "nulls": bytes(1000),
    "another size": encode(noise(3, 9)),
    "jpeg of 65500 sides": bytes.fromhex("ffd8ffc0001108ffdcffdc03012200021101031101"),
}
TEXTS = {
    "binary names": ("classnames.txt", b"\xff\xfe\x00r\x00e"),
    "names of a million lines": ("classnames.txt", b"x\n" * 10**6),
    "one name of megabytes": ("classnames.txt", b"x" * 5_000_000),
    "web page as names": ("classnames.txt", b"<html>\n<body>\n</html>\n"),
    "endless shard count": ("test/nshards.txt", b"9" * 10**6),
    "code as shard count": ("test/nshards.txt", b"__import__('os')"),
    "negative shard count": ("test/nshards.txt", b"-1"),
    "nul shard count": ("test/nshards.txt", bytes(8)),
    "another kind of dataset": ("dataset_type.txt", b"retrieval"),
    "manifest of lists": ("manifest.json", b"[" * 100_000),
    "manifest of numbers": (
        "manifest.json",
        b'{"schema": "vlmrob-manifest/1", "files": {"a": {"size": "x"}}}',
    ),
}
CARDS = {
    "not text": b"\xff\xfe\x00",
    "not toml": b"name = ",
    "deep arrays": b"names = " + b"[" * 5000,
    "unknown key": CARD.encode() + b"execute = 'touch ran'\n",
    "file outside": CARD.replace(str(list(NAMES)), '"@../../../etc/passwd"').encode(),
    "huge number": CARD.replace("n_classes = 3", f"n_classes = {'9' * 5000}").encode(),
    "list for a number": CARD.replace("native_px = 8", "native_px = [8]").encode(),
    "infinite number": CARD.replace("native_px = 8", "native_px = inf").encode(),
    "template without a place": CARD.replace("{c}", "__class__").encode(),
    "folder that leaves": CARD.replace('"wds_toy"', '"../../wds_toy"').encode(),
    "folder that is absolute": CARD.replace('"wds_toy"', '"/etc"').encode(),
    "name that leaves": CARD.replace('name = "toy"', 'name = "../toy"').encode(),
    "canvas of everything": CARD.replace('"native"', '"all"').encode(),
    "a pickle": pickle.dumps(Bomb()),
}


def dataset(root, content=None):
    folder = root / "wds_toy"
    layout.write_texts(folder, NAMES, TEMPLATES)
    layout.write_split(folder, "test", [("s0", PNG, "png", 0)], 1)
    if content is not None:
        (folder / "test/0.tar").write_bytes(content)
    return folder


def told(tmp_path, monkeypatch, capsys, code, content=None, *, name="toy"):
    """Run the check; the exit code, and the lines that it said."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cards/datasets").mkdir(parents=True, exist_ok=True)
    (tmp_path / "cards/datasets/toy.toml").write_bytes(CARD.encode() if content is None else content)
    line = ["vlmrob", "--include", "cards", "data", "check", name, "--root", "data", "--decode"]
    monkeypatch.setattr(sys, "argv", line)
    stop = 0
    try:
        cli.main()
    except SystemExit as end:
        stop = end.code or 0
    finally:
        reader.include([])
    said = capsys.readouterr()
    lines = [text for text in said.err.splitlines() if text.startswith(("problem: ", "error: "))]
    assert stop == code, said.err
    assert "Traceback" not in said.err
    assert not list(tmp_path.rglob("ran*"))
    return lines


def test_there_are_enough_of_them():
    assert len(SHARDS) + len(IMAGES) + len(TEXTS) + len(CARDS) >= 60


def test_what_is_not_hostile_passes(tmp_path, monkeypatch, capsys):
    dataset(tmp_path / "data")
    assert told(tmp_path, monkeypatch, capsys, 0) == []


@pytest.mark.parametrize("name", SHARDS)
def test_shards(name, tmp_path, monkeypatch, capsys):
    dataset(tmp_path / "data", SHARDS[name])
    lines = told(tmp_path, monkeypatch, capsys, 1)
    assert len(lines) == 1
    assert "0.tar" in lines[0]
    assert len(lines[0]) < 600


@pytest.mark.parametrize("name", IMAGES)
def test_images(name, tmp_path, monkeypatch, capsys):
    dataset(tmp_path / "data", shard(*pair(IMAGES[name])))
    lines = told(tmp_path, monkeypatch, capsys, 1)
    assert len(lines) == 1
    assert "0.tar, toy/s0: " in lines[0]
    assert len(lines[0]) < 600


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name, tmp_path, monkeypatch, capsys):
    path, content = TEXTS[name]
    folder = dataset(tmp_path / "data")
    (folder / path).write_bytes(content)
    lines = told(tmp_path, monkeypatch, capsys, 1)
    assert len(lines) == 1
    assert path.rpartition("/")[2] in lines[0]
    assert len(lines[0]) < 600


@pytest.mark.parametrize("name", CARDS)
def test_cards(name, tmp_path, monkeypatch, capsys):
    dataset(tmp_path / "data")
    lines = told(tmp_path, monkeypatch, capsys, 2, CARDS[name])
    assert len(lines) == 1
    assert len(lines[0]) < 600


def test_a_thousand_bombs_cost_no_memory(tmp_path, monkeypatch, capsys):
    import resource

    bomb = png(12000, 12000, zlib.compress(bytes(36_000_000), 9))
    members = [one for i in range(1000) for one in pair(bomb, name=f"s{i:04d}")]
    dataset(tmp_path / "data", shard(*members))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = told(tmp_path, monkeypatch, capsys, 1)
    assert len(lines) == 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
