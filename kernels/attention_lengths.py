"""Attention of which each sample's first keys take part: ``LENGTHS[name](q, k, v, lengths, scale, sure) -> out``.

    out = softmax(scale * q k^T + (0 where j < n, else -inf)) v          n = min(max(lengths[b], 1), Sk)

q `[B, H, S, d]`, k, v `[B, Hk, Sk, d]`, lengths int32 `[B]` on the same device, out `[B, H, S, d]` in the memory order
`[B, S, H, d]`. Nothing of it is read by the host: kernels find the numbers in memory, so that they may change under
CUDA graphs. What lies behind the first n keys is not read, or weighed with zero.

fa4     FlashAttention 4 with `seqused_k`
cudnn   cuDNN twice, through torch: to the first `sure` keys without a mask, to the others with one (`attention_parts`)
flash   FlashAttention 2, torch's copy, with packed sequences that are used in part
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import attention_parts, attention_run
from .attention_run import readable

LengthsRun = Callable[[Tensor, Tensor, Tensor, Tensor, "float | None", int], Tensor]


def within(lengths: Tensor, keys: int, bounded: bool = False) -> Tensor:
    """int32 `[B]`, one after the other: `lengths`, or where they are not in 1..keys the nearer of the two.

    bounded: they are in 1..keys, so that nothing is launched for those that have this form.
    """
    if bounded and lengths.dtype is torch.int32 and lengths.is_contiguous():
        return lengths
    return lengths.clamp(1, keys).to(torch.int32).contiguous()


def as_mask(lengths: Tensor, keys: int) -> Tensor:
    """The boolean mask `[B, 1, 1, keys]` that means the same."""
    taken = torch.arange(keys, device=lengths.device) < within(lengths, keys)[:, None]
    return taken[:, None, None, :]


@functools.cache
def _fa4_function() -> Any:
    attention_run._fa4_function()  # imports the package
    from flash_attn.cute import flash_attn_varlen_func

    return flash_attn_varlen_func


def fa4(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float | None, sure: int = 0) -> Tensor:
    function = _fa4_function()
    q, k, v = (readable(t).transpose(1, 2) for t in (q, k, v))
    return function(q, k, v, seqused_k=lengths, softmax_scale=scale)[0].transpose(1, 2)


def flash(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float | None, sure: int = 0) -> Tensor:
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    starts, key_starts = (
        torch.arange(0, batch * size + 1, max(size, 1), dtype=torch.int32, device=q.device) for size in (queries, keys)
    )
    packed = [readable(t).transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    results = attention_run.aten._flash_attention_forward.default(
        *packed, starts, key_starts, queries, keys, 0.0, False, False, scale=scale, seqused_k=lengths
    )
    return results[0].unflatten(0, (batch, queries)).transpose(1, 2)


LENGTHS: dict[str, LengthsRun] = {"fa4": fa4, "cudnn": attention_parts.cudnn, "flash": flash}
