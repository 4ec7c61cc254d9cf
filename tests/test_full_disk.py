"""A full disk and a folder that cannot be written: told before the first load, or one line and exit 75."""

import contextlib
import errno
import os
import shutil
import subprocess

import command_line
import pytest
import torch

from robustbench_vlm import store
from robustbench_vlm.errors import Incomplete
from robustbench_vlm.models import zoo
from robustbench_vlm.training import loop, teacher_cache

CPU = torch.device("cpu")


def no_load(*_):
    raise AssertionError("a model was loaded")


def typed(toy, tmp_path, out):
    (tmp_path / "r.toml").write_text(toy_toml(toy))
    words = ["--include", toy.cards, "train", tmp_path / "r.toml", "--data-root", toy.data]
    return [*map(str, words), "--out", str(out), "--device", "cpu"]


def toy_toml(toy):
    import toys

    return toys.toml(toy.table("mmt-ard", "robust", "clean"))


def test_training_looks_at_its_folder_before_it_loads_anything(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "load", no_load)
    (tmp_path / "file").write_text("in the way")
    assert command_line.run_command(monkeypatch, *typed(toy, tmp_path, tmp_path / "file" / "run")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --out {tmp_path / 'file' / 'run'}: ")
    assert line.endswith("expected a folder that can be written; choose another folder with --out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=store.LEAST_FREE - 1))
    assert command_line.run_command(monkeypatch, *typed(toy, tmp_path, tmp_path / "run")) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'run'}: No space left on device; make room")
    assert not (tmp_path / "run").exists()


def test_a_cache_on_a_full_disk_ends_a_training_in_one_line_that_goes_on(toy, tmp_path, monkeypatch):
    """The third write fails; without the cache the same folder ends with the bytes of a run that had none."""
    recipe = toy.recipe("mmt-ard", "robust", "clean")
    loop.run(recipe, tmp_path / "plain", toy.data, CPU, lambda _: None)
    written = []

    def pwrite(descriptor, content, offset, whole=os.pwrite):
        written.append(len(content))
        if len(written) == 30:
            return whole(descriptor, content[:7], offset)  # the disk had 7 bytes left
        if len(written) > 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(descriptor, content, offset)

    monkeypatch.setattr(teacher_cache.os, "pwrite", pwrite)
    with pytest.raises(Incomplete, match=r"\.rows: No space left on device; make room or type --no-cache"):
        loop.run(recipe, tmp_path / "run", toy.data, CPU, lambda _: None, tmp_path / "cache")
    assert len(written) == 31
    monkeypatch.undo()
    loop.run(recipe, tmp_path / "run", toy.data, CPU, lambda _: None, tmp_path / "cache")
    name = "image.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_cache_on_a_full_file_system_is_no_signal(toy, small_disk, tmp_path):
    """Rows that were never written are read, and written, where not a page is left."""
    words = typed(toy, tmp_path, tmp_path / "run")
    embeddings = small_disk / "embeddings"
    whole = teacher_cache.open_cache

    def in_small_cache():
        os.environ["VLMROB_CACHE"] = str(small_disk)

    def in_full_cache():
        """From its second opening on."""

        def opened(*given):
            found = whole(*given)
            if found.path.parent.joinpath("first").exists():
                with contextlib.suppress(OSError):
                    found.path.with_name("ballast").write_bytes(bytes(2**20))
            found.path.with_name("first").touch()
            return found

        in_small_cache()
        teacher_cache.open_cache = opened

    ran = command_line.fork_command(words, in_full_cache)
    assert ran.returncode == 75, (ran.returncode, ran.stderr)
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {embeddings}/")
    assert "No space left on device; make room or type --no-cache" in last
    ran = command_line.fork_command([*words, "--no-cache"], in_small_cache)
    assert ran.returncode == 0, ran.stderr
