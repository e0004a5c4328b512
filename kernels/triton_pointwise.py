"""Triton kernels without a reduction: gated_residual and scale_shift, on the row scheme of `triton_norm`."""

# Triton is a language of its own
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import (
    added,
    biased,
    gated,
    indices,
    load_operand,
    load_row,
    modulated,
    number_of_row,
    picked,
    place,
    shifted,
    store_chunk,
)


@triton.jit
def row_pointwise(
    x,
    residual,
    gate,
    branch_bias,
    scale,
    shift,
    pick,
    gate_table,
    scale_table,
    shift_table,
    out,
    n0,
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
    gate_sp,
    branch_bias_s0,
    branch_bias_s1,
    branch_bias_s2,
    branch_bias_si,
    scale_s0,
    scale_s1,
    scale_s2,
    scale_si,
    scale_sp,
    shift_s0,
    shift_s1,
    shift_s2,
    shift_si,
    shift_sp,
    pick_s0,
    pick_s1,
    pick_s2,
    pick_si,
    gate_table_s0,
    gate_table_s1,
    gate_table_s2,
    gate_table_si,
    scale_table_s0,
    scale_table_s1,
    scale_table_s2,
    scale_table_si,
    shift_table_s0,
    shift_table_s1,
    shift_table_s2,
    shift_table_si,
    out_offset,
    out_s0,
    out_s1,
    out_s2,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    AXES: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    ROUNDINGS: tl.constexpr,
):
    """out = (residual + gate*(x + branch_bias))*(SCALE_OFFSET+scale) + shift, every operand but x optional.

    gate, scale and shift each have their table added.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    i0, i1, i2 = indices(n0, n1, AXES)
    number = number_of_row(pick, place(i0, i1, i2, pick_s0, pick_s1, pick_s2))
    x_at = place(i0, i1, i2, x_s0, x_s1, x_s2)
    residual_at = place(i0, i1, i2, residual_s0, residual_s1, residual_s2)
    gate_at = picked(place(i0, i1, i2, gate_s0, gate_s1, gate_s2), number, gate_sp)
    branch_bias_at = place(i0, i1, i2, branch_bias_s0, branch_bias_s1, branch_bias_s2)
    scale_at = picked(place(i0, i1, i2, scale_s0, scale_s1, scale_s2), number, scale_sp)
    shift_at = picked(place(i0, i1, i2, shift_s0, shift_s1, shift_s2), number, shift_sp)
    gate_table_at = place(i0, i1, i2, gate_table_s0, gate_table_s1, gate_table_s2)
    scale_table_at = place(i0, i1, i2, scale_table_s0, scale_table_s1, scale_table_s2)
    shift_table_at = place(i0, i1, i2, shift_table_s0, shift_table_s1, shift_table_s2)
    out_at = shifted(place(i0, i1, i2, out_s0, out_s1, out_s2), out_offset)

    xs = load_row(x, x_at, D, CHUNK, CHUNKS)
    residuals = load_row(residual, residual_at, D, CHUNK, CHUNKS)
    gates = load_operand(gate, gate_at, gate_si, D, CHUNK, CHUNKS)
    branch_biases = load_operand(branch_bias, branch_bias_at, branch_bias_si, D, CHUNK, CHUNKS)
    scales = load_operand(scale, scale_at, scale_si, D, CHUNK, CHUNKS)
    shifts = load_operand(shift, shift_at, shift_si, D, CHUNK, CHUNKS)
    gate_rows = load_operand(gate_table, gate_table_at, gate_table_si, D, CHUNK, CHUNKS)
    scale_rows = load_operand(scale_table, scale_table_at, scale_table_si, D, CHUNK, CHUNKS)
    shift_rows = load_operand(shift_table, shift_table_at, shift_table_si, D, CHUNK, CHUNKS)

    if gate_table is not None:
        gates = added(gates, gate_rows, CHUNKS)
    if scale_table is not None:
        scales = added(scales, scale_rows, CHUNKS)
    if shift_table is not None:
        shifts = added(shifts, shift_rows, CHUNKS)
    xs = biased(xs, branch_biases, D, CHUNK, CHUNKS, DTYPE, ROUNDINGS)
    for i in tl.static_range(CHUNKS):
        z = gated(xs, i, residuals, gates, DTYPE, ROUNDINGS)
        value = modulated(z, i, scales, shifts, SCALE_OFFSET, DTYPE, ROUNDINGS)
        store_chunk(out, out_at, i, value, D, CHUNK)
