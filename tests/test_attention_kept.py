"""FlashAttention 4's compiled kernels on disk and by helpers: a stand-in of its cache, and the package where it is."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config

from dkfuse.kernels import attention_kept, attention_kernels, compile_ahead, cute_ahead, disk_cache, shared_library
from dkfuse.kernels.attention_kept import Kept, Kind
from dkfuse.kernels.compile_ahead import Pool
from dkfuse.seams import attention_measure, late

BF16 = torch.bfloat16
KIND = Kind("bfloat16", 128, 1, False, False)
PARTS = ("fa4", "these sources")


class Kernel:
    """A compiled kernel that can be written to a file."""

    def export_to_c(self, object_file_path: str, function_name: str) -> None:
        Path(object_file_path).write_bytes(function_name.encode())


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(attention_kept, "_loaded", lambda data: f"loaded {data.decode()}")
    disk_cache.use(str(tmp_path))
    yield tmp_path
    disk_cache.use(None)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """Helpers may be used, and never come."""
    found = Pool(most=0)
    monkeypatch.setattr(compile_ahead, "POOL", found)
    monkeypatch.setattr(cute_ahead, "import_meanwhile", lambda: None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(attention_kernels, "version_of", lambda name: attention_kept.VERSIONS[0])
    with config.patch(compile_threads=8):
        yield found


def test_a_kernel_is_kept(folder: Path) -> None:
    cache, kernel, key = Kept({}, PARTS), Kernel(), (BF16, 128, False)
    assert key not in cache
    cache[key] = kernel
    assert key in cache and cache[key] is kernel and cache.on_disk()
    later = Kept({}, PARTS)
    assert key in later and later[key] == "loaded func" and (BF16, 64, False) not in later
    assert key not in Kept({}, ("fa4", "other sources"))
    later.clear()
    assert key in later, "clearing the memory leaves the disk"
    (file,) = disk_cache.contents()["kernels"]
    file.write_bytes(file.read_bytes()[:-1])
    assert key not in Kept({}, PARTS), "cut short"


def test_what_cannot_be_kept_or_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = Kept({}, PARTS)
    cache["plain"] = plain = object()  # it has no object file
    assert cache["plain"] is plain and "plain" in cache and not cache.on_disk()
    (tmp_path / "file").touch()
    disk_cache.use(str(tmp_path / "file"))
    cache["kernel"] = kernel = Kernel()
    assert cache["kernel"] is kernel and not cache.on_disk()
    disk_cache.use(str(tmp_path))
    cache["kernel"] = kernel
    monkeypatch.setattr(attention_kept, "_loaded", lambda data: (_ for _ in ()).throw(RuntimeError("no symbol")))
    assert "kernel" not in Kept({}, PARTS) and "kernel" in cache


def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `install` reads of `flash_attn.cute`; the function with the cache."""

    class JITCache:
        def __init__(self) -> None:
            self.cache: dict[Any, Any] = {}

    utils = types.SimpleNamespace(JITCache=JITCache, _compute_source_fingerprint=lambda: "these sources")
    function = types.SimpleNamespace(compile_cache=JITCache())
    cute = types.ModuleType("flash_attn.cute")
    cute.__dict__.update(cache_utils=utils, interface=types.SimpleNamespace(_flash_attn_fwd=function))
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    return function


def test_their_cache_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    function = package(monkeypatch)
    theirs = function.compile_cache
    theirs.cache["compiled before"] = 1
    for version in (None, "4.0.0b21"):
        monkeypatch.setattr(attention_kernels, "version_of", lambda name, version=version: version)
        assert attention_kept.install() is None and function.compile_cache is theirs
    monkeypatch.setattr(attention_kernels, "version_of", lambda name: attention_kept.VERSIONS[0])
    kept = attention_kept.install()
    assert isinstance(kept, Kept) and function.compile_cache is kept and kept["compiled before"] == 1
    assert attention_kept.install() is kept
    function.compile_cache = {}  # another one, of the user's choice
    assert attention_kept.install() is None and function.compile_cache == {}


