"""CUDA C++ to machine code at run time, by NVRTC: no host compiler, no toolkit and no GPU are needed.

NVRTC is reached through `cuda.core` where that package is installed, else through the library that comes with torch's
CUDA builds (the `nvidia-cuda-nvrtc` wheel), by ctypes. Binaries are kept on disk by source, macros, architecture and
NVRTC's version.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .disk_cache import cached_bytes

OPTIONS = ("--std=c++17",)
_MAJORS = (13, 12)


def cubin(source: str, macros: Mapping[str, int], arch: int) -> bytes:
    """The binary of `source` for compute capability `arch` (90 for sm_90), from the disk cache or NVRTC.

    Raises ImportError where there is no NVRTC, RuntimeError with NVRTC's log where the source does not compile.
    """
    name, compiler = _compiler()
    definitions = tuple(f"{key}={value}" for key, value in sorted(macros.items()))
    return cached_bytes(
        ("cubin", name, f"sm_{arch}", *OPTIONS, *definitions, source), lambda: compiler(source, definitions, arch)
    )


def has_nvrtc() -> bool:
    """Whether there is a compiler at all."""
    try:
        _compiler()
    except ImportError:
        return False
    return True


@functools.cache
def _compiler() -> tuple[str, Callable[[str, tuple[str, ...], int], bytes]]:
    """Its name with its version, and compile(source, definitions, arch)."""
    errors = []
    for choose in (_cuda_core, _nvrtc):
        try:
            return choose()
        except (ImportError, OSError, RuntimeError) as error:
            errors.append(str(error))
    raise ImportError(
        f"no NVRTC to compile CUDA with ({'; '.join(errors)}); install cuda-core or nvidia-cuda-nvrtc for your CUDA."
    )


def _cuda_core() -> tuple[str, Callable[[str, tuple[str, ...], int], bytes]]:
    core: Any = importlib.import_module("cuda.core")
    nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")
    status, major, minor = nvrtc.nvrtcVersion()
    if int(status) != 0:
        raise ImportError(f"cuda.bindings finds no working NVRTC ({status}).")

    def compiled(source: str, definitions: tuple[str, ...], arch: int) -> bytes:
        pairs: Any = [tuple(definition.split("=", 1)) for definition in definitions] or None
        options = core.ProgramOptions(arch=f"sm_{arch}", std="c++17", define_macro=pairs, name="dkfuse.cu")
        try:
            return bytes(core.Program(source, code_type="c++", options=options).compile("cubin").code)
        except Exception as error:  # NVRTCError, whose place differs between releases
            raise RuntimeError(f"NVRTC does not compile the kernel:\n{error}") from error

    return f"nvrtc {major}.{minor} by cuda.core", compiled


def _nvrtc() -> tuple[str, Callable[[str, tuple[str, ...], int], bytes]]:
    library = _library()
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"nvrtc {major.value}.{minor.value}", functools.partial(_compile, library)


def _library() -> ctypes.CDLL:
    """NVRTC of torch's CUDA, which torch has loaded, else of any wheel or toolkit that is found."""
    import torch

    version = torch.version.cuda
    majors = [int(version.split(".")[0])] if version else list(_MAJORS)
    names = [f"nvrtc64_{m}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{m}" for m in majors]
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    found = [path for name in names for folder in folders for path in sorted(folder.glob(f"*/*/{name}"))]
    for candidate in (*names, *map(str, found)):
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise OSError(f"{' or '.join(names)} is not found")


def _compile(library: ctypes.CDLL, source: str, definitions: tuple[str, ...], arch: int) -> bytes:
    def check(status: int) -> None:
        if status != 0:
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise RuntimeError(f"NVRTC failed: {library.nvrtcGetErrorString(status).decode()}")

    def fetched(size_of: Any, content_of: Any) -> bytes:
        size = ctypes.c_size_t()
        check(size_of(program, ctypes.byref(size)))
        content = ctypes.create_string_buffer(size.value)
        check(content_of(program, content))
        return content.raw

    program = ctypes.c_void_p()
    check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"dkfuse.cu", 0, None, None))
    try:
        options = [f"--gpu-architecture=sm_{arch}", *OPTIONS, *(f"--define-macro={d}" for d in definitions)]
        status = library.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        )
        if status != 0:
            log = fetched(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog)
            raise RuntimeError(f"NVRTC does not compile the kernel:\n{log.rstrip(bytes(1)).decode()}")
        return fetched(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
