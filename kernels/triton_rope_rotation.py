"""Triton helpers for norm_rope: the rotation of pairs held in registers, of one tile or of all before a norm.

    out0 = c0*a0 - s0*a1
    out1 = c1*a1 + s1*a0

Parts of tiles and the factors c0, s0, c1, s1: see `triton_rope_tiles`.
"""

# Triton is a language of its own
# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton has no starred tuples

from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import rounded


@triton.jit
def product(factor, value, WIDE: tl.constexpr, DTYPE: tl.constexpr, ON: tl.constexpr):
    """factor*value in WIDE, rounded to DTYPE if ON."""
    result = factor.to(WIDE) * value.to(WIDE)
    if ON:
        # LLVM narrows products of half-precision values only, and fp64 ones are none.
        result = rounded(result, DTYPE, ON) if WIDE is not tl.float64 else result.to(tl.float32).to(DTYPE).to(WIDE)
    return result


@triton.jit
def rotated(
    values,
    c0,
    s0,
    c1,
    s1,
    D: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    STYLE: tl.constexpr,
    DTYPE: tl.constexpr,
    ROUNDINGS: tl.constexpr,
):
    """The parts after the rotation; columns behind it stay what they are."""
    F64: tl.constexpr = c0.dtype == tl.float64 or s0.dtype == tl.float64
    WIDE: tl.constexpr = tl.float64 if F64 else tl.float32
    ON: tl.constexpr = ROUNDINGS & 512
    a0 = values[0]
    a1 = values[1]
    out0 = product(c0, a0, WIDE, DTYPE, ON) - product(s0, a1, WIDE, DTYPE, ON)
    out1 = product(c1, a1, WIDE, DTYPE, ON) + product(s1, a0, WIDE, DTYPE, ON)
    if STYLE == 1 and R < D:
        turned = (tl.arange(0, out0.shape[1]) < R // 2)[None, :]
        out0 = tl.where(turned, out0, a0.to(WIDE))
        out1 = tl.where(turned, out1, a1.to(WIDE))
    result = (out0, out1)
    if PARTS > 2:
        result = result + (values[2],)
    return result


@triton.jit
def rotated_tiles(
    xs,
    factors,
    first,
    n0,
    D: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    STYLE: tl.constexpr,
    MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
    ROUNDINGS: tl.constexpr,
):
    """All tiles of a program after the rotation, in fp32, as a norm reads them.

    With MASKED rows from n0 on are 0 whatever the tables hold, since they count in a norm across rows.
    """
    result = ()
    for b in tl.static_range(BLOCKS):
        values = ()
        for j in tl.static_range(PARTS):
            values = values + (xs[b * PARTS + j],)
        c0, s0, c1, s1 = factors[4 * b], factors[4 * b + 1], factors[4 * b + 2], factors[4 * b + 3]
        values = rotated(values, c0, s0, c1, s1, D, R, PARTS, STYLE, DTYPE, ROUNDINGS)
        inside = (first + b * ROWS + tl.arange(0, ROWS) < n0)[:, None] if MASKED else None
        for j in tl.static_range(PARTS):
            value = rounded(values[j].to(tl.float32), DTYPE, ROUNDINGS & 2048)
            result = result + (tl.where(inside, value, 0.0) if MASKED else value,)
    return result
