"""Triton kernel that merges two attentions of the same queries, to the first and to the other keys.

    out = a + (b - a) / (1 + exp(la - lb))          la, lb: logsumexp of the scaled scores of each part
    n == sure: out = a       n < sure: out = NaN    n: the keys that take part, sure: how many a has

a, b, out `[B, H, S, d]` in fp16 or bf16 with any outer strides, la, lb fp32 `[B, H, S]`, n int32 `[B]`. The sum is in
fp32 and rounded once. Source of the merge: Dao et al., FlashAttention (2205.14135), where blocks of keys are merged so.
"""

# Triton is a language of its own
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # rows of d elements per program, neighbours in memory: heads of a token, then tokens


@triton.jit
def _merge(
    a,
    b,
    la,
    lb,
    lengths,
    out,
    sure,
    heads,
    tokens,
    a_sb,
    a_sh,
    a_ss,
    b_sb,
    b_sh,
    b_ss,
    out_sb,
    out_sh,
    out_ss,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // heads, row % heads
    columns = tl.arange(0, COLUMNS)
    rows_inside = row < heads * tokens
    inside = rows_inside[:, None] & (columns < D)[None, :]

    n = tl.load(lengths + sample)
    sums_at = (sample * heads + head) * tokens + token
    first = tl.load(la + sums_at, mask=rows_inside, other=0.0)
    second = tl.load(lb + sums_at, mask=rows_inside, other=0.0)
    share = 1.0 / (1.0 + tl.exp(first - second))

    a_at = sample * a_sb + head * a_sh + token * a_ss
    b_at = sample * b_sb + head * b_sh + token * b_ss
    out_at = sample * out_sb + head * out_sh + token * out_ss
    x = tl.load(a + a_at[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(b + b_at[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    # n == sure: b is of a key that does not take part, whatever is there
    merged = tl.where(n > sure, x + (y - x) * share[:, None], x)
    merged = tl.where(n >= sure, merged, float("nan"))
    tl.store(out + out_at[:, None] + columns[None, :], merged.to(out.dtype.element_ty), mask=inside)


def merge(a: Tensor, la: Tensor, b: Tensor, lb: Tensor, lengths: Tensor, sure: int) -> Tensor:
    """The merged attention, `[B, S, H, d]` in memory; on the current device."""
    a, b = (t if t.stride(-1) == 1 else t.contiguous() for t in (a, b))  # the kernel steps by 1 along d
    batch, heads, tokens, d = a.shape
    out = a.new_empty((batch, tokens, heads, d)).transpose(1, 2)
    grid = (triton.cdiv(heads * tokens, ROWS), batch)
    strides = [s for tensor in (a, b, out) for s in tensor.stride()[:3]]
    _merge[grid](
        a, b, la, lb, lengths, out, sure, heads, tokens, *strides, D=d, COLUMNS=triton.next_power_of_2(d), ROWS=ROWS
    )
    return out
