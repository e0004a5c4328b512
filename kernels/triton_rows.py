"""Triton helpers that read and write one row of a tensor in equal power-of-two chunks.

A row of D elements is a tuple of CHUNKS tensors of CHUNK elements: D need not be a power of two, only the last chunk is
masked, and a reduction adds the chunks before it crosses lanes once. A stride of None means 0 and a pointer of None
means that the operand is missing; both vanish at compile time. Offsets are int64.
"""

# Triton is a language of its own
# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton has no starred tuples

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def indices(n0, n1, AXES: tl.constexpr):
    """This program's row as indices (i0, i1, i2), innermost first, int64; n0 and n1 are the inner dims' sizes."""
    i0 = tl.program_id(0)
    i1 = i0
    i2 = i0
    if AXES > 1:
        i1 = i0 // n0
        i0 = i0 % n0
    if AXES > 2:
        i2 = i1 // n1
        i1 = i1 % n1
    return i0.to(tl.int64), i1.to(tl.int64), i2.to(tl.int64)


@triton.jit
def place(i0, i1, i2, s0, s1, s2):
    """Element offset of row (i0, i1, i2), int64; a stride of None counts as 0."""
    offset = tl.full((), 0, tl.int64)
    if s0 is not None:
        offset += i0 * s0
    if s1 is not None:
        offset += i1 * s1
    if s2 is not None:
        offset += i2 * s2
    return offset


@triton.jit
def shifted(offset, by):
    """`offset` plus a run-time number of elements; None counts as 0."""
    if by is not None:
        offset += by
    return offset


@triton.jit
def number_of_row(pick, offset):
    """Which of several rows this token takes, int64; None without `pick`. A bool is true for the first of two."""
    number = None
    if pick is not None:
        number = tl.load(pick + offset).to(tl.int64)
        if pick.dtype.element_ty == tl.int1:
            number = 1 - number
    return number


@triton.jit
def picked(offset, number, step):
    """`offset` plus that of the row of this number, each `step` elements; a step of None: there is one row for all."""
    if step is not None:
        offset += number * step
    return offset


