"""Our Triton kernels inside what torch compiles: what differs between versions, what Inductor does too often."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from torch import fx


def launch_options() -> dict[str, Any]:
    """Options under which Inductor launches a kernel node of ours like its own: 2 us on top of it instead of 9."""
    import torch._inductor.config as config

    name = "static_launch_user_defined_triton_kernels"
    return {name: True} if hasattr(config, name) else {}


def triton_call_target() -> Any:
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional

    return triton_kernel_wrapper_functional


def register_triton_kernel(kernel: Any, constants: dict[str, Any], written: Sequence[str]) -> tuple[int, int]:
    """``(kernel_idx, constant_args_idx)`` of a kernel and its constants in torch's side table.

    written: the parameters whose tensors it writes, and no others, which `writes_known` tells Inductor.
    """
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    _written.setdefault(_function(kernel), set()).add(frozenset(written))
    return kernel_side_table.add_kernel(kernel), kernel_side_table.add_constant_args(constants)


ANALYSES = ("identify_accessed_tensors", "identify_mutated_tensors")  # torch 2.13 and later, 2.11
WORKER_JOB = "_worker_compile_triton"
_written: dict[Any, set[frozenset[str]]] = {}  # by our kernels, made once per pattern of use and kept


@contextlib.contextmanager
def writes_known() -> Iterator[None]:
    """Tell Inductor which tensors a kernel of ours writes.

    It finds out from the kernel's TTIR, which it generates for each launch: about 0.1 s, in this process. A kernel
    that was registered with several sets it analyses as before, and so it does where it wants to know more, to fuse
    what comes after a kernel.
    """
    from torch._higher_order_ops import triton_kernel_wrap

    name = next((n for n in ANALYSES if hasattr(triton_kernel_wrap, n)), "")
    analyse = getattr(triton_kernel_wrap, name, None)
    if analyse is None:
        yield
        return

    def known(kernel: Any, kwargs: dict[str, Any], *more: Any) -> Any:
        sets = _written.get(_function(kernel), ())
        if len(sets) != 1 or _fuses_epilogues():
            return analyse(kernel, kwargs, *more)
        (written,) = sets
        order = [n for n in kernel.arg_names if n in written]
        return order if name == "identify_mutated_tensors" else _accesses(kwargs, order)

    with mock.patch.object(triton_kernel_wrap, name, known):
        yield


def _function(kernel: Any) -> Any:
    """The Python function behind Triton's wrappers, of which torch passes now one, now another."""
    while hasattr(kernel, "fn"):
        kernel = kernel.fn
    return kernel


def _fuses_epilogues() -> bool:
    import torch._inductor.config as config

    return bool(getattr(config, "epilogue_fusion_user_defined_triton_kernel", False))


def _accesses(kwargs: dict[str, Any], written: list[str]) -> Any:
    """What torch wants to know of a launch from 2.13 on: every tensor may be read."""
    from torch._higher_order_ops.triton_kernel_wrap import TensorAccesses
    from torch._inductor.dependencies import ReadWrites, StarDep
    from torch.utils._ordered_set import OrderedSet

    reads = OrderedSet(StarDep(name) for name, value in kwargs.items() if hasattr(value, "dtype"))
    writes = OrderedSet(StarDep(name) for name in written)
    return TensorAccesses(ReadWrites(reads=reads, writes=writes, index_exprs=OrderedSet()), can_fuse_epilogue=False)


@contextlib.contextmanager
def workers_told() -> Iterator[None]:
    """Have Inductor's worker processes compile with `launch_options` too.

    Which launcher a kernel gets is decided where it is compiled, and torch tells workers only some of its settings:
    as soon as they are up, kernels of ours would be launched at the price of a user's.
    """
    from torch._inductor import async_compile
    from torch._inductor.compile_worker.subproc_pool import SubprocPool

    told, submit = launch_options(), SubprocPool.submit
    compile_kernel = getattr(async_compile, WORKER_JOB, None)

    def submit_told(pool: Any, job: Any, *args: Any, **more: Any) -> Any:
        if compile_kernel is not None and job is compile_kernel and len(args) == 3:  # kernel, environment, settings
            args = (*args[:2], {**args[2], **told})
        return submit(pool, job, *args, **more)

    with mock.patch.object(SubprocPool, "submit", submit_told):
        yield


def triton_kernel_name(node: fx.Node) -> str:
    """The name of the kernel that a kernel node launches, as profiles show it."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
    return getattr(kernel, "fn", kernel).fn.__name__
