"""Compiled kernels as shared libraries: linked, kept, loaded once more, and what becomes of those that cannot be."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dkfuse.kernels import disk_cache, shared_library

PARTS = ("a kernel",)
SOURCE = "int twice(int); int func(int x) { return twice(x) + 1; }"
RUNTIME = "int twice(int x) { return 2 * x; }"
FORM = {"before": [None, "scale"], "rows": 3}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    """An object file, and the path of the library whose function it calls."""
    try:
        compiler = shared_library.compiler()
    except OSError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("built")
    for name, source in (("kernel", SOURCE), ("runtime", RUNTIME)):
        (folder / f"{name}.c").write_text(source)
    subprocess.run([compiler, "-c", "-fPIC", "kernel.c"], cwd=folder, check=True)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "runtime.so", "runtime.c"], cwd=folder, check=True)
    return (folder / "kernel.o").read_bytes(), str(folder / "runtime.so")


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built: tuple[bytes, str]) -> Iterator[None]:
    """The CuTe DSL says where its runtime library is, and TVM-FFI loads libraries, as stand-ins."""
    _, runtime = built
    cute = types.SimpleNamespace(
        runtime=types.SimpleNamespace(find_runtime_libraries=lambda enable_tvm_ffi: [runtime, runtime])
    )
    ffi = types.ModuleType("tvm_ffi")

    def load_module(path: str) -> dict[str, Any]:
        assert path.startswith(str(tmp_path)), "beside what is kept"
        return {"func": ctypes.CDLL(path).func}

    ffi.load_module = load_module  # type: ignore[attr-defined]
    cutlass = types.ModuleType("cutlass")
    cutlass.cute = cute  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cutlass", cutlass)
    monkeypatch.setitem(sys.modules, "tvm_ffi", ffi)
    monkeypatch.setattr(shared_library, "_runtimes", {})
    disk_cache.use(str(tmp_path))
    yield
    disk_cache.use(None)


@pytest.mark.usefixtures("packages")
def test_a_kernel_is_kept_with_the_form_of_its_calls(built: tuple[bytes, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared_library.get(PARTS) is None and not shared_library.there(PARTS)
    shared_library.put(PARTS, lambda: built[0], FORM)
    assert shared_library.there(PARTS) and not shared_library.there(("another",))
    monkeypatch.delitem(sys.modules, "cutlass")  # it is not needed any more
    found = shared_library.get(PARTS)
    assert found is not None and found[0](20) == 41 and found[1] == FORM
    assert [path.name for path in disk_cache.root().iterdir()] == ["kernels"], "nothing is left behind"


def broken(**changes: Any) -> Any:
    def change(patch: pytest.MonkeyPatch) -> None:
        for name, value in changes.items():
            patch.setattr(shared_library, name, value)

    return change


def no_compiler(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("PATH", "")
    patch.delenv("CC", raising=False)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_compiler, "there is no C compiler: set CC, or install gcc"),
        (broken(SECONDS=0.0), "timed out"),
        (lambda patch: patch.setitem(sys.modules, "cutlass", None), "cutlass"),
    ],
)
def test_what_cannot_be_kept_is_said(
    change: Any, message: str, built: tuple[bytes, str], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    with monkeypatch.context() as patch, caplog.at_level("INFO", "dkfuse"):
        change(patch)
        shared_library.put(PARTS, lambda: built[0], FORM)
    assert "is not kept on disk" in caplog.text and message in caplog.text
    assert shared_library.get(PARTS) is None


@pytest.mark.usefixtures("packages")
def test_what_is_no_object_file(caplog: Any) -> None:
    with caplog.at_level("INFO", "dkfuse"):
        shared_library.put(PARTS, lambda: b"not an object file", FORM)
        shared_library.put(PARTS, partial(shared_library.exported, object()), FORM)
    assert "ended with exit code" in caplog.text and "no attribute 'export_to_c'" in caplog.text
    assert not shared_library.there(PARTS)


def gone(path: str) -> None:
    raise OSError(f"{path}: cannot open shared object file")


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setitem(sys.modules, "tvm_ffi", None),
        lambda patch: patch.setattr(shared_library, "NAME", "another"),
        lambda patch: patch.setattr(ctypes, "CDLL", gone),
    ],
)
def test_what_cannot_be_loaded_is_compiled_again(
    change: Any, built: tuple[bytes, str], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    shared_library.put(PARTS, lambda: built[0], FORM)
    with monkeypatch.context() as patch, caplog.at_level("INFO", "dkfuse"):
        change(patch)
        assert shared_library.get(PARTS) is None
    assert "is compiled again" in caplog.text
    disk_cache.put(PARTS, b"no line of JSON")
    assert shared_library.get(PARTS) is None


def test_the_compiler_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("#!/bin/sh\n")
    (tmp_path / "mine").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "mine"))
    assert shared_library.compiler() == str(tmp_path / "mine")
    monkeypatch.setenv("CC", "no such compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "mine").rename(tmp_path / "cc")
    assert shared_library.compiler() == str(tmp_path / "cc"), "Triton's way: another one"
