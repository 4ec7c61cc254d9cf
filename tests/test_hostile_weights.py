"""Hostile and broken weights files: each is refused in one line, and nothing that it names is run."""

import io
import os
import pickle
import struct
import sys
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import tilted

from robustbench_vlm.errors import WeightsError
from robustbench_vlm.models import convert, zoo
from robustbench_vlm.models.foreign import sandbox
from robustbench_vlm.models.foreign.archives import convert as read_archive
from robustbench_vlm.models.foreign.pickled import Machine, RefusedError

ARCH = "vlmrob-tiny:random"
ORDERED = b"ccollections\nOrderedDict\n)R"
BYTE_0 = {"w/data/0": bytes(16)}


class Runs:
    """Pickles as a call of `function`."""

    def __init__(self, function, *given):
        self.call = function, given

    def __reduce__(self):
        return self.call


class Stateful:
    """Pickles as a plain object whose state is set afterwards."""

    def __init__(self):
        self.x = 1


def saved(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def archive(pickled, members=None, kind=zipfile.ZIP_STORED):
    """What torch.save writes, with a pickle of our own."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as zipped:
        zipped.writestr("w/data.pkl", pickled)
        for name, content in (members or BYTE_0).items():
            zipped.writestr(name, content)
    return file.getvalue()


def tensor(
    key=b"0", count=4, shape=b"(K\x02K\x02t", stride=b"(K\x02K\x01t", offset=b"K\x00", kind=b"FloatStorage"
):
    """The opcodes of one tensor of a state dict."""
    storage = b"((X\x07\x00\x00\x00storagectorch\n" + kind + b"\nX" + struct.pack("<I", len(key)) + key
    storage += b"X\x03\x00\x00\x00cpu\x8a\x08" + struct.pack("<q", count) + b"tQ"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + offset + shape + stride + b"\x89" + ORDERED + b"tR"
    )


def table(*values):
    """A pickle of a table with keys w0, w1 ..."""
    entries = b"".join(b"X\x02\x00\x00\x00w" + str(i).encode() + value for i, value in enumerate(values))
    return b"\x80\x02}(" + entries + b"u."


def test_the_files_made_here_are_read_when_nothing_is_wrong_with_them(tmp_path):
    """The checks below are not vacuous."""
    content = struct.pack("<4f", 1, 2, 3, 4)
    (tmp_path / "w.pt").write_bytes(archive(table(tensor()), {"w/data/0": content}))
    assert torch.equal(sandbox.read(tmp_path / "w.pt").state["w0"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def evil(marker):
    """name -> (content, words of the refusal); `marker` is the file that exists if anything was run."""
    touch = f"touch {marker}"
    state = {"w": torch.full((2, 2), 7.0)}
    good = saved(state)
    cut = good[: len(good) // 2]
    call = b"cposix\nsystem\n(X" + struct.pack("<I", len(touch)) + touch.encode() + b"tR"
    deep = b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b"."
    nested = b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 500 + b"N" + b"s" * 500 + b"."
    huge = b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"x."
    bomb = {"w/data/0": bytes(50_000_000)}
    doubled = b"\x80\x02]q\x00" + b"(h\x00h\x00e" * 40 + b"."
    return {
        "os.system": (saved({"w": Runs(os.system, touch)}), "asks for 'posix.system'"),
        "os.system, old format": (
            saved({"w": Runs(os.system, touch)}, _use_new_zipfile_serialization=False),
            "asks for 'posix.system'",
        ),
        "builtins.exec": (saved([Runs(exec, f"open({str(marker)!r}, 'w')")]), "asks for 'builtins.exec'"),
        "builtins.eval": (saved([Runs(eval, f"open({str(marker)!r}, 'w')")]), "asks for 'builtins.eval'"),
        "getattr": (saved([Runs(getattr, "x", "upper")]), "asks for 'builtins.getattr'"),
        "a call after the weights": (archive(table(tensor(), call)), "asks for 'posix.system'"),
        "a name on the stack": (
            archive(b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x01x\x85R."),
            "asks for 'posix.system'",
        ),
        "a name inside torch": (
            archive(b"\x80\x02ctorch\nload\n(X\x01\x00\x00\x00xtR."),
            "asks for 'torch.load'",
        ),
        "torch.hub": (archive(b"\x80\x02ctorch.hub\nload\n)R."), "asks for 'torch.hub.load'"),
        "an object of a class": (saved({"w": Stateful()}), "asks for"),
        "a whole module": (saved(torch.nn.Linear(2, 2)), "asks for 'torch.nn.modules.linear.Linear'"),
        "a bare pickle": (pickle.dumps(Runs(os.system, touch)), "asks for 'posix.system'"),
        "INST": (archive(b"\x80\x02(X\x01\x00\x00\x00xiposix\nsystem\n."), "pickle opcode INST"),
        "OBJ": (archive(b"\x80\x02(ccollections\nOrderedDict\no."), "pickle opcode OBJ"),
        "an extension code": (archive(b"\x80\x02\x82\x01."), "pickle opcode EXT1"),
        "BUILD of a list": (archive(b"\x80\x02]}b."), "attributes of something that has none"),
        "a call of a value": (archive(b"\x80\x02K\x01)R."), "a call of something that is no name"),
        "a storage that is larger than the file": (
            archive(
                table(tensor(count=2**40, shape=b"(\x8a\x06\x00\x00\x00\x00\x00\x01t", stride=b"(K\x01t"))
            ),
            "larger than",
        ),
        "a tensor wider than its storage": (archive(table(tensor(shape=b"(K\x09K\x09t"))), "larger than"),
        "a tensor spread by stride zero": (
            archive(table(tensor(shape=b"(M\xff\xffM\xff\xfft", stride=b"(K\x00K\x00t"))),
            "larger than",
        ),
        "a tensor beyond its storage": (archive(table(tensor(offset=b"K\x03"))), "larger than its storage"),
        "a negative offset": (archive(table(tensor(offset=b"J\xff\xff\xff\xff"))), "no count"),
        "a shape that is text": (archive(table(tensor(shape=b"(X\x01\x00\x00\x00xt"))), "no count"),
        "shape and stride that disagree": (archive(table(tensor(stride=b"(K\x01t"))), "disagree"),
        "a storage that is not there": (archive(table(tensor(key=b"9"))), "damaged or cut short"),
        "a storage outside the archive": (archive(table(tensor(key=b"../../x"))), "damaged or cut short"),
        "one storage of two kinds": (
            archive(table(tensor(), tensor(kind=b"LongStorage"))),
            "one storage of two kinds",
        ),
        "an unknown storage": (archive(table(tensor(kind=b"QuantStorage"))), "asks for 'torch.QuantStorage'"),
        "a zip bomb": (archive(table(tensor()), bomb, zipfile.ZIP_DEFLATED), "a compressed archive"),
        "members that overlap": (overlapping(), "larger than itself"),
        "an exported program": (
            archive(table(tensor()), {"w/code/x.py": b"1", **BYTE_0}),
            "carries code",
        ),
        "two pickles": (
            archive(table(tensor()), {"v/data.pkl": b"N.", **BYTE_0}),
            "without data.pkl",
        ),
        "deep tuples": (archive(deep), "not a state dict"),
        "deep tables": (archive(nested), "deep"),
        "a list of itself many times": (archive(doubled), "not a state dict"),
        "a key that is a tuple": (archive(b"\x80\x02}(N\x85Nu."), "keys are no plain values"),
        "a number of a million digits": (archive(b"\x80\x02I" + b"9" * 1_000_000 + b"\n."), "damaged pickle"),
        "text longer than the file": (archive(b"\x80\x02X\xff\xff\xff\x7fx."), "damaged pickle"),
        "a buffer of exabytes": (archive(huge), "damaged pickle"),
        "a buffer of exabytes, old format": (huge, "of memory"),
        "no end": (archive(b"\x80\x02}"), "damaged pickle"),
        "an empty stack": (archive(b"\x80\x02."), "damaged pickle"),
        "an unknown opcode": (archive(b"\x80\x02\xfe."), "damaged pickle"),
        "another byte order": (
            archive(table(tensor()), {"w/byteorder": b"big", **BYTE_0}),
            "big-endian",
        ),
        "a zip without a pickle": (archive(b"N.").replace(b"data.pkl", b"date.pkl"), "without data.pkl"),
        "cut short": (cut, "refused"),
        "cut at the end": (good[:-40], "refused"),
        "a changed byte": (good.replace(struct.pack("<f", 7), struct.pack("<f", 8), 1), "refused"),
        "no tensors": (saved({"epoch": 3}), "not a state dict"),
        "a web page": (b"\n<!DOCTYPE html><html><body>quota exceeded</body></html>", "the server sent HTML"),
        "a pointer of git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
        "empty": (b"", "an empty file"),
        "random bytes": (bytes(range(256)) * 40, "refused"),
        "gzip": (b"\x1f\x8b\x08\x00" + bytes(50), "a gzip file"),
    }


def overlapping():
    """An archive whose directory lists one large member many times over."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("w/data.pkl", table(tensor()))
        zipped.writestr("w/data/0", bytes(100_000))
        member = zipped.getinfo("w/data/0")
        for i in range(1, 50):
            copy = zipfile.ZipInfo(f"w/data/{i}")
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(copy, name, getattr(member, name))
            zipped.filelist.append(copy)
            zipped.NameToInfo[copy.filename] = copy
    return file.getvalue()


@pytest.mark.parametrize("name", evil("marker"))
def test_a_hostile_file_is_refused_in_one_line_and_runs_nothing(tmp_path, name):
    marker = tmp_path / "marker"
    content, words = evil(marker)[name]
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(WeightsError) as error:
        sandbox.read(tmp_path / "w.pt")
    text = str(error.value)
    assert words in text
    assert "\n" not in text
    assert "Traceback" not in text
    assert len(text) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_the_hostile_files_would_run_when_they_are_not_read_as_data(tmp_path):
    marker = tmp_path / "marker"
    for name in ("os.system", "os.system, old format"):
        marker.unlink(missing_ok=True)
        torch.load(io.BytesIO(evil(marker)[name][0]), weights_only=False)
        assert marker.exists()


def places(tmp_path):
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    (tmp_path / "gone.pt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    return ("loop.pt", "gone.pt", "zero.pt", "folder.pt", "pipe.pt", "missing.pt", "zero.safetensors")


def test_what_is_no_ordinary_file_is_refused_before_it_is_opened(tmp_path):
    names = places(tmp_path)
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    for name in names:
        with pytest.raises(WeightsError) as error:
            zoo.load(str(tmp_path / name), arch=ARCH)
        assert "\n" not in str(error.value)
        assert any(words in str(error.value) for words in ("cannot be read", "not an ordinary file"))


def test_a_link_to_a_good_file_is_followed(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / "w.pt")
    assert torch.equal(sandbox.read(tmp_path / "link.pt").state["w"], torch.ones(2))


def test_the_limits_of_memory_and_time_hold(tmp_path):
    torch.save({"w": torch.zeros(100_000_000, dtype=torch.uint8)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"needs more than 0\.1 GiB of memory") as error:
        sandbox.read(tmp_path / "w.pt", memory=100 * 2**20)
    assert "\n" not in str(error.value)
    (tmp_path / "long.pt").write_bytes(archive(b"\x80\x02" + b"N0" * 9_000_000 + b"N."))
    with pytest.raises(WeightsError, match=r"signal|not read within") as error:
        sandbox.read(tmp_path / "long.pt", seconds=1)
    assert "\n" not in str(error.value)


def test_a_pickle_of_too_many_steps_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("robustbench_vlm.models.foreign.pickled.STEPS", 1000)
    with pytest.raises(RefusedError, match="more than 1000 steps"):
        Machine().run(io.BytesIO(b"\x80\x02" + b"N0" * 1000 + b"N."))


def test_nothing_is_left_behind_when_a_conversion_is_refused(tmp_path):
    (tmp_path / "w.pt").write_bytes(evil(tmp_path / "marker")["os.system"][0])
    with pytest.raises(WeightsError, match=r"posix\.system"):
        convert.convert(tmp_path / "w.pt", tmp_path / "out", convert.unlisted("w", ARCH, "none", ()))
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


GOOD = saved({"a": torch.arange(6).view(2, 3), "b": {"c": torch.ones(2).half()}, "n": [1, 2.5, "x", None]})


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_and_nothing_else(tmp_path_factory, data):
    """In this process, so that any other error shows; the sandbox adds only limits around it."""
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "w.pt").write_bytes(content)
    try:
        found = read_archive(folder / "w.pt", folder / "out")
    except RefusedError as error:
        said = str(error)
    else:
        said = ""
        assert set(found) == {"names", "old"}
    assert "\n" not in said


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_refusal(content):
    said = ""
    try:
        Machine().run(io.BytesIO(b"\x80\x02" + content))
    except RefusedError as error:
        said = str(error)
    assert "\n" not in said


def test_the_reader_imports_no_torch():
    """So that what it may do with memory stays small, and no loader of torch is at hand."""
    import subprocess

    code = "import sys, robustbench_vlm.models.foreign.archives; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_wrong_shapes_are_refused_by_the_architecture(tmp_path):
    state = tilted("vlmrob-tiny", 1).visual.state_dict()
    torch.save(state | {"proj": torch.zeros(3)}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"tensor 'proj' has shape \(3,\)"):
        zoo.load(str(tmp_path / "w.pt"), arch=ARCH)
