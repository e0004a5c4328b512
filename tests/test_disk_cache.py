"""Compiled kernels on disk: found again, told apart, never trusted when damaged, shared, and optional."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dkfuse.kernels import disk_cache
from dkfuse.kernels.disk_cache import cached_bytes, contents

PARTS = ("nvrtc", "sm_90", "-O3", "__global__ void f() {}")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DKFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(disk_cache, "_unwritable", set())
    disk_cache.use(None)
    yield tmp_path
    disk_cache.use(None)


def must_not_build():
    raise AssertionError("built again")


def test_what_was_built_is_found_again():
    assert cached_bytes(PARTS, lambda: b"\x00cubin") == b"\x00cubin"
    assert cached_bytes(PARTS, must_not_build) == b"\x00cubin"
    assert cached_bytes(("empty",), lambda: b"") == b"" == cached_bytes(("empty",), must_not_build)
    assert len(contents()["kernels"]) == 2


@pytest.mark.parametrize("i", range(len(PARTS)))
def test_every_part_counts(i):
    cached_bytes(PARTS, lambda: b"one")
    other = (*PARTS[:i], PARTS[i] + "x", *PARTS[i + 1 :])
    assert cached_bytes(other, lambda: b"two") == b"two"
    assert disk_cache.get(("a", "bc")) is None
    cached_bytes(("ab", "c"), lambda: b"three")
    assert disk_cache.get(("a", "bc")) is None, "parts must not run into each other"


def test_other_sources_and_another_torch_are_other_entries(monkeypatch):
    import torch

    from dkfuse.reporting import store

    cached_bytes(PARTS, lambda: b"one")
    for owner, name, value in ((store, "source_hash", lambda: "another"), (torch, "__version__", "9.9")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert disk_cache.get(PARTS) is None
    assert disk_cache.get(PARTS) == b"one"


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-1] + b"?", lambda b: b"", lambda b: b"x" + b])
def test_a_damaged_file_is_built_again(damage):
    cached_bytes(PARTS, lambda: b"cubin")
    (file,) = contents()["kernels"]
    file.write_bytes(damage(file.read_bytes()))
    assert cached_bytes(PARTS, lambda: b"anew") == b"anew"
    assert cached_bytes(PARTS, must_not_build) == b"anew"


def test_a_failing_build_leaves_nothing():
    with pytest.raises(ZeroDivisionError):
        cached_bytes(PARTS, lambda: b"%d" % (1 // 0))
    assert contents()["kernels"] == []


def test_a_full_disk_means_no_caching(monkeypatch, caplog):
    caplog.set_level("DEBUG", "dkfuse")

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert cached_bytes(PARTS, lambda: b"one") == b"one"
    assert cached_bytes(PARTS, lambda: b"two") == b"two"
    assert contents()["kernels"] == []
    assert sum("No space left" in r.getMessage() for r in caplog.records) == 1, "logged once"


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("DKFUSE_CACHE_DIR", str(file))  # as good as read-only, also for root
    assert cached_bytes(PARTS, lambda: b"one") == b"one"

    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setenv("DKFUSE_CACHE_DIR", str(tmp_path / "other"))
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", denied)
    assert cached_bytes(PARTS, lambda: b"two") == b"two"


def test_the_option_beats_the_variable(tmp_path):
    disk_cache.use(str(tmp_path / "option"))
    cached_bytes(PARTS, lambda: b"one")
    assert list((tmp_path / "option" / "kernels").iterdir())
    disk_cache.use(None)
    assert disk_cache.get(PARTS) is None


def test_processes_share_the_folder(folder, root):
    code = (
        "import sys\nfrom dkfuse.kernels.disk_cache import cached_bytes\n"
        "for i in range(40): assert cached_bytes(('p', str(i)), lambda: bytes([i]) * 100000) == bytes([i]) * 100000"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    running = [subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=environment) for _ in range(2)]
    assert [process.wait(120) for process in running] == [0, 0]
    assert len(contents()["kernels"]) == 40
    assert all(Path(file).suffix == ".bin" for file in contents()["kernels"])
