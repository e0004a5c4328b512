"""quack's kernels compiled ahead by the helper (`compile_ahead`), and kept in dkfuse's cache (`shared_library`).

    submit(kind)                   the helper compiles the kernel, unless it is on disk already
    wait(kind), then kept(kind)    the kernel that it left there; None: it is for the caller to compile, and to `keep`

A process that finds all its kernels on disk imports neither quack nor the CuTe DSL.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from . import compile_ahead, cute_ahead, disk_cache, gemm_kernels, shared_library
from .compile_ahead import Done, Job
from .gemm_kernels import CAPABILITY
from .packages import installed

if TYPE_CHECKING:
    from .gemm_quack import Form

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
    if not usable() or (on_disk(kind) and job(kind) not in compile_ahead.POOL.jobs):
        return False
    cute_ahead.start()
    return compile_ahead.POOL.submit(job(kind))


def wait(kind: Kind) -> Done | None:
    """What became of the kernel where a helper compiles it; None where none does, and the caller has to."""
    return compile_ahead.POOL.wait(job(kind))


def job(kind: Kind) -> Job:
    return COMPILE, *astuple(kind), os.path.abspath(disk_cache.root())


def usable() -> bool:
    """Whether helpers may compile quack's kernels: it can be used, and there is a place for them."""
    installed_well = gemm_kernels.version() is not None and gemm_kernels.untested() is None
    return installed_well and compile_ahead.allowed() and disk_cache.writable()


# -- on disk -----------------------------------------------------------------------------------------------------------


def on_disk(kind: Kind) -> bool:
    """Whether the kernel is on disk."""
    return shared_library.there(_parts(kind))


def kept(kind: Kind) -> tuple[Callable[..., Any], Form] | None:
    """The kernel from disk, and the form of its calls."""
    from .gemm_quack import Form

    found = shared_library.get(_parts(kind))
    return None if found is None else (found[0], Form.read(found[1]))


def keep(kind: Kind, kernel: Any, form: Form) -> None:
    """Leave the kernel, which this process has compiled, on disk."""
    shared_library.put(_parts(kind), partial(shared_library.exported, kernel), vars(form))


def _parts(kind: Kind) -> tuple[str, ...]:
    return "quack", repr(kind), gemm_kernels.fingerprint(), *written_in()


def written_in() -> list[str]:
    """Versions of what kernels are written in."""
    return [f"{sys.version_info[:2]}", *(f"{name}={installed(name)}" for name in WRITTEN_IN)]


# -- in a helper -------------------------------------------------------------------------------------------------------


def compile_kind(dtype: str, act: str, bias: bool, tiles: str, folder: str) -> None:
    """Leave the compiled kernel in dkfuse's cache in `folder`."""
    from . import gemm_quack

    disk_cache.use(folder)
    gemm_quack.compiled(getattr(torch, dtype), act, bias, tiles, divmod(CAPABILITY, 10))
    if not on_disk(Kind(dtype, act, bias, tiles)):
        raise RuntimeError(f"no kernel could be left in {folder}")
