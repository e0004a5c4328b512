"""`dkfuse::attention`: scaled dot product attention by a named kernel.

    out = softmax(scale * q k^T + mask) v          scale None: 1/sqrt(d); causal: key j only for queries i >= j

Shapes: q `[B, H, S, d]`, k, v `[B, Hk, Sk, d]` (gqa: H a multiple of Hk), mask bool (True: take part) or of q's dtype,
broadcasting to `[B, H, S, Sk]`; out `[B, H, S, d]`, in memory `[B, S, H, d]` or laid out like q, by kernel
(`attention_kernels`). Any strides and addresses; inner stride 1 and an address and other strides of whole 16 bytes are
read in place, others copied.
Dtypes: fp16, bf16; fp32 and fp64 for "sdpa". Scores and sums are fp32, out is rounded once.
Errors: ValueError for a kernel that does not exist, or one that takes no mask given a mask; ImportError where its
package is missing.

On a CPU, and by any kernel, out is `torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_kernels import HALF, KERNELS

# `using` names the kernel: Inductor cannot call an op with an argument `kernel`
SCHEMA = (
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, *, bool causal=False, float? scale=None, "
    'bool gqa=False, str using="sdpa") -> Tensor'
)


def _empty(q: Tensor, v: Tensor, kernel: str) -> Tensor:
    """Memory for the result in the order that `kernel` leaves it in."""
    if kernel not in KERNELS:
        raise ValueError(f"dkfuse::attention: there is no kernel {kernel!r}; known: {', '.join(KERNELS)}")
    shape = (*q.shape[:-1], v.shape[-1])
    if KERNELS[kernel].order == "tokens" and q.dim() == 4:
        batch, heads, tokens, head_dim = shape
        return q.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)
    return torch.empty_like(q) if v.shape[-1] == q.shape[-1] else q.new_empty(shape)


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, using: str = "sdpa", **_: object) -> Tensor:
    return _empty(q, v, using)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    gqa: bool = False,
    using: str = "sdpa",
) -> Tensor:
    """The op's definition, by torch, in the memory order of the kernel."""
    _check_mask(mask, using)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
    )
    return _laid_out(out, q, v, using)


def _cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    gqa: bool = False,
    using: str = "sdpa",
) -> Tensor:
    from .attention_run import RUN, readable

    if using not in RUN:  # torch asks none of its kernels whether an address suits it
        like = q
        if q.dtype in HALF:
            q, k, v = readable(q), readable(k), readable(v)
        out = reference(q, k, v, mask, causal=causal, scale=scale, gqa=gqa, using=using)
        return _laid_out(out, like, v, using)
    _check_mask(mask, using)
    if q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            out = RUN[using](q, k, v, causal, scale)
    else:
        out = RUN[using](q, k, v, causal, scale)
    return out if KERNELS[using].order == "tokens" else _laid_out(out, q, v, using)


def _check_mask(mask: Tensor | None, kernel: str) -> None:
    if mask is not None and kernel != "sdpa":
        raise ValueError(f"dkfuse::attention: {kernel} takes no mask; give using='sdpa' for one of {list(mask.shape)}")


def _laid_out(out: Tensor, q: Tensor, v: Tensor, kernel: str) -> Tensor:
    expected = _empty(q, v, kernel)
    return out if out.stride() == expected.stride() else expected.copy_(out)


# flexible_layout: every kernel reads q, k and v through their strides, so Inductor need not copy them into those that
# the graph was traced with.
_library = torch.library.Library("dkfuse", "FRAGMENT")
_library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
torch.library.register_fake("dkfuse::attention", _fake, lib=_library)
_library.impl("attention", reference, "CompositeExplicitAutograd")
_library.impl("attention", _cuda, "CUDA")
