"""Triton kernel of norm_modulate, residual_norm_modulate and their dual forms, with or without a norm on the branch.

    y   = x + branch_bias, with BRANCH_NORM: norm_b(y) * (BRANCH_WEIGHT_OFFSET + branch_weight)
    z   = residual + gate*y + gate2*FACTOR2*x2, with a LIMIT clamped to it
    a   = norm(z) * (WEIGHT_OFFSET + weight) + bias
    out = a*(SCALE_OFFSET + scale) + shift        gate, scale and shift each with its table added

One program per row, the whole row in registers, everything between load and store in fp32. On an H100 at 4096x3072 and
32760x5120 this was faster, by 2 to 6 % of a copy's time, than several rows per program, persistent programs that read
the next row ahead, and software-pipelined loops: enough rows are in flight to hide every latency. With
BRANCH_NORM two dependent reductions run in one launch, and x, residual and z stay in registers between them.
"""

# Triton is a language of its own
# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton has no starred tuples

from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import (
    added,
    biased,
    clamped,
    gated,
    indices,
    joined,
    load_operand,
    load_row,
    modulated,
    number_of_row,
    picked,
    place,
    rounded,
    shifted,
    store_chunk,
)
from .triton_statistics import centred, root_factor, weighted


@triton.jit
def row_norm(
    x,
    residual,
    gate,
    branch_bias,
    branch_weight,
    x2,
    gate2,
    weight,
    bias,
    scale,
    shift,
    scale2,
    shift2,
    pick,
    gate_table,
    scale_table,
    shift_table,
    scale2_table,
    shift2_table,
    sum,
    out,
    out2,
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
    branch_weight_s0,
    branch_weight_s1,
    branch_weight_s2,
    branch_weight_si,
    x2_s0,
    x2_s1,
    x2_s2,
    x2_si,
    gate2_s0,
    gate2_s1,
    gate2_s2,
    gate2_si,
    weight_s0,
    weight_s1,
    weight_s2,
    weight_si,
    bias_s0,
    bias_s1,
    bias_s2,
    bias_si,
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
    scale2_s0,
    scale2_s1,
    scale2_s2,
    scale2_si,
    scale2_sp,
    shift2_s0,
    shift2_s1,
    shift2_s2,
    shift2_si,
    shift2_sp,
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
    scale2_table_s0,
    scale2_table_s1,
    scale2_table_s2,
    scale2_table_si,
    shift2_table_s0,
    shift2_table_s1,
    shift2_table_s2,
    shift2_table_si,
    sum_offset,
    sum_s0,
    sum_s1,
    sum_s2,
    out_offset,
    out_s0,
    out_s1,
    out_s2,
    out2_offset,
    out2_s0,
    out2_s1,
    out2_s2,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    AXES: tl.constexpr,
    CENTER: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    BRANCH_NORM: tl.constexpr,
    BRANCH_CENTER: tl.constexpr,
    BRANCH_EPS: tl.constexpr,
    BRANCH_WEIGHT_OFFSET: tl.constexpr,
    FACTOR2: tl.constexpr,
    LIMIT: tl.constexpr,
    ROUNDINGS: tl.constexpr,
):
    DTYPE: tl.constexpr = x.dtype.element_ty
    i0, i1, i2 = indices(n0, n1, AXES)
    number = number_of_row(pick, place(i0, i1, i2, pick_s0, pick_s1, pick_s2))
    x_at = place(i0, i1, i2, x_s0, x_s1, x_s2)
    residual_at = place(i0, i1, i2, residual_s0, residual_s1, residual_s2)
    gate_at = picked(place(i0, i1, i2, gate_s0, gate_s1, gate_s2), number, gate_sp)
    branch_bias_at = place(i0, i1, i2, branch_bias_s0, branch_bias_s1, branch_bias_s2)
    branch_weight_at = place(i0, i1, i2, branch_weight_s0, branch_weight_s1, branch_weight_s2)
    x2_at = place(i0, i1, i2, x2_s0, x2_s1, x2_s2)
    gate2_at = place(i0, i1, i2, gate2_s0, gate2_s1, gate2_s2)
    weight_at = place(i0, i1, i2, weight_s0, weight_s1, weight_s2)
    bias_at = place(i0, i1, i2, bias_s0, bias_s1, bias_s2)
    scale_at = picked(place(i0, i1, i2, scale_s0, scale_s1, scale_s2), number, scale_sp)
    shift_at = picked(place(i0, i1, i2, shift_s0, shift_s1, shift_s2), number, shift_sp)
    scale2_at = picked(place(i0, i1, i2, scale2_s0, scale2_s1, scale2_s2), number, scale2_sp)
    shift2_at = picked(place(i0, i1, i2, shift2_s0, shift2_s1, shift2_s2), number, shift2_sp)
    gate_table_at = place(i0, i1, i2, gate_table_s0, gate_table_s1, gate_table_s2)
    scale_table_at = place(i0, i1, i2, scale_table_s0, scale_table_s1, scale_table_s2)
    shift_table_at = place(i0, i1, i2, shift_table_s0, shift_table_s1, shift_table_s2)
    scale2_table_at = place(i0, i1, i2, scale2_table_s0, scale2_table_s1, scale2_table_s2)
    shift2_table_at = place(i0, i1, i2, shift2_table_s0, shift2_table_s1, shift2_table_s2)
    sum_at = shifted(place(i0, i1, i2, sum_s0, sum_s1, sum_s2), sum_offset)
    out_at = shifted(place(i0, i1, i2, out_s0, out_s1, out_s2), out_offset)
    out2_at = shifted(place(i0, i1, i2, out2_s0, out2_s1, out2_s2), out2_offset)

    # Every load stands before the reductions, so that their latencies overlap.
    xs = load_row(x, x_at, D, CHUNK, CHUNKS)
    residuals = load_row(residual, residual_at, D, CHUNK, CHUNKS)
    gates = load_operand(gate, gate_at, gate_si, D, CHUNK, CHUNKS)
    branch_biases = load_operand(branch_bias, branch_bias_at, branch_bias_si, D, CHUNK, CHUNKS)
    branch_weights = load_operand(branch_weight, branch_weight_at, branch_weight_si, D, CHUNK, CHUNKS)
    xs2 = load_operand(x2, x2_at, x2_si, D, CHUNK, CHUNKS, KEEP=False)
    gates2 = load_operand(gate2, gate2_at, gate2_si, D, CHUNK, CHUNKS)
    weights = load_operand(weight, weight_at, weight_si, D, CHUNK, CHUNKS)
    biases = load_operand(bias, bias_at, bias_si, D, CHUNK, CHUNKS)
    scales = load_operand(scale, scale_at, scale_si, D, CHUNK, CHUNKS)
    shifts = load_operand(shift, shift_at, shift_si, D, CHUNK, CHUNKS)
    scales2 = load_operand(scale2, scale2_at, scale2_si, D, CHUNK, CHUNKS)
    shifts2 = load_operand(shift2, shift2_at, shift2_si, D, CHUNK, CHUNKS)
    gate_rows = load_operand(gate_table, gate_table_at, gate_table_si, D, CHUNK, CHUNKS)
    scale_rows = load_operand(scale_table, scale_table_at, scale_table_si, D, CHUNK, CHUNKS)
    shift_rows = load_operand(shift_table, shift_table_at, shift_table_si, D, CHUNK, CHUNKS)
    scale2_rows = load_operand(scale2_table, scale2_table_at, scale2_table_si, D, CHUNK, CHUNKS)
    shift2_rows = load_operand(shift2_table, shift2_table_at, shift2_table_si, D, CHUNK, CHUNKS)

    if gate_table is not None:
        gates = added(gates, gate_rows, CHUNKS)
    ys = biased(xs, branch_biases, D, CHUNK, CHUNKS, DTYPE, ROUNDINGS)
    if BRANCH_NORM:
        if BRANCH_CENTER:
            ys = centred(ys, D, CHUNK, CHUNKS)
        branch_factor = root_factor(ys, BRANCH_EPS, D, CHUNKS)
        branch = ()
        for i in tl.static_range(CHUNKS):
            y = rounded(ys[i] * branch_factor, DTYPE, ROUNDINGS & 128)
            if branch_weight is not None:
                y = rounded(y * (BRANCH_WEIGHT_OFFSET + branch_weights[i].to(tl.float32)), DTYPE, ROUNDINGS & 256)
            branch = branch + (y,)
        ys = branch
    zs = ()
    for i in tl.static_range(CHUNKS):
        zs = zs + (gated(ys, i, residuals, gates, DTYPE, ROUNDINGS),)
    if x2 is not None:
        zs = joined(zs, xs2, gates2, D, CHUNK, CHUNKS, DTYPE, FACTOR2, ROUNDINGS)
    if LIMIT > 0:
        zs = clamped(zs, CHUNKS, LIMIT)
    if sum is not None:
        for i in tl.static_range(CHUNKS):
            store_chunk(sum, sum_at, i, zs[i], D, CHUNK)

    if CENTER:
        zs = centred(zs, D, CHUNK, CHUNKS)
    factor = root_factor(zs, EPS, D, CHUNKS)

    if scale_table is not None:
        scales = added(scales, scale_rows, CHUNKS)
    if shift_table is not None:
        shifts = added(shifts, shift_rows, CHUNKS)
    if scale2_table is not None:
        scales2 = added(scales2, scale2_rows, CHUNKS)
    if shift2_table is not None:
        shifts2 = added(shifts2, shift2_rows, CHUNKS)
    for i in tl.static_range(CHUNKS):
        a = weighted(zs[i] * factor, i, weights, biases, WEIGHT_OFFSET, DTYPE, ROUNDINGS)
        value = modulated(a, i, scales, shifts, SCALE_OFFSET, DTYPE, ROUNDINGS)
        store_chunk(out, out_at, i, value, D, CHUNK)
        if out2 is not None:
            value = modulated(a, i, scales2, shifts2, SCALE_OFFSET, DTYPE, ROUNDINGS)
            store_chunk(out2, out2_at, i, value, D, CHUNK)
