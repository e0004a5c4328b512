"""Triton kernel that copies tokens in another order, one for each sample.

    out[b, h, j] = x[b, h, order[b, j]]          x `[B, H, S, d]`, out `[B, H, N, d]`, order `[B, N]`

A copy at the bandwidth of memory: rows of d elements, neighbours in the result, heads of a token first.
"""

# Triton is a language of its own
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 8192  # of a program


@triton.jit
def _reorder(
    x,
    order,
    out,
    heads,
    tokens,
    x_sb,
    x_sh,
    x_ss,
    x_sd,
    order_sb,
    order_ss,
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
    source = tl.load(order + sample * order_sb + token * order_ss, mask=rows_inside, other=0).to(tl.int64)
    x_at = sample * x_sb + head * x_sh + source * x_ss
    out_at = sample * out_sb + head * out_sh + token * out_ss
    values = tl.load(x + x_at[:, None] + (columns * x_sd)[None, :], mask=inside, other=0.0)
    tl.store(out + out_at[:, None] + columns[None, :], values, mask=inside)


def reorder(x: Tensor, out: Tensor, order: Tensor) -> None:
    """Fill `out`, whose last stride is 1; on the current device."""
    batch, heads, tokens, d = out.shape
    columns = triton.next_power_of_2(d)
    rows = max(1, ELEMENTS // columns)
    grid = (triton.cdiv(heads * tokens, rows), batch)
    strides = (*x.stride(), *order.stride(), *out.stride()[:3])
    _reorder[grid](x, order, out, heads, tokens, *strides, D=d, COLUMNS=columns, ROWS=rows, num_warps=8)
