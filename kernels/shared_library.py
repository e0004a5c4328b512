"""Compiled kernels of CuTe DSL on disk, as shared libraries that a process calls without CuTe DSL.

    put(parts, objects, form)    the kernel as a library, with what a call of it looks like, in dkfuse's cache
    get(parts)                   (function, form), or None where there is none; function(*arguments) by TVM-FFI

CuTe DSL loads what it exported with its own packages, whose import takes one to two seconds of every process. Linked
by the C compiler that Triton needs too, the same machine code takes TVM-FFI alone, 0.05 s; its launches go through CuTe
DSL's runtime library, as they do otherwise (CuTe DSL's documentation, "Ahead-of-time compilation").

An entry is a line of JSON, {"form": ..., "runtime": path of that library}, and the shared library's bytes.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import disk_cache

log = logging.getLogger("dkfuse")
NAME = "func"  # of the function in a library
SECONDS = 60.0  # for the linker
Function = Callable[..., Any]
Form = dict[str, Any]  # of what JSON can carry

_runtimes: dict[str, ctypes.CDLL] = {}  # CuTe DSL's runtime libraries, by path; they stay loaded


def put(parts: tuple[str, ...], object_file: Callable[[], bytes], form: Form) -> None:
    """Keep the kernel of the object file that is returned. Where that cannot be it is logged, and nothing is kept."""
    try:
        from cutlass import cute

        runtime, ffi = cute.runtime.find_runtime_libraries(enable_tvm_ffi=True)
        library = link(object_file(), [runtime, ffi])
    except Exception as error:  # whatever the packages or the linker raise
        log.info("dkfuse: a compiled kernel is not kept on disk: %s", error)
        return
    header = json.dumps({"form": form, "runtime": os.path.abspath(runtime)})
    disk_cache.put(parts, header.encode() + b"\n" + library)


def get(parts: tuple[str, ...]) -> tuple[Function, Form] | None:
    """The function of a kernel that was put under `parts`, and the form of its calls."""
    data = disk_cache.get(parts)
    if data is None:
        return None
    header, _, library = data.partition(b"\n")
    try:
        found = json.loads(header)
        return loaded(library, found["runtime"]), found["form"]
    except Exception as error:  # whatever a loader raises, the kernel can be compiled
        log.info("dkfuse: a kernel is compiled again, its library cannot be loaded: %s", error)
        return None


def there(parts: tuple[str, ...]) -> bool:
    """Whether there is an entry."""
    return disk_cache.get(parts) is not None


def exported(kernel: Any) -> bytes:
    """The object file of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.o"
        kernel.export_to_c(object_file_path=str(file), function_name=NAME)
        return file.read_bytes()


def link(object_file: bytes, libraries: list[str]) -> bytes:
    """A shared library of an object file that calls functions of `libraries`. OSError says what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        source.write_bytes(object_file)
        command = [compiler(), "-shared", "-o", str(target), str(source), *libraries]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode != 0:
            raise OSError(f"{' '.join(command)} ended with exit code {done.returncode}: {done.stderr[-400:].strip()}")
        return target.read_bytes()


def compiler() -> str:
    """The C compiler: $CC, or the first of gcc, clang and cc that is there."""
    for name in (os.environ.get("CC", "").strip(), "gcc", "clang", "cc"):
        if name and (found := shutil.which(name)) is not None:
            return found
    raise OSError("there is no C compiler: set CC, or install gcc")


def loaded(library: bytes, runtime: str) -> Function:
    """The function of a shared library, which stays loaded as long as the process lives."""
    import tvm_ffi

    if runtime not in _runtimes:
        _runtimes[runtime] = ctypes.CDLL(runtime)
    place = disk_cache.root() if disk_cache.writable() else None  # /tmp may be mounted so that nothing in it can run
    with tempfile.TemporaryDirectory(dir=place, prefix="load-") as folder:
        file = Path(folder) / "kernel.so"
        file.write_bytes(library)
        return tvm_ffi.load_module(str(file))[NAME]
