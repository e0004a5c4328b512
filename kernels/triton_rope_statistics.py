"""Triton helpers for norm_rope: statistics of rows held as parts of tiles, row by row or over all rows of a program.

`zs` holds PARTS parts of each of BLOCKS tiles, see `triton_rope_tiles`. COUNT is the number of elements of a statistic.
"""

# Triton is a language of its own
# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton has no starred tuples

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def total(zs, b: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr, ACROSS: tl.constexpr):
    """Sums over the rows of tile `b`, `[ROWS, 1]`; with ACROSS one sum over all tiles."""
    FIRST: tl.constexpr = 0 if ACROSS else b
    LAST: tl.constexpr = BLOCKS if ACROSS else b + 1
    accumulated = zs[FIRST * PARTS]
    for k in tl.static_range(FIRST, LAST):
        if k > FIRST:
            accumulated += zs[k * PARTS]
        if PARTS > 1:
            accumulated += zs[k * PARTS + 1]
    AXIS: tl.constexpr = None if ACROSS else 1
    result = tl.sum(accumulated, axis=AXIS, keep_dims=not ACROSS)
    if PARTS > 2:
        tails = zs[FIRST * PARTS + 2]
        for k in tl.static_range(FIRST + 1, LAST):
            tails += zs[k * PARTS + 2]
        result += tl.sum(tails, axis=AXIS, keep_dims=not ACROSS)
    return result


@triton.jit
def centred(
    zs,
    first,
    n0,
    D: tl.constexpr,
    R: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    STYLE: tl.constexpr,
    MASKED: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """z - mean(z); masked lanes, which are 0 in z, are 0 again."""
    mean = total(zs, 0, BLOCKS, PARTS, ACROSS) / COUNT
    result = ()
    for b in tl.static_range(BLOCKS):
        if b > 0 and not ACROSS:
            mean = total(zs, b, BLOCKS, PARTS, ACROSS) / COUNT
        for j in tl.static_range(PARTS):
            rows = first + b * ROWS + tl.arange(0, ROWS)
            count = D if STYLE == 0 else D // 2 if STYLE == 1 else R // 2 if j < 2 else D - R
            result = result + (cleared(zs[b * PARTS + j] - mean, rows, n0, count, MASKED and ACROSS),)
    return result


@triton.jit
def cleared(z, rows, n0, COUNT: tl.constexpr, MASKED: tl.constexpr):
    """z with 0 in the columns from COUNT on, and in the rows from n0 on if MASKED."""
    inside = (tl.arange(0, z.shape[1]) < COUNT)[None, :]
    if MASKED:
        inside = inside & (rows < n0)[:, None]
    if z.shape[1] > COUNT or MASKED:
        z = tl.where(inside, z, 0.0)
    return z


@triton.jit
def normalised(
    zs, EPS: tl.constexpr, COUNT: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr, ACROSS: tl.constexpr
):
    """z * rsqrt(mean(z^2) + EPS)."""
    squares = ()
    for i in tl.static_range(BLOCKS * PARTS):
        squares = squares + (zs[i] * zs[i],)
    factor = tl.rsqrt(total(squares, 0, BLOCKS, PARTS, ACROSS) / COUNT + EPS)
    result = ()
    for b in tl.static_range(BLOCKS):
        if b > 0 and not ACROSS:
            factor = tl.rsqrt(total(squares, b, BLOCKS, PARTS, ACROSS) / COUNT + EPS)
        for j in tl.static_range(PARTS):
            result = result + (zs[b * PARTS + j] * factor,)
    return result