def test_where_a_helper_compiles(pool: Pool, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    assert not attention_kept.submit(KIND, 100), "helpers are told to compile for sm90"
    with config.patch(compile_threads=1):
        assert not attention_kept.submit(KIND, 90)
    with monkeypatch.context() as patch:
        patch.setattr(attention_kernels, "version_of", lambda name: "4.0.0b21")
        assert not attention_kept.submit(KIND, 90)
    assert attention_kept.submit(KIND, 90)
    assert list(pool.jobs) == [
        ("dkfuse.kernels.attention_kept:compile_kind", "bfloat16", 128, 1, False, False, str(folder))
    ]
    assert attention_kept.wait(KIND) is None and not attention_kept.submit(KIND, 90), "it is the caller's"


def test_a_direct_call_is_kept(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    function, entries = package(monkeypatch), {}
    monkeypatch.setattr(shared_library, "put", lambda parts, data, form: entries.update({parts: (data(), form)}))
    monkeypatch.setattr(shared_library, "there", entries.__contains__)
    monkeypatch.setattr(shared_library, "get", entries.get)
    attention_kept.install()
    function.compile_cache["key"] = plain = object()  # it has no object file
    attention_kept.keep_call(KIND, plain, {})
    attention_kept.keep_call(KIND, object(), {})  # not of this cache
    assert attention_kept.submit(KIND, 90) and not entries
    pool._reset()
    function.compile_cache["key"] = kernel = Kernel()
    attention_kept.keep_call(KIND, kernel, {"after": []})
    assert attention_kept.call(KIND) == (b"func", {"after": []})
    assert not attention_kept.submit(KIND, 90) and pool.jobs == {}
    assert attention_kept.submit(Kind("bfloat16", 64, 1, False, False), 90)
    monkeypatch.setenv("FA_CLC", "1")
    assert attention_kept.call(KIND) is None, "what the package does is another"


def test_it_is_tried_when_inductor_is_done(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # before there seems to be a GPU, which a CUDA build of torch would look for
        q = torch.empty(1, 24, 4096, 128, dtype=BF16, device="cuda")
    tried: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(attention_measure, "_failures", {})
    monkeypatch.setattr(attention_measure, "_numbers", lambda sizes, like: torch.zeros(sizes))
    monkeypatch.setattr(attention_measure, "_tried", lambda few, causal, kernel, lengths: tried.append(kernel) or "no")
    with late.deferred() as attempts:
        assert attention_measure.failure("fa4", q, q, False) is None and tried == []
        assert attention_measure.failure("sage", q, q, False) == "no" and tried == ["sage"]
    assert late.failed(attempts) and tried == ["sage", "fa4"]
    assert attention_measure.failure("fa4", q, q, False) == "no"
    monkeypatch.setattr(attention_measure, "_failures", {})
    assert attention_measure.failure("fa4", q, q, False) == "no", "at once outside of a compilation"


@pytest.mark.slow
@config.patch(compile_threads=8)
def test_the_package_finds_what_a_helper_compiled(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """For a GPU that need not be there: the parent loads a file and compiles nothing."""
    interface = pytest.importorskip("flash_attn.cute.interface")
    monkeypatch.undo()  # the real loader
    if attention_kernels.version_of("fa4") not in attention_kept.VERSIONS:
        pytest.skip("another version")
    monkeypatch.setattr(compile_ahead, "POOL", pool := Pool())
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    for lengths in (False, True):
        kind = Kind("float16", 64, 1, False, lengths)
        assert attention_kept.submit(kind, 90)
        job = attention_kept.job(kind)
        while not (pool.jobs[job].running() or pool.jobs[job].done()):
            time.sleep(0.05)
        done = attention_kept.wait(kind)
        assert done is not None and done.error is None, done
        monkeypatch.setattr("cutlass.cute.compile", lambda *_, **__: pytest.fail("it is compiled here"))
        interface._get_device_arch.cache_clear()
        attention_kept.compile_kind("float16", 64, 1, False, lengths, str(folder))
        kept = attention_kept.install()
        assert kept is not None
        for kernel in kept.cache.values():
            attention_kept.keep_call(kind, kernel, {"lengths": lengths})
        assert not attention_kept.submit(kind, 90)
        function, form = attention_kept.call(kind) or (None, None)
        assert form == {"lengths": lengths}
        with pytest.raises(TypeError, match="Expects 16 parameters"):
            function()
    pool.give_up("the test is over")
    pool.kill()
