"""quack's kernels compiled ahead by the helper (`compile_ahead`), into quack's own folder of compiled kernels.

    submit(kind)                   the helper compiles the kernel, unless it is on disk already
    wait(kind), then compile       `gemm_quack.compiled`: quack finds the file that the helper left

quack names a file after the arguments of its function, its sources and the versions of what it is written in, and both
processes run the same code, so a name that differed would mean a second compilation and not another kernel. What is on
disk is known without importing quack: of each kernel that was compiled or loaded, dkfuse's cache keeps the file's path.
"""

from __future__ import annotations

import getpass
import os
import sys
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from . import compile_ahead, cute_ahead, disk_cache, gemm_kernels
from .compile_ahead import Done, Job
from .gemm_kernels import CAPABILITY
from .packages import installed

COMPILE = f"{__name__}:compile_kind"
WRITTEN_IN = ("nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base", "apache-tvm-ffi")


@dataclass(frozen=True)
class Kind:
    """What one kernel is compiled for: a dtype's name, `act` of ``dkfuse::linear``, whether with a bias, and tiles."""

    dtype: str
    act: str
    bias: bool
    tiles: str

    @classmethod
    def of(cls, dtype: torch.dtype, act: str, bias: bool, tiles: str) -> Kind:
        return cls(str(dtype).removeprefix("torch."), act, bias, tiles)


def submit(kind: Kind) -> bool:
    """Have a helper compile the kernel. False where there is nothing to wait for: it is on disk, or no helper can."""
    if not usable():
        return False
    cute_ahead.import_meanwhile()
    if on_disk(kind) and job(kind) not in compile_ahead.POOL.jobs:
        return False
    cute_ahead.start()
    return compile_ahead.POOL.submit(job(kind))


def wait(kind: Kind) -> Done | None:
    """What became of the kernel where a helper compiles it; None where none does, and the caller has to."""
    return compile_ahead.POOL.wait(job(kind))


def job(kind: Kind) -> Job:
    return COMPILE, *astuple(kind), folder()


def usable() -> bool:
    """Whether helpers may compile quack's kernels: it can be used, and has a folder."""
    installed_well = gemm_kernels.version() is not None and gemm_kernels.untested() is None
    return installed_well and compile_ahead.allowed() and folder() is not None


def folder() -> str | None:
    """Where quack keeps compiled kernels; None where it keeps none, or this process cannot write there."""
    cache: Any = sys.modules.get("quack.cache")
    kept = cache.CACHE_ENABLED if cache is not None else os.environ.get("QUACK_CACHE_ENABLED", "1") == "1"
    chosen = cache.CACHE_DIR if cache is not None else os.environ.get("QUACK_CACHE_DIR")
    if not kept:
        return None
    try:
        path = Path(tempfile.gettempdir()) / getpass.getuser() / "quack_cache" if chosen is None else Path(chosen)
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, KeyError):  # no such place, no such user
        return None
    return os.path.abspath(path) if os.access(path, os.W_OK) else None


# -- in a helper -------------------------------------------------------------------------------------------------------


def compile_kind(dtype: str, act: str, bias: bool, tiles: str, where: str) -> None:
    """Leave the compiled kernel in the folder `where`, quack's of the process that asks."""
    import quack.cache

    from . import gemm_quack

    quack.cache.CACHE_DIR = where
    function, arguments = gemm_quack.asked(getattr(torch, dtype), act, bias, tiles, divmod(CAPABILITY, 10))
    if not gemm_quack.file_of(function, function(**arguments)).exists():
        raise RuntimeError(f"quack left no file in {where}")


# -- what is on disk ---------------------------------------------------------------------------------------------------


def on_disk(kind: Kind) -> bool:
    """Whether quack finds the kernel on disk, as far as it is known without importing quack."""
    found = disk_cache.get(_parts(kind))
    return found is not None and os.path.exists(found.decode())


def note(kind: Kind, file: Path) -> None:
    """Remember that the kernel lies in `file`, if it does."""
    path = os.path.abspath(file).encode()
    if file.exists() and disk_cache.get(_parts(kind)) != path:
        disk_cache.put(_parts(kind), path)


def _parts(kind: Kind) -> tuple[str, ...]:
    return "quack's file", repr(kind), gemm_kernels.fingerprint(), *written_in(), str(folder())


def written_in() -> list[str]:
    """Versions of what kernels are written in."""
    return [f"{sys.version_info[:2]}", *(f"{name}={installed(name)}" for name in WRITTEN_IN)]
