"""The Triton kernel of norm_rope: a norm over heads or across them, weight and bias, then a rotation of pairs.

    n    = norm(x);  a = n*(WEIGHT_OFFSET + weight) + bias
    out0 = c0*a0 - s0*a1
    out1 = c1*a1 + s1*a0                  for the pairs of the first R columns; out = a for the others

or with NORM_LAST out = norm(rotate(x))*(WEIGHT_OFFSET + weight) + bias.

A program takes BLOCKS tiles of ROWS rows along the innermost row axis (the heads of one token), so the tables of a
token are read once for all its heads, and ROWS * BLOCKS need not be a power of two. ACROSS: the norm is over all rows
of the program. Everything between load and store stays in registers, in fp32; the rotation in fp64 where a table is.
"""

# Triton is a language of its own
# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton has no starred tuples

from __future__ import annotations

import triton
import triton.language as tl

from .triton_rope_rotation import rotated, rotated_tiles
from .triton_rope_statistics import centred, normalised
from .triton_rope_tiles import load_factors, load_operand_parts, load_parts, store_tile
from .triton_rows import place, shifted
from .triton_statistics import weighted


@triton.jit
def rope_rows(
    program,
    x,
    weight,
    bias,
    cos,
    sin,
    out,
    n0,
    tiles,
    n1,
    x_s0,
    x_s1,
    x_s2,
    weight_s0,
    weight_s1,
    weight_s2,
    weight_si,
    bias_s0,
    bias_s1,
    bias_s2,
    bias_si,
    cos_s0,
    cos_s1,
    cos_s2,
    cos_si,
    sin_s0,
    sin_s1,
    sin_s2,
    sin_si,
    out_offset,
    out_s0,
    out_s1,
    out_s2,
    D: tl.constexpr,
    R: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAIL: tl.constexpr,
    AXES: tl.constexpr,
    MASKED: tl.constexpr,
    REPEAT: tl.constexpr,
    NORM: tl.constexpr,
    NORM_LAST: tl.constexpr,
    ACROSS: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    STYLE: tl.constexpr,
    TABLES: tl.constexpr,
    ROUNDINGS: tl.constexpr,
):
    """Program number `program` of one call. n0: rows along the tile axis; tiles: programs along it; n1: the next axis.

    COUNT: elements that a statistic is over. COLUMNS, TAIL: padded columns of a part, see `triton_rope_tiles`.
    NORM: none, rms, layer. STYLE: none, interleaved, half.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    PARTS: tl.constexpr = 1 if STYLE == 0 else 3 if TAIL > 0 else 2
    i1 = program
    i2 = program
    tile = program
    if AXES > 1:
        tile = program % tiles
        i1 = program // tiles
    if AXES > 2:
        i2 = i1 // n1
        i1 = i1 % n1
    i1 = i1.to(tl.int64)
    i2 = i2.to(tl.int64)
    first = tile.to(tl.int64) * (ROWS * BLOCKS)
    x_at = place(0, i1, i2, None, x_s1, x_s2)
    weight_at = place(0, i1, i2, None, weight_s1, weight_s2)
    bias_at = place(0, i1, i2, None, bias_s1, bias_s2)
    cos_at = place(0, i1, i2, None, cos_s1, cos_s2)
    sin_at = place(0, i1, i2, None, sin_s1, sin_s2)
    out_at = shifted(place(0, i1, i2, None, out_s1, out_s2), out_offset)

    # Every load stands before the reduction, so that their latencies overlap.
    xs = ()
    for b in tl.static_range(BLOCKS):
        rows = first + b * ROWS + tl.arange(0, ROWS)
        xs = xs + load_parts(x, x_at, x_s0, 1, rows, n0, D, R, COLUMNS, TAIL, STYLE, MASKED, False, "")
    weights = load_operand_parts(
        weight, weight_at, weight_s0, weight_si, first, n0, D, R, COLUMNS, TAIL, STYLE, ROWS, BLOCKS, MASKED, REPEAT
    )
    biases = load_operand_parts(
        bias, bias_at, bias_s0, bias_si, first, n0, D, R, COLUMNS, TAIL, STYLE, ROWS, BLOCKS, MASKED, REPEAT
    )
    factors = ()
    if STYLE > 0:
        PAIRS: tl.constexpr = COLUMNS // 2 if STYLE == 1 else COLUMNS
        rows = first + tl.arange(0, ROWS)
        one = load_factors(
            cos, sin, cos_at, sin_at, cos_s0, sin_s0, cos_si, sin_si, rows, n0, R, PAIRS, STYLE, TABLES, MASKED, REPEAT
        )
        for b in tl.static_range(BLOCKS):
            if b > 0 and (cos_s0 is not None or sin_s0 is not None):
                rows = first + b * ROWS + tl.arange(0, ROWS)
                one = load_factors(
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
                    R,
                    PAIRS,
                    STYLE,
                    TABLES,
                    MASKED,
                    REPEAT,
                )
            factors = factors + one

    zs = ()
    for i in tl.static_range(BLOCKS * PARTS):
        zs = zs + (xs[i].to(tl.float32),)
    if NORM_LAST and STYLE > 0:
        zs = rotated_tiles(
            zs, factors, first, n0, D, R, ROWS, BLOCKS, PARTS, STYLE, MASKED and ACROSS, DTYPE, ROUNDINGS
        )
    if NORM == 2:
        zs = centred(zs, first, n0, D, R, COUNT, ROWS, BLOCKS, PARTS, STYLE, MASKED, ACROSS)
    if NORM > 0:
        zs = normalised(zs, EPS, COUNT, BLOCKS, PARTS, ACROSS)

    for b in tl.static_range(BLOCKS):
        values = ()
        for j in tl.static_range(PARTS):
            z = zs[b * PARTS + j]
            values = values + (weighted(z, b * PARTS + j, weights, biases, WEIGHT_OFFSET, DTYPE, ROUNDINGS),)
        if STYLE > 0 and not NORM_LAST:
            c0, s0, c1, s1 = factors[4 * b], factors[4 * b + 1], factors[4 * b + 2], factors[4 * b + 3]
            values = rotated(values, c0, s0, c1, s1, D, R, PARTS, STYLE, DTYPE, ROUNDINGS)
        rows = first + b * ROWS + tl.arange(0, ROWS)
        store_parts(out, out_at, out_s0, rows, n0, values, D, R, COLUMNS, TAIL, PARTS, STYLE, MASKED)


@triton.jit
def store_parts(
    out,
    at,
    stride,
    rows,
    n0,
    values,
    D: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAIL: tl.constexpr,
    PARTS: tl.constexpr,
    STYLE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A tile's parts, rounded to the output's dtype, to their columns. From fp64 by way of fp32, as in PyTorch."""
    TYPE: tl.constexpr = out.dtype.element_ty
    narrow = ()
    for j in tl.static_range(PARTS):
        narrow = narrow + (values[j].to(tl.float32).to(TYPE),)
    if STYLE == 2:
        store_tile(out, at, stride, rows, n0, narrow[0], 0, R // 2, COLUMNS, MASKED)
        store_tile(out, at, stride, rows, n0, narrow[1], R // 2, R // 2, COLUMNS, MASKED)
        if TAIL > 0:
            store_tile(out, at, stride, rows, n0, narrow[2], R, D - R, TAIL, MASKED)
    elif STYLE == 1:
        pairs = tl.join(narrow[0], narrow[1])
        whole = tl.reshape(pairs, (pairs.shape[0], COLUMNS))
        store_tile(out, at, stride, rows, n0, whole, 0, D, COLUMNS, MASKED)
    else:
        store_tile(out, at, stride, rows, n0, narrow[0], 0, D, COLUMNS, MASKED)
