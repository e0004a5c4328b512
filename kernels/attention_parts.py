"""Attention in two parts, for a kernel that is fast without a mask: the keys that all take part, then the others.

    a, la = attention(q, k[:sure], v[:sure])                no mask
    b, lb = attention(q, k[sure:], v[sure:])                key sure + j for j < n - sure
    out   = merged by logsumexp (`triton_merge`)

Where all but the last few keys take part in any case (a video's, before the padded text's), the second part is short,
and the time is that of attention without a mask. a and b are rounded before they are merged: once more than in one
attention with a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_run import readable

aten = torch.ops.aten


def cudnn(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float | None, sure: int) -> Tensor:
    """cuDNN for both parts. lengths int32 `[B]` in 1..Sk, 0 < sure < Sk; NaN for a sample of less than `sure` keys."""
    from .triton_merge import merge

    if not 0 < sure < k.shape[2]:
        raise ValueError(
            f"dkfuse::attention: cudnn takes key_lengths where 0 < sure < {k.shape[2]} keys, sure is {sure}; "
            "fa4 and flash need no such promise"
        )
    q, k, v = readable(q), readable(k), readable(v)
    a, la = _with_sums(q, k[:, :, :sure], v[:, :, :sure], None, scale)
    # of one key at least, so that no sum is over nothing: where n == sure, the merge takes a alone
    out_of_it = torch.arange(sure, k.shape[2], device=q.device) >= lengths.clamp(min=sure + 1)[:, None]
    bias = q.new_zeros(out_of_it.shape).masked_fill_(out_of_it, float("-inf"))[:, None, None, :]
    b, lb = _with_sums(q, k[:, :, sure:], v[:, :, sure:], bias, scale)
    return merge(a, la, b, lb, lengths, sure)


def _with_sums(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    """(attention, logsumexp fp32 `[B, H, S]`)."""
    out, sums, *_ = aten._scaled_dot_product_cudnn_attention.default(
        q, k, v, bias, True, 0.0, False, False, scale=scale
    )
    return out, sums.reshape(q.shape[:3]).contiguous()
