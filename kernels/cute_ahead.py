"""Packages whose kernels are written in CuTe DSL, quack and FlashAttention 4, imported before they are needed.

    start()             the helper (`compile_ahead`) begins to import those that are installed, for kernels to compile
    start_if_new()      the same before it is known whether there are any: where nothing was compiled yet
    import_meanwhile()  this process imports FlashAttention 4 in a thread, while Inductor works
    importing()         whether it still does
    imported()          waits until it does not; what is imported behind it finds `cutlass` without JAX

The packages take seconds to import. This process needs FlashAttention 4 for the first call of a kind of kernel, and
quack only to compile what no helper has compiled. Nothing that torch has not loaded itself is among what they import,
so that the thread and Inductor do not load the same modules; a package that cannot be imported fails again where it is
needed.
"""

from __future__ import annotations

import contextlib
import importlib
import threading

import torch

from . import attention_kernels, compile_ahead, cutlass_import, disk_cache, gemm_kernels
from .gemm_kernels import CAPABILITY

FA4_VERSIONS = ("4.0.0b20",)  # whose sources were read: their kernels are compiled ahead, and kept
PREPARED = f"{__package__}.cute_helper"  # what the helper imports first
QUACK_MODULES, FA4_MODULES = ("quack.gemm", "quack.gemm_act"), ("flash_attn.cute",)
ENVIRONMENT = {"QUACK_ARCH": f"sm_{CAPABILITY}a", "CUTE_DSL_ARCH": f"sm_{CAPABILITY}a"}  # asked of the GPU otherwise

_thread: list[threading.Thread] = []


def fa4_is_known() -> bool:
    """Whether FlashAttention 4 is installed in a version whose kernels are compiled ahead, kept and called directly."""
    return attention_kernels.version_of("fa4") in FA4_VERSIONS


def modules() -> tuple[str, ...]:
    """What is installed in a version that is used."""
    quack = gemm_kernels.version() is not None and gemm_kernels.untested() is None
    return (QUACK_MODULES if quack else ()) + (FA4_MODULES if fa4_is_known() else ())


def start() -> None:
    """Have a helper, which takes seconds to import what is installed."""
    if (wanted := modules()) and compile_ahead.allowed():
        compile_ahead.POOL.start((PREPARED, *wanted), ENVIRONMENT)


def start_if_new() -> bool:
    """Have a helper where kernels are likely to be compiled soon: the cache is empty and the GPU one of theirs.

    Dynamo traces a model for seconds before the backend is called, and small graphs come before large ones. A process
    that has not started CUDA is not made to.
    """
    if torch.cuda.is_initialized() and torch.cuda.get_device_capability() == divmod(CAPABILITY, 10):
        folder = disk_cache.root()
        with contextlib.suppress(OSError):  # it cannot be read
            if not folder.is_dir() or not any(folder.iterdir()):
                start()
                return True
    return False


def import_meanwhile() -> None:
    """Begin to import FlashAttention 4, once, in a thread, which reads files while Inductor computes.

    None where TORCHINDUCTOR_COMPILE_THREADS=1 asks for nothing that runs meanwhile, and where workers are forked, which
    would have locks of modules that nobody opens.
    """
    from dkfuse import compat

    alone = compat.inductor_config("compile_threads") == 1 or compat.inductor_config("worker_start_method") == "fork"
    if _thread or alone or not fa4_is_known():
        return
    _thread.append(threading.Thread(target=_import, args=(FA4_MODULES,), name="dkfuse-import", daemon=True))
    _thread[0].start()


def importing() -> bool:
    """Whether this process imports them now."""
    return bool(_thread) and _thread[0].is_alive()


def imported() -> None:
    """Wait until what was begun is imported, or have what they are written in at least."""
    if importing() and _thread[0] is not threading.current_thread():
        _thread[0].join()
    _import_cutlass()


def _import_cutlass() -> None:
    with contextlib.suppress(Exception):  # whatever it raises, it raises again where it is needed
        cutlass_import.import_cutlass()


def _import(names: tuple[str, ...]) -> None:
    _import_cutlass()
    with cutlass_import.without_collections():
        for name in names:
            with contextlib.suppress(Exception):  # as above
                importlib.import_module(name)
