"""`dkfuse::attention`: scaled dot product attention by a named kernel.

    out = softmax(scale * q k^T + mask) v          scale None: 1/sqrt(d); causal: key j only for queries i >= j
    key_lengths: mask = 0 where j < min(max(key_lengths[b], 1), Sk), else -inf
    sure: a promise that key_lengths >= sure, which cuDNN needs (`attention_parts`): it gives NaN where it is broken
    bounded: a promise that 1 <= key_lengths <= Sk, which saves a launch; where it is broken, memory behind k is read

Shapes: q `[B, H, S, d]`, k, v `[B, Hk, Sk, d]` (gqa: H a multiple of Hk), mask bool (True: take part) or of q's dtype,
broadcasting to `[B, H, S, Sk]`, key_lengths int32 or int64 `[B]`; out `[B, H, S, d]`, in memory `[B, S, H, d]` or laid
out like q, by kernel (`attention_kernels`), with key_lengths `[B, S, H, d]` for all but "sdpa". Any strides and
addresses; inner stride 1 and an address and other strides of whole 16 bytes are read in place, others copied.
Dtypes: fp16, bf16; fp32 and fp64 for "sdpa". Scores and sums are fp32, out is rounded once.
Errors: ValueError for a kernel that does not exist, one that takes no mask or key_lengths given them, and key_lengths
of another shape or dtype or together with a mask or causal; ImportError where its package is missing.

On a CPU, and by any kernel, out is `torch.nn.functional.scaled_dot_product_attention`.
Compiled graphs call `into` past torch's dispatcher (`dkfuse.compat_direct`).
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import attention_fa4
from .attention_kernels import HALF, KERNELS
from .attention_lengths import LENGTHS, as_mask, within
from .attention_run import RUN, readable

# `using` names the kernel: Inductor cannot call an op with an argument `kernel`
SCHEMA = (
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? key_lengths=None, *, bool causal=False, "
    'float? scale=None, bool gqa=False, str using="sdpa", int sure=0, bool bounded=False) -> Tensor'
)


def _empty(q: Tensor, v: Tensor, kernel: str, key_lengths: Tensor | None) -> Tensor:
    """Memory for the result in the order that `kernel` leaves it in."""
    shape = (*q.shape[:-1], v.shape[-1])
    tokens_first = KERNELS[kernel].order == "tokens" or (key_lengths is not None and kernel != "sdpa")
    if tokens_first and q.dim() == 4:
        batch, heads, tokens, head_dim = shape
        return q.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)
    return torch.empty_like(q) if v.shape[-1] == q.shape[-1] else q.new_empty(shape)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    *,
    causal: bool = False,
    using: str = "sdpa",
    **_: object,
) -> Tensor:
    _check(q, mask, key_lengths, causal, using)
    return _empty(q, v, using, key_lengths)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    gqa: bool = False,
    using: str = "sdpa",
    sure: int = 0,
    bounded: bool = False,
) -> Tensor:
    """The op's definition, by torch, in the memory order of the kernel."""
    _check(q, mask, key_lengths, causal, using)
    if key_lengths is not None:
        mask = as_mask(key_lengths, k.shape[2])
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
    )
    return _laid_out(out, _empty(q, v, using, key_lengths))


def _cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    gqa: bool = False,
    using: str = "sdpa",
    sure: int = 0,
    bounded: bool = False,
) -> Tensor:
    if using == "fa4" and mask is None:  # before the checks, which the first call of its kind has passed
        found = attention_fa4.again(q, k, v, key_lengths, causal, scale, bounded)
        if found is not None:
            return found
    if using not in RUN:  # torch asks none of its kernels whether an address suits it
        like = q
        if q.dtype in HALF:
            q, k, v = readable(q), readable(k), readable(v)
        out = reference(q, k, v, mask, key_lengths, causal=causal, scale=scale, gqa=gqa, using=using)
        return _laid_out(out, _empty(like, v, using, key_lengths))
    _check(q, mask, key_lengths, causal, using)
    with torch.cuda.device(q.device) if q.device.index != torch.cuda.current_device() else contextlib.nullcontext():
        if using == "fa4":
            out = attention_fa4.first(q, k, v, key_lengths, causal, scale, bounded)
        elif key_lengths is not None:
            out = LENGTHS[using](q, k, v, within(key_lengths, k.shape[2], bounded), scale, sure)
        else:
            out = RUN[using](q, k, v, causal, scale)
    tokens_first = KERNELS[using].order == "tokens"
    return out if tokens_first else _laid_out(out, _empty(q, v, using, key_lengths))


def into(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None = None,
    *,
    causal: bool,
    scale: float | None,
    gqa: bool,
    bounded: bool,
    key: str | None,
    out: Tensor,
) -> None:
    """The attention by FlashAttention 4 of `[B, S, H, d]` views, written to `out`, which is contiguous in that order.

    Of a call that was checked, on the current device. key: see `attention_fa4.into`.
    """
    if out.is_cuda:
        attention_fa4.into(q, k, v, key_lengths, causal, scale, bounded, key, out)
    else:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        found = reference(q, k, v, None, key_lengths, causal=causal, scale=scale, gqa=gqa, using="fa4")
        out.copy_(found.transpose(1, 2))


def _check(q: Tensor, mask: Tensor | None, key_lengths: Tensor | None, causal: bool, kernel: str) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"dkfuse::attention: there is no kernel {kernel!r}; known: {', '.join(KERNELS)}")
    if mask is not None and kernel != "sdpa":
        raise ValueError(f"dkfuse::attention: {kernel} takes no mask; give using='sdpa' for one of {list(mask.shape)}")
    if key_lengths is None:
        return
    shape = list(key_lengths.shape)
    if kernel != "sdpa" and kernel not in LENGTHS:
        raise ValueError(f"dkfuse::attention: {kernel} takes no key_lengths; these do: sdpa, {', '.join(LENGTHS)}")
    if mask is not None or causal:
        other = "a mask" if mask is not None else "causal=True"
        raise ValueError(f"dkfuse::attention: key_lengths and {other} do not go together; give one mask of both")
    wrong = len(shape) != 1 or statically_known_true(shape[0] != q.shape[0])
    if wrong or key_lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"dkfuse::attention: key_lengths are {key_lengths.dtype} {shape}; int32 or int64 [{q.shape[0]}] are needed"
        )


def _laid_out(out: Tensor, expected: Tensor) -> Tensor:
    return out if out.stride() == expected.stride() else expected.copy_(out)


# flexible_layout: every kernel reads q, k and v through their strides, so Inductor need not copy them into those that
# the graph was traced with.
_library = torch.library.Library("dkfuse", "FRAGMENT")
_library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
torch.library.register_fake("dkfuse::attention", _fake, lib=_library)
_library.impl("attention", reference, "CompositeExplicitAutograd")
_library.impl("attention", _cuda, "CUDA")
