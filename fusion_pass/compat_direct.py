"""Calls of our ops in the code that Inductor writes, past torch's dispatcher, which takes as long as the call itself.

    buf = torch.ops.dkfuse.linear.default(x, weight, bias, act="gelu", ...)      11 us of CPU besides those of the GEMM
    extern_kernels.dkfuse_linear(x, weight, bias, act="gelu", ..., out=buf)      none

The second is how Inductor calls cuBLAS. The result's memory is planned with the others'. Graphs written as C++, calls
by another kernel than the functions below have, and other devices than CUDA's and the CPU stay as they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch


class Direct(NamedTuple):
    """What is called: the tensors among an op's arguments, one after the other, and keywords for the rest."""

    tensors: Sequence[Any]
    keywords: dict[str, Any]


def _linear(
    x: Any, weight: Any, bias: Any = None, *, act: str = "none", using: str = "cublas", tiles: str = ""
) -> Direct | None:
    from dkfuse.kernels.gemm_kernels import DEFAULT_TILES, QUACK

    return Direct((x, weight, bias), {"act": act, "tiles": tiles or DEFAULT_TILES}) if using == QUACK else None


def _joint_linear(xs: Any, weights: Any, biases: Any, batch: int, tiles: Sequence[str]) -> Direct:
    biased = [bias is not None for bias in biases]
    return Direct((*xs, *weights, *biases), {"biased": biased, "batch": batch, "tiles": list(tiles)})


def _linear_gelu(x: Any, weight: Any, bias: Any) -> Direct:
    return Direct((x, weight, bias), {})


def _split_linear(parts: Any, weight: Any, bias: Any) -> Direct:
    return Direct((*parts, weight, bias), {"streams": len(parts)})


def _attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    key_lengths: Any = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    gqa: bool = False,
    using: str = "sdpa",
    sure: int = 0,
    bounded: bool = False,
) -> Direct | None:
    from dkfuse.kernels.attention_fa4 import known

    if using != "fa4" or mask is not None or not known():
        return None
    return Direct((q, k, v, key_lengths), {"causal": causal, "scale": scale, "gqa": gqa, "bounded": bounded})


@functools.cache
def _functions() -> dict[str, tuple[Callable[..., Direct | None], Callable[..., None]]]:
    """By op: its arguments as those of a direct call, None where it is none, and the function that is called."""
    from dkfuse.kernels import attention, gemm, joint_linear, linear_ops

    return {
        "linear": (_linear, gemm.into),
        "joint_linear": (_joint_linear, joint_linear.into),
        "linear_gelu": (_linear_gelu, linear_ops.linear_gelu_into),
        "split_linear": (_split_linear, linear_ops.split_linear_into),
        "attention": (_attention, attention.into),
    }


@functools.cache
def register() -> None:
    """Have Inductor write direct calls, and find the functions that code from its cache calls."""
    from torch._inductor import lowering
    from torch._inductor.select_algorithm import extern_kernels

    for op, (direct, function) in _functions().items():
        name = f"dkfuse_{op}"
        setattr(extern_kernels, name, function)
        overload = getattr(torch.ops.dkfuse, op).default
        fallback = lowering.fallback_handler(overload)
        lowering.register_lowering(overload, type_promotion_kind=None)(_lowering(name, direct, fallback))


def _lowering(name: str, direct: Callable[..., Direct | None], fallback: Callable[..., Any]) -> Callable[..., Any]:
    def lower(*args: Any, **kwargs: Any) -> Any:
        from torch._inductor import ir
        from torch._inductor.virtualized import V

        call = None if V.graph.cpp_wrapper else direct(*args, **kwargs)
        result = V.graph.current_node.meta["val"]
        if call is None or result.device.type not in ("cuda", "cpu"):
            return fallback(*args, **kwargs)
        layout = ir.FixedLayout(
            result.device,
            result.dtype,
            ir.convert_shape_to_inductor(result.shape),
            ir.convert_shape_to_inductor(result.stride()),
        )
        tensors = [ir.ExternKernel.realize_input(t) for t in call.tensors if t is not None]
        out = ir.ExternKernelOut(
            layout=layout, inputs=tensors, kwargs=call.keywords, python_kernel_name=f"extern_kernels.{name}"
        )
        return ir.TensorBox.create(out)

    return lower
