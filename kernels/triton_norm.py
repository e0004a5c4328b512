"""One Triton kernel for norm_modulate, residual_norm_modulate and their dual forms.

Each program takes ROWS consecutive rows of the innermost row dim and one index of the outer dims. Operands that do not
change along that dim (stride None) are read once per program. Everything between load and store is fp32.
"""

# ruff: noqa: RUF005 - Triton has no starred tuples

from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import at, gated, load_operand, load_row, modulated, place, rounded, store_chunk


@triton.jit
def row_norm(
    x,
    residual,
    gate,
    weight,
    bias,
    scale,
    shift,
    scale2,
    shift2,
    sum,
    out,
    out2,
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
    shift_s0,
    shift_s1,
    shift_s2,
    shift_si,
    scale2_s0,
    scale2_s1,
    scale2_s2,
    scale2_si,
    shift2_s0,
    shift2_s1,
    shift2_s2,
    shift2_si,
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
    ROWS: tl.constexpr,
    AXES: tl.constexpr,
    CENTER: tl.constexpr,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    ROUNDINGS: tl.constexpr,
):
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
    weight_base = place(i1, i2, weight_s1, weight_s2)
    bias_base = place(i1, i2, bias_s1, bias_s2)
    scale_base = place(i1, i2, scale_s1, scale_s2)
    shift_base = place(i1, i2, shift_s1, shift_s2)
    scale2_base = place(i1, i2, scale2_s1, scale2_s2)
    shift2_base = place(i1, i2, shift2_s1, shift2_s2)
    sum_base = at(place(i1, i2, sum_s1, sum_s2), tl.full((), 1, tl.int64), sum_offset)
    out_base = at(place(i1, i2, out_s1, out_s2), tl.full((), 1, tl.int64), out_offset)
    out2_base = at(place(i1, i2, out2_s1, out2_s2), tl.full((), 1, tl.int64), out2_offset)

    # Every load stands before the reduction, so that their latencies overlap.
    if gate_s0 is None:
        gates = load_operand(gate, gate_base, gate_si, D, CHUNK, CHUNKS)
    if weight_s0 is None:
        weights = load_operand(weight, weight_base, weight_si, D, CHUNK, CHUNKS)
    if bias_s0 is None:
        biases = load_operand(bias, bias_base, bias_si, D, CHUNK, CHUNKS)
    if scale_s0 is None:
        scales = load_operand(scale, scale_base, scale_si, D, CHUNK, CHUNKS)
    if shift_s0 is None:
        shifts = load_operand(shift, shift_base, shift_si, D, CHUNK, CHUNKS)
    if scale2_s0 is None:
        scales2 = load_operand(scale2, scale2_base, scale2_si, D, CHUNK, CHUNKS)
    if shift2_s0 is None:
        shifts2 = load_operand(shift2, shift2_base, shift2_si, D, CHUNK, CHUNKS)

    for step in range(min(ROWS, rows - first)):
        row = first + step
        xs = load_row(x, at(x_base, row, x_s0), D, CHUNK, CHUNKS)
        residuals = load_row(residual, at(residual_base, row, residual_s0), D, CHUNK, CHUNKS)
        if gate_s0 is not None:
            gates = load_operand(gate, at(gate_base, row, gate_s0), gate_si, D, CHUNK, CHUNKS)
        if weight_s0 is not None:
            weights = load_operand(weight, at(weight_base, row, weight_s0), weight_si, D, CHUNK, CHUNKS)
        if bias_s0 is not None:
            biases = load_operand(bias, at(bias_base, row, bias_s0), bias_si, D, CHUNK, CHUNKS)
        if scale_s0 is not None:
            scales = load_operand(scale, at(scale_base, row, scale_s0), scale_si, D, CHUNK, CHUNKS)
        if shift_s0 is not None:
            shifts = load_operand(shift, at(shift_base, row, shift_s0), shift_si, D, CHUNK, CHUNKS)
        if scale2_s0 is not None:
            scales2 = load_operand(scale2, at(scale2_base, row, scale2_s0), scale2_si, D, CHUNK, CHUNKS)
        if shift2_s0 is not None:
            shifts2 = load_operand(shift2, at(shift2_base, row, shift2_s0), shift2_si, D, CHUNK, CHUNKS)

        zs = ()
        for i in tl.static_range(CHUNKS):
            zs = zs + (gated(xs, i, residuals, gates, DTYPE, ROUNDINGS),)
        if sum is not None:
            for i in tl.static_range(CHUNKS):
                store_chunk(sum, at(sum_base, row, sum_s0), i, zs[i], D, CHUNK)

        if CENTER:
            total = zs[0]
            for i in tl.static_range(1, CHUNKS):
                total += zs[i]
            mean = tl.sum(total, axis=0) / D
            centred = ()
            for i in tl.static_range(CHUNKS):
                if (i + 1) * CHUNK > D:
                    columns = i * CHUNK + tl.arange(0, CHUNK)
                    centred = centred + (tl.where(columns < D, zs[i] - mean, 0.0),)
                else:
                    centred = centred + (zs[i] - mean,)
            zs = centred
        squares = zs[0] * zs[0]
        for i in tl.static_range(1, CHUNKS):
            squares += zs[i] * zs[i]
        factor = tl.rsqrt(tl.sum(squares, axis=0) / D + EPS)

        for i in tl.static_range(CHUNKS):
            a = rounded(zs[i] * factor, DTYPE, ROUNDINGS & 4)
            if weight is not None:
                a = rounded(a * (WEIGHT_OFFSET + weights[i].to(tl.float32)), DTYPE, ROUNDINGS & 8)
            if bias is not None:
                a = rounded(a + biases[i].to(tl.float32), DTYPE, ROUNDINGS & 16)
            value = modulated(a, i, scales, shifts, SCALE_OFFSET, DTYPE, ROUNDINGS)
            store_chunk(out, at(out_base, row, out_s0), i, value, D, CHUNK)
            if out2 is not None:
                value = modulated(a, i, scales2, shifts2, SCALE_OFFSET, DTYPE, ROUNDINGS)
                store_chunk(out2, at(out2_base, row, out2_s0), i, value, D, CHUNK)