@triton.jit
def load_row(pointer, offset, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """A dense row as a tuple of chunks in the tensor's own dtype; lanes past D read 0. None for a missing operand."""
    if pointer is None:
        row = None
    else:
        row = ()
        for i in tl.static_range(CHUNKS):
            columns = i * CHUNK + tl.arange(0, CHUNK)
            if (i + 1) * CHUNK > D:
                row = row + (tl.load(pointer + offset + columns, mask=columns < D, other=0.0),)
            else:
                row = row + (tl.load(pointer + offset + columns),)
    return row


@triton.jit
def load_operand(
    pointer,
    offset,
    inner,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    KEEP: tl.constexpr = True,
):
    """A broadcast operand's row with inner stride `inner` (None: one scalar for the whole row), as `load_row`.

    KEEP: evict_last, because many rows read the same parameters: worth 4 % at 4096x3072 on an H100. Not for operands as
    big as x. (A flag, because in Triton 3.6 a parameter's default may not be a string.)
    """
    policy: tl.constexpr = "evict_last" if KEEP else ""
    if pointer is None:
        row = None
    elif inner is None:
        value = tl.load(pointer + offset)
        row = ()
        for _ in tl.static_range(CHUNKS):
            row = row + (value,)
    else:
        row = ()
        for i in tl.static_range(CHUNKS):
            columns = i * CHUNK + tl.arange(0, CHUNK)
            places = pointer + offset + columns.to(tl.int64) * inner
            if (i + 1) * CHUNK > D:
                row = row + (tl.load(places, mask=columns < D, other=0.0, eviction_policy=policy),)
            else:
                row = row + (tl.load(places, eviction_policy=policy),)
    return row


@triton.jit
def added(row, table, CHUNKS: tl.constexpr):
    """row + table in fp32. Both are given: Triton 3.6 cannot return an argument that is None."""
    total = ()
    for i in tl.static_range(CHUNKS):
        total = total + (row[i].to(tl.float32) + table[i].to(tl.float32),)
    return total


@triton.jit
def store_chunk(pointer, offset, i: tl.constexpr, value, D: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk `i` of a dense row, rounded to the output's dtype."""
    columns = i * CHUNK + tl.arange(0, CHUNK)
    value = value.to(pointer.dtype.element_ty)
    if (i + 1) * CHUNK > D:
        tl.store(pointer + offset + columns, value, mask=columns < D)
    else:
        tl.store(pointer + offset + columns, value)


@triton.jit
def rounded(value, DTYPE: tl.constexpr, ON: tl.constexpr):
    """`value` rounded to DTYPE and back to fp32 if ON.

    Left alone, LLVM narrows round(float(a)*float(b)) to a half-precision multiply and contracts it with the next add to
    one FMA, which drops the rounding. The grid's third dim is 1, so the xor changes nothing, but LLVM cannot know.
    """
    if ON:
        bits = value.to(tl.int32, bitcast=True) ^ tl.program_id(2)
        value = bits.to(tl.float32, bitcast=True).to(DTYPE).to(tl.float32)
    return value


@triton.jit
def modulated(a, i: tl.constexpr, scale, shift, OFFSET: tl.constexpr, DTYPE: tl.constexpr, ROUNDINGS: tl.constexpr):
    """a*(OFFSET+scale[i]) + shift[i], each optional (None)."""
    if scale is not None:
        factor = rounded(OFFSET + scale[i].to(tl.float32), DTYPE, ROUNDINGS & 32)
        a = rounded(a * factor, DTYPE, ROUNDINGS & 64)
    if shift is not None:
        a = a + shift[i].to(tl.float32)
    return a


@triton.jit
def gated(x, i: tl.constexpr, residual, gate, DTYPE: tl.constexpr, ROUNDINGS: tl.constexpr):
    """residual[i] + gate[i]*x[i] in fp32; x[i] without a residual."""
    z = x[i].to(tl.float32)
    if residual is not None:
        if gate is not None:
            z = rounded(z * gate[i].to(tl.float32), DTYPE, ROUNDINGS & 1)
        z = rounded(residual[i].to(tl.float32) + z, DTYPE, ROUNDINGS & 2)
    return z


@triton.jit
def biased(
    xs, bias, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, DTYPE: tl.constexpr, ROUNDINGS: tl.constexpr
):
    """The row x + bias in fp32, the bias optional (None); lanes past D, which are 0 in x, are 0 again."""
    row = ()
    for i in tl.static_range(CHUNKS):
        value = xs[i].to(tl.float32)
        if bias is not None:
            value = rounded(value + bias[i].to(tl.float32), DTYPE, ROUNDINGS & 1024)
            if (i + 1) * CHUNK > D:
                columns = i * CHUNK + tl.arange(0, CHUNK)
                value = tl.where(columns < D, value, 0.0)
        row = row + (value,)
    return row


@triton.jit
def joined(
    zs,
    x2,
    gate2,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    DTYPE: tl.constexpr,
    FACTOR2: tl.constexpr,
    ROUNDINGS: tl.constexpr,
):
    """The row z + gate2*FACTOR2*x2 in fp32, the gate optional (None); lanes past D, which are 0 in z, are 0 again.

    Its roundings are those of `gated`, 12 bits up (`rounding.SECOND_BRANCH`).
    """
    row = ()
    for i in tl.static_range(CHUNKS):
        value = x2[i].to(tl.float32)
        if FACTOR2 != 1:
            value = rounded(value * FACTOR2, DTYPE, (ROUNDINGS >> 12) & 1)
        if gate2 is not None:
            value = rounded(value * gate2[i].to(tl.float32), DTYPE, (ROUNDINGS >> 12) & 1)
        value = rounded(zs[i] + value, DTYPE, (ROUNDINGS >> 12) & 2)
        if (i + 1) * CHUNK > D:
            columns = i * CHUNK + tl.arange(0, CHUNK)
            value = tl.where(columns < D, value, 0.0)
        row = row + (value,)
    return row


@triton.jit
def clamped(zs, CHUNKS: tl.constexpr, LIMIT: tl.constexpr):
    """The row z within [-LIMIT, LIMIT]; NaN stays, as torch's clamp leaves it."""
    row = ()
    for i in tl.static_range(CHUNKS):
        row = row + (tl.where(zs[i] > LIMIT, LIMIT, tl.where(zs[i] < -LIMIT, -LIMIT, zs[i])),)
    return row
