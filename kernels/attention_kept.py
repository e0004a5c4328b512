"""FlashAttention 4's compiled kernels on disk, and compiled ahead by helpers (`compile_ahead`).

Its own cache of kernels is a dict, unless a variable of its says otherwise before it is imported: each kind takes 2 to
10 s in every process. `install` puts a cache in its place that also keeps them in dkfuse's (`disk_cache`), as object
files that its package loads in milliseconds. What is cut short is compiled again there, and a folder that cannot be
written is no error, neither of which holds for theirs.

A kernel that was called directly (`attention_fa4`) is kept once more, with that call: a later process makes it without
importing the package (`shared_library`).

Only of `VERSIONS`, whose sources were read; a cache of the user's choice stays.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import tempfile
from collections.abc import Hashable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from . import attention_kernels, compile_ahead, cute_ahead, disk_cache, gemm_ahead, shared_library
from .compile_ahead import Done, Job
from .shared_library import Form, Function

log = logging.getLogger("dkfuse")
VERSIONS = cute_ahead.FA4_VERSIONS
FEW = 128  # tokens of the call that makes a helper compile
COMPILE = f"{__name__}:compile_kind"


class Kept:
    """Compiled kernels by their keys, in memory and on disk; it takes the place of their `JITCache`.

    parts: what they depend on beside the key.
    """

    def __init__(self, known: dict[Hashable, Any], parts: tuple[str, ...]):
        self.cache, self.parts = known, parts

    def __contains__(self, key: Hashable) -> bool:
        if key in self.cache:
            return True
        data = disk_cache.get(self._parts(key))
        if data is None:
            return False
        try:
            self.cache[key] = _loaded(data)
        except Exception as error:  # whatever a loader raises, the kernel can be compiled
            log.info("dkfuse: FlashAttention 4's kernel is compiled again, its file cannot be loaded: %s", error)
            return False
        return True

    def __getitem__(self, key: Hashable) -> Any:
        return self.cache[key]

    def __setitem__(self, key: Hashable, kernel: Any) -> None:
        self.cache[key] = kernel
        try:
            disk_cache.put(self._parts(key), shared_library.exported(kernel))
        except Exception as error:  # no place for a temporary file, or a kernel that has no object file
            log.info("dkfuse: FlashAttention 4's kernel is not kept on disk: %s", error)

    def clear(self) -> None:
        self.cache.clear()

    def on_disk(self) -> bool:
        """Whether all that is known is on disk too."""
        return all(disk_cache.get(self._parts(key)) is not None for key in self.cache)

    def object_file(self, kernel: Any) -> bytes | None:
        """The object file of a kernel that is in the cache, from disk."""
        key = next((key for key, known in self.cache.items() if known is kernel), None)
        return None if key is None else disk_cache.get(self._parts(key))

    def _parts(self, key: Hashable) -> tuple[str, ...]:
        return *self.parts, hashlib.sha256(pickle.dumps(key)).hexdigest()


def _loaded(data: bytes) -> Any:
    from cutlass import cute

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.o"
        file.write_bytes(data)
        return cute.runtime.load_module(str(file), enable_tvm_ffi=True)[shared_library.NAME]


def install() -> Kept | None:
    """Keep on disk what FlashAttention 4 compiles from now on in this process; None where it goes its own way."""
    if not cute_ahead.fa4_is_known():
        return None
    cute_ahead.imported()
    try:
        from flash_attn.cute import cache_utils, interface
    except ImportError as error:
        log.info("dkfuse: FlashAttention 4's kernels are not kept on disk: %s", error)
        return None
    function = interface._flash_attn_fwd
    if type(function.compile_cache) is cache_utils.JITCache:
        parts = "fa4", cache_utils._compute_source_fingerprint()
        function.compile_cache = Kept(function.compile_cache.cache, parts)
    return function.compile_cache if isinstance(function.compile_cache, Kept) else None


# -- ahead -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What a kernel is compiled for: a dtype's name, columns and query heads a key head, causal, numbers of keys."""

    dtype: str
    head_dim: int
    groups: int
    causal: bool
    lengths: bool

    @classmethod
    def of(cls, dtype: torch.dtype, head_dim: int, groups: int, causal: bool, lengths: bool) -> Kind:
        return cls(str(dtype).removeprefix("torch."), head_dim, groups, causal, lengths)


def submit(kind: Kind, capability: int) -> bool:
    """Have a helper compile the kernel. False where there is nothing to wait for: it is on disk, or no helper can."""
    if capability != gemm_ahead.CAPABILITY or not usable():
        return False
    if job(kind) not in compile_ahead.POOL.jobs and on_disk(kind):
        return False
    cute_ahead.import_meanwhile()
    cute_ahead.start()
    return compile_ahead.POOL.submit(job(kind))


def usable() -> bool:
    """Whether helpers may compile FlashAttention 4's kernels."""
    return cute_ahead.fa4_is_known() and compile_ahead.allowed() and disk_cache.writable()


def wait(kind: Kind) -> Done | None:
    """What became of the kernel where a helper compiles it; None where none does, and the caller has to."""
    return compile_ahead.POOL.wait(job(kind))


def on_disk(kind: Kind) -> bool:
    """Whether a direct call of the kernel is on disk."""
    return shared_library.there(_parts(kind))


def call(kind: Kind) -> tuple[Function, Form] | None:
    """The kernel from disk, and the form of its direct call."""
    return shared_library.get(_parts(kind))


def keep_call(kind: Kind, kernel: Any, form: Form) -> None:
    """Leave the kernel, which is in their cache, and the form of its direct call on disk."""
    kept = install()
    if kept is not None and (data := kept.object_file(kernel)) is not None:
        shared_library.put(_parts(kind), lambda: data, form)


def job(kind: Kind) -> Job:
    return COMPILE, *astuple(kind), os.path.abspath(disk_cache.root())


def _parts(kind: Kind) -> tuple[str, ...]:
    """What a direct call depends on; variables change what the package does."""
    variables = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(("FA_", "FLASH_ATTENTION_")))
    version = str(attention_kernels.version_of("fa4"))
    return "fa4", repr(kind), version, *gemm_ahead.written_in(), " ".join(variables)


def compile_kind(dtype: str, head_dim: int, groups: int, causal: bool, lengths: bool, folder: str) -> None:
    """In a helper: have a call of tensors without memory compile the kernel, for dkfuse's cache in `folder`."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from . import attention_lengths, attention_run

    disk_cache.use(folder)
    os.environ.setdefault("FLASH_ATTENTION_ARCH", f"sm_{gemm_ahead.CAPABILITY}")  # asked of the GPU otherwise
    if (kept := install()) is None:
        raise RuntimeError("FlashAttention 4 keeps its kernels in a cache of the user's choice")
    kept.clear()  # what was compiled for another folder is to be written to this one too
    with FakeTensorMode():
        shapes = [(1, FEW, heads, head_dim) for heads in (groups, 1, 1)]
        q, k, v = (torch.empty(shape, dtype=getattr(torch, dtype), device="cuda") for shape in shapes)
        if lengths:
            counts = torch.empty(1, dtype=torch.int32, device="cuda")
            attention_lengths._fa4_function()(q, k, v, seqused_k=counts, softmax_scale=None)
        else:
            attention_run._fa4_function()(q, k, v, softmax_scale=None, causal=causal)
    if not kept.cache or not kept.on_disk():
        raise RuntimeError(f"FlashAttention 4 left no kernel in {folder}")
