"""Triton helpers for the norms: statistics over a row held as chunks, and the affine behind them."""

# Triton is a language of its own
# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton has no starred tuples

from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import rounded


@triton.jit
def centred(zs, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """z - mean(z) by chunks; lanes past D, which must be 0 in z, are 0 again."""
    total = zs[0]
    for i in tl.static_range(1, CHUNKS):
        total += zs[i]
    mean = tl.sum(total, axis=0) / D
    row = ()
    for i in tl.static_range(CHUNKS):
        if (i + 1) * CHUNK > D:
            columns = i * CHUNK + tl.arange(0, CHUNK)
            row = row + (tl.where(columns < D, zs[i] - mean, 0.0),)
        else:
            row = row + (zs[i] - mean,)
    return row


@triton.jit
def root_factor(zs, EPS: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr):
    """rsqrt(mean(z^2) + EPS) of the row, a scalar."""
    squares = zs[0] * zs[0]
    for i in tl.static_range(1, CHUNKS):
        squares += zs[i] * zs[i]
    return tl.rsqrt(tl.sum(squares, axis=0) / D + EPS)


@triton.jit
def weighted(n, i: tl.constexpr, weight, bias, OFFSET: tl.constexpr, DTYPE: tl.constexpr, ROUNDINGS: tl.constexpr):
    """n*(OFFSET+weight[i]) + bias[i], each optional (None)."""
    a = rounded(n, DTYPE, ROUNDINGS & 4)
    if weight is not None:
        a = rounded(a * (OFFSET + weight[i].to(tl.float32)), DTYPE, ROUNDINGS & 8)
    if bias is not None:
        a = rounded(a + bias[i].to(tl.float32), DTYPE, ROUNDINGS & 16)
    return a
