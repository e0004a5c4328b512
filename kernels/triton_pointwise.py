"""Triton kernels without a reduction: gated_residual and scale_shift, on the row scheme of `triton_norm`."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import at, gated, load_operand, load_row, modulated, place, store_chunk


@triton.jit
def row_pointwise(
    x,
    residual,
    gate,
    scale,
    shift,
    out,
    rows,
    n1,
    x_s0,
    x_s1,
    x_s2,
    residual_s0,
    residual_s1,
    residual_s2,
    gate_s0,
    gate_s1,
    gate_s2,
    gate_si,
    scale_s0,
    scale_s1,
    scale_s2,
    scale_si,
    shift_s0,
    shift_s1,
    shift_s2,
    shift_si,
    out_offset,
    out_s0,
    out_s1,
    out_s2,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    AXES: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    ROUNDINGS: tl.constexpr,
):
    """out = (residual + gate*x)*(SCALE_OFFSET+scale) + shift, every operand but x optional."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    block = tl.program_id(0)
    i1 = block
    i2 = block
    if AXES > 1:
        blocks = tl.cdiv(rows, ROWS)
        i1 = block // blocks
        block = block % blocks
    if AXES > 2:
        i2 = i1 // n1
        i1 = i1 % n1
    first = block * ROWS

    x_base = place(i1, i2, x_s1, x_s2)
    residual_base = place(i1, i2, residual_s1, residual_s2)
    gate_base = place(i1, i2, gate_s1, gate_s2)
    scale_base = place(i1, i2, scale_s1, scale_s2)
    shift_base = place(i1, i2, shift_s1, shift_s2)
    out_base = at(place(i1, i2, out_s1, out_s2), tl.full((), 1, tl.int64), out_offset)
    if gate_s0 is None:
        gates = load_operand(gate, gate_base, gate_si, D, CHUNK, CHUNKS)
    if scale_s0 is None:
        scales = load_operand(scale, scale_base, scale_si, D, CHUNK, CHUNKS)
    if shift_s0 is None:
        shifts = load_operand(shift, shift_base, shift_si, D, CHUNK, CHUNKS)

    for step in range(min(ROWS, rows - first)):
        row = first + step
        xs = load_row(x, at(x_base, row, x_s0), D, CHUNK, CHUNKS)
        residuals = load_row(residual, at(residual_base, row, residual_s0), D, CHUNK, CHUNKS)
        if gate_s0 is not None:
            gates = load_operand(gate, at(gate_base, row, gate_s0), gate_si, D, CHUNK, CHUNKS)
        if scale_s0 is not None:
            scales = load_operand(scale, at(scale_base, row, scale_s0), scale_si, D, CHUNK, CHUNKS)
        if shift_s0 is not None:
            shifts = load_operand(shift, at(shift_base, row, shift_s0), shift_si, D, CHUNK, CHUNKS)
        for i in tl.static_range(CHUNKS):
            z = gated(xs, i, residuals, gates, DTYPE, ROUNDINGS)
            value = modulated(z, i, scales, shifts, SCALE_OFFSET, DTYPE, ROUNDINGS)
            store_chunk(out, at(out_base, row, out_s0), i, value, D, CHUNK)
