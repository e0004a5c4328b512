"""Triton helpers for norm_rope: tiles of rows as pairs of columns, and the tables of a rotation.

A tile of rows is a tuple of parts, `[ROWS, columns]` each, by STYLE:

    0  no rotation     (all columns,)
    1  interleaved     (even columns, odd columns): one load of whole rows, split in registers
    2  half            (first of each pair, second of each pair, columns behind the rotation if there are any)

Column counts are padded to powers of two and masked. A stride of None means that all rows share the values: one tile
serves all of a program, `[1, columns]`, or with REPEAT `[ROWS, columns]`, which every thread reads for itself where the
other spreads it through shared memory. Offsets are int64.
"""

# Triton is a language of its own
# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton has no starred tuples

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def places(at, stride, inner, rows, START: tl.constexpr, COLUMNS: tl.constexpr):
    """Element offsets of columns START, START+1, ... of `rows`, `[ROWS, COLUMNS]`; `[1, COLUMNS]` without a stride."""
    offsets = at + (START + tl.arange(0, COLUMNS)).to(tl.int64)[None, :] * inner
    if stride is not None:
        offsets = offsets + rows[:, None] * stride
    return offsets


@triton.jit
def load_tile(
    pointer,
    at,
    stride,
    inner,
    rows,
    n0,
    START: tl.constexpr,
    COUNT: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    REPEAT: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Columns START to START+COUNT of `rows` (those below n0 if MASKED); lanes beyond read 0."""
    offsets = places(at, stride, inner, rows, START, COLUMNS)
    if stride is None and REPEAT:
        offsets = tl.broadcast_to(offsets, (rows.shape[0], COLUMNS))
    inside = (tl.arange(0, COLUMNS) < COUNT)[None, :]
    if MASKED and stride is not None:
        inside = inside & (rows < n0)[:, None]
    if COUNT < COLUMNS or (MASKED and stride is not None):
        tile = tl.load(pointer + offsets, mask=inside, other=0.0, eviction_policy=EVICT)
    else:
        tile = tl.load(pointer + offsets, eviction_policy=EVICT)
    return tile


@triton.jit
def store_tile(
    pointer,
    at,
    stride,
    rows,
    n0,
    value,
    START: tl.constexpr,
    COUNT: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    offsets = places(at, stride, 1, rows, START, COLUMNS)
    inside = (tl.arange(0, COLUMNS) < COUNT)[None, :]
    if MASKED:
        inside = inside & (rows < n0)[:, None]
    if COUNT < COLUMNS or MASKED:
        tl.store(pointer + offsets, value, mask=inside)
    else:
        tl.store(pointer + offsets, value)


@triton.jit
def split_pairs(tile):
    """The even and the odd columns."""
    return tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 2, 2)))


@triton.jit
def load_parts(
    pointer,
    at,
    stride,
    inner,
    rows,
    n0,
    D: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAIL: tl.constexpr,
    STYLE: tl.constexpr,
    MASKED: tl.constexpr,
    REPEAT: tl.constexpr,
    EVICT: tl.constexpr,
):
    """One tile of rows as its parts."""
    if STYLE == 2:
        first = load_tile(pointer, at, stride, inner, rows, n0, 0, R // 2, COLUMNS, MASKED, REPEAT, EVICT)
        second = load_tile(pointer, at, stride, inner, rows, n0, R // 2, R // 2, COLUMNS, MASKED, REPEAT, EVICT)
        parts = (first, second)
        if TAIL > 0:
            parts = parts + (load_tile(pointer, at, stride, inner, rows, n0, R, D - R, TAIL, MASKED, REPEAT, EVICT),)
    elif STYLE == 1:
        even, odd = split_pairs(load_tile(pointer, at, stride, inner, rows, n0, 0, D, COLUMNS, MASKED, REPEAT, EVICT))
        parts = (even, odd)
    else:
        parts = (load_tile(pointer, at, stride, inner, rows, n0, 0, D, COLUMNS, MASKED, REPEAT, EVICT),)
    return parts


@triton.jit
def load_operand_parts(
    pointer,
    at,
    stride,
    inner,
    first,
    n0,
    D: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAIL: tl.constexpr,
    STYLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    MASKED: tl.constexpr,
    REPEAT: tl.constexpr,
):
    """A weight or bias: the parts of every tile, the same ones where all rows share them. None for a missing one."""
    if pointer is None:
        parts = None
    else:
        parts = ()
        rows = first + tl.arange(0, ROWS)
        one = load_parts(pointer, at, stride, inner, rows, n0, D, R, COLUMNS, TAIL, STYLE, MASKED, REPEAT, "evict_last")
        for b in tl.static_range(BLOCKS):
            if b > 0 and stride is not None:
                rows = first + b * ROWS + tl.arange(0, ROWS)
                one = load_parts(
                    pointer, at, stride, inner, rows, n0, D, R, COLUMNS, TAIL, STYLE, MASKED, REPEAT, "evict_last"
                )
            parts = parts + one
    return parts


@triton.jit
def load_factors(
    cos,
    sin,
    cos_at,
    sin_at,
    cos_s0,
    sin_s0,
    cos_si,
    sin_si,
    rows,
    n0,
    R: tl.constexpr,
    PAIRS: tl.constexpr,
    STYLE: tl.constexpr,
    TABLES: tl.constexpr,
    MASKED: tl.constexpr,
    REPEAT: tl.constexpr,
):
    """(c0, s0, c1, s1) of the pairs: out0 = c0*a0 - s0*a1, out1 = c1*a1 + s1*a0. TABLES: its index."""
    # Kept for the other projection and the other heads; tables of every row are read once.
    LAST: tl.constexpr = "evict_last" if cos_s0 is None else ""
    if TABLES == 0:
        c = load_tile(cos, cos_at, cos_s0, cos_si, rows, n0, 0, R // 2, PAIRS, MASKED, REPEAT, LAST)
        s = load_tile(sin, sin_at, sin_s0, sin_si, rows, n0, 0, R // 2, PAIRS, MASKED, REPEAT, LAST)
        factors = (c, s, c, s)
    elif TABLES == 1:
        if STYLE == 1:
            c0, c1 = split_pairs(
                load_tile(cos, cos_at, cos_s0, cos_si, rows, n0, 0, R, 2 * PAIRS, MASKED, REPEAT, LAST)
            )
            s0, s1 = split_pairs(
                load_tile(sin, sin_at, sin_s0, sin_si, rows, n0, 0, R, 2 * PAIRS, MASKED, REPEAT, LAST)
            )
        else:
            c0 = load_tile(cos, cos_at, cos_s0, cos_si, rows, n0, 0, R // 2, PAIRS, MASKED, REPEAT, LAST)
            c1 = load_tile(cos, cos_at, cos_s0, cos_si, rows, n0, R // 2, R // 2, PAIRS, MASKED, REPEAT, LAST)
            s0 = load_tile(sin, sin_at, sin_s0, sin_si, rows, n0, 0, R // 2, PAIRS, MASKED, REPEAT, LAST)
            s1 = load_tile(sin, sin_at, sin_s0, sin_si, rows, n0, R // 2, R // 2, PAIRS, MASKED, REPEAT, LAST)
        factors = (c0, s0, c1, s1)
    elif TABLES == 2:
        c, s = split_pairs(load_tile(cos, cos_at, cos_s0, cos_si, rows, n0, 0, R, 2 * PAIRS, MASKED, REPEAT, LAST))
        factors = (c, s, c, s)
    else:
        # Repeated, the second split would go through shared memory.
        both = load_tile(cos, cos_at, cos_s0, cos_si, rows, n0, 0, 2 * R, 4 * PAIRS, MASKED, False, LAST)
        left, right = split_pairs(both)
        m00, m10 = split_pairs(left)
        m01, m11 = split_pairs(right)
        s0 = -m01 if m01.dtype == tl.float64 else -m01.to(tl.float32)
        factors = (m00, s0, m11, m10)
    return factors
