"""Calls of the attention kernels: ``RUN[name](q, k, v, causal, scale) -> out``, q, k, v and out `[B, H, S, d]`.

FlashAttention and SageAttention are given `[B, S, H, d]` views: the transposes copy nothing. Packages are imported when
they are first called. Sources of the algorithms: Dao et al., FlashAttention 2 (2307.08691) and 3 (2407.08608);
Zhang et al., SageAttention 2 (2411.10958); cuDNN's graph API through torch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attention_kernels import ALIGNMENT

Run = Callable[[Tensor, Tensor, Tensor, bool, "float | None"], Tensor]
aten = torch.ops.aten


def readable(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy where its strides or its address are not whole vectors."""
    *outer, inner = tensor.stride()
    if inner == 1 and not any(s % ALIGNMENT for s in outer) and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _tokens(*tensors: Tensor) -> list[Tensor]:
    """`[B, S, H, d]` views."""
    return [readable(t).transpose(1, 2) for t in tensors]


# what FlashAttention 4.0.0b20 makes the CuTe DSL say at each compilation of a kernel; it works all the same
HARMLESS = r"Argument aux_data \(position \d+\) cannot be converted to a JitArgument for function '\w*flash_attn"


@functools.cache
def _fa4_function() -> Any:
    from . import attention_kept, cute_ahead

    cute_ahead.imported()
    from flash_attn.cute import flash_attn_func

    attention_kept.install()
    warnings.filterwarnings("ignore", HARMLESS, UserWarning, r"cutlass\.base_dsl\.dsl$")
    return flash_attn_func


def fa4(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """FlashAttention 4; the first call of a (dtype, head_dim, causal, grouping) compiles its kernel, in seconds."""
    return _fa4_function()(*_tokens(q, k, v), softmax_scale=scale, causal=causal)[0].transpose(1, 2)


@functools.cache
def _fa3_function() -> Any:
    from flash_attn_interface import flash_attn_func

    return flash_attn_func


def fa3(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """FlashAttention 3, whose older releases return (out, logsumexp)."""
    result = _fa3_function()(*_tokens(q, k, v), softmax_scale=scale, causal=causal)
    return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)


@functools.cache
def _sage_function() -> Any:
    from sageattention import sageattn

    return sageattn


def sage(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """SageAttention: q and k in int8, lossy."""
    return _sage_function()(*_tokens(q, k, v), tensor_layout="NHD", is_causal=causal, sm_scale=scale).transpose(1, 2)


def cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    q, k, v = readable(q), readable(k), readable(v)
    return aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, False, 0.0, causal, False, scale=scale)[0]


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    q, k, v = readable(q), readable(k), readable(v)
    return aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, causal, False, scale=scale)[0]


def efficient(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    q, k, v = readable(q), readable(k), readable(v)
    return aten._scaled_dot_product_efficient_attention.default(q, k, v, None, False, 0.0, causal, scale=scale)[0]


RUN: dict[str, Run] = {"fa4": fa4, "fa3": fa3, "sage": sage, "cudnn": cudnn, "flash": flash, "efficient": efficient}
