"""Our Triton kernels inside what torch compiles: what differs between versions, what Inductor does too often."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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


def register_triton_kernel(kernel: Any, constants: dict[str, Any]) -> tuple[int, int]:
    """``(kernel_idx, constant_args_idx)`` of a kernel and its constants in torch's side table."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    _ours.add(getattr(kernel, "fn", kernel))
    return kernel_side_table.add_kernel(kernel), kernel_side_table.add_constant_args(constants)


ANALYSES = ("identify_accessed_tensors", "identify_mutated_tensors")  # torch 2.13, 2.11
WORKER_JOB = "_worker_compile_triton"
_ours: set[Any] = set()  # our kernels, made once per pattern of use and kept
_analyses: dict[tuple, Any] = {}


@contextlib.contextmanager
def analysed_once() -> Iterator[None]:
    """Have Inductor find out once per kernel, not once per launch, which tensors it writes.

    It generates the kernel's TTIR for that, about 0.1 s a launch: a fifth of the compile time of a deep model.
    """
    from torch._higher_order_ops import triton_kernel_wrap

    name = next((n for n in ANALYSES if hasattr(triton_kernel_wrap, n)), "")
    analyse = getattr(triton_kernel_wrap, name, None)
    if analyse is None:
        yield
        return

    def once(kernel: Any, kwargs: dict[str, Any], *more: Any) -> Any:
        if not {kernel, getattr(kernel, "fn", None)} & _ours:
            return analyse(kernel, kwargs, *more)
        key = (kernel, tuple((n, _kind(v)) for n, v in sorted(kwargs.items())), repr(more))
        if key not in _analyses:
            _analyses[key] = analyse(kernel, kwargs, *more)
        return _analyses[key]

    with mock.patch.object(triton_kernel_wrap, name, once):
        yield


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


def _kind(value: Any) -> str:
    """What the generated code depends on: the dtype of a tensor, the value of a constant, nothing of a symbol."""
    if hasattr(value, "dtype"):
        return str(value.dtype)
    return repr(value) if isinstance(value, (int, float, bool, str, type(None))) else "symbol"


def triton_kernel_name(node: fx.Node) -> str:
    """The name of the kernel that a kernel node launches, as profiles show it."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
    return getattr(kernel, "fn", kernel).fn.__name__
