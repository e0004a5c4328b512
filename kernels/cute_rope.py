"""norm_rope in CuTe DSL: a norm over all heads of a token, weight and bias, then a rotation of interleaved pairs.

    a    = norm(x)*(weight_offset + weight) + bias        "rms" or "layer" over all heads of a token, fp32
    out0 = c0*a0 - s0*a1,   out1 = c1*a1 + s1*a0          for the pairs (a[2i], a[2i+1]) of every head

One block per token, which holds the token in registers. A table that the heads share is read once per thread where the
threads' stride is a whole number of heads, as it is for head_dim 64 and 128. Arithmetic in fp32, rounded once.
"""

# mypy: ignore-errors

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from .cute_launch import Host
from .cute_rope_key import NAMES, see_rope, stride_count
from .cute_rows import (
    ELEMENTS,
    at,
    base_address,
    load_pieces,
    normalised,
    rounded,
    row_indices,
    store_pieces,
)


def column_address(row, column, operand, head_stride, key, columns):
    """Byte address of column number `column` of the token; `columns` of the operand for each of x's head."""
    step = operand.size * operand.inner
    if operand.heads == "dense":
        return row + Int64(column * columns // key.d) * step
    inside = Int64(column % key.d * columns // key.d) * step
    if operand.heads == "shared":
        return row + inside
    return row + Int64(column // key.d) * head_stride + inside


@cute.jit
def load_table(addresses, inside, held, operand: cutlass.Constexpr, partial: cutlass.Constexpr):
    """A table's values of every piece: vectors where its columns are dense, else one element at a time."""
    count = len(addresses)
    elements = cute.size(held, mode=[0])
    if const_expr(operand.inner == 1):
        load_pieces(addresses, inside, held, operand.align, partial)
    else:
        step = operand.size * operand.inner
        for c in cutlass.range_constexpr(count):
            held[None, c].fill(0)
            if const_expr(partial and c == count - 1):
                if inside:
                    for i in cutlass.range_constexpr(elements):
                        held[i, c] = at(addresses[c] + i * step, held.element_type, 1, operand.size)[0]
            else:
                for i in cutlass.range_constexpr(elements):
                    held[i, c] = at(addresses[c] + i * step, held.element_type, 1, operand.size)[0]


@cute.kernel
def rope_rows(pointers, strides, sizes, eps: Float32, key: cutlass.Constexpr):
    lane, _, _ = cute.arch.thread_idx()
    program, _, _ = cute.arch.block_idx()
    split = key.split
    indices = row_indices(program, sizes, key.axes)
    inside = (lane + (split.pieces - 1) * split.threads) * split.vector < split.width

    places = {}
    used = 0
    for i in cutlass.range_constexpr(len(key.operands)):
        operand = key.operands[i]
        own = strides[used : used + stride_count(operand)]
        used += stride_count(operand)
        row = base_address(pointers[i], indices, own, operand.moves)
        columns = key.d // 2 if operand.name in ("cos", "sin") and key.tables == "half" else key.d
        head_stride = own[-1] if operand.heads == "strided" else None
        # Shared by the heads, and every piece of a thread has the same columns: one load serves all pieces.
        same = operand.heads == "shared" and split.threads * split.vector % key.d == 0
        places[operand.name] = [
            column_address(row, (lane + c * split.threads) * split.vector, operand, head_stride, key, columns)
            for c in range(1 if same else split.pieces)
        ]

    # Every load stands before the reduction, so that their latencies overlap.
    loaded = {}
    for i in cutlass.range_constexpr(len(key.operands)):
        operand = key.operands[i]
        if const_expr(operand.name != "out"):
            table = operand.name in ("cos", "sin")
            elements = split.vector // 2 if table and key.tables == "half" else split.vector
            count = len(places[operand.name])
            held = cute.make_rmem_tensor((elements, count), ELEMENTS[operand.dtype])
            # One load for all pieces reads columns that every thread has, also without the last piece.
            partial = split.partial and count == split.pieces and operand.heads != "shared"
            load_table(places[operand.name], inside, held, operand, partial)
            loaded[operand.name] = held

    z = loaded["x"].load().to(Float32)
    a = cute.make_rmem_tensor((split.vector, split.pieces), Float32)
    a.store(normalised(z, inside, eps, split.width, split.threads, key.center, split.partial))
    out = key.operand("out")
    result = cute.make_rmem_tensor((split.vector, split.pieces), ELEMENTS[out.dtype])
    per = 2 if key.tables == "half" else 1  # columns of a table's value
    for c in cutlass.range_constexpr(split.pieces):
        for j in cutlass.range_constexpr(split.vector // 2):
            pair = []
            for i in (2 * j, 2 * j + 1):
                value = a[i, c]
                if const_expr("weight" in loaded):
                    weight = loaded["weight"][i, c % loaded["weight"].shape[1]].to(Float32)
                    value = value * (weight + key.weight_offset if key.weight_offset else weight)
                if const_expr("bias" in loaded):
                    value = value + loaded["bias"][i, c % loaded["bias"].shape[1]].to(Float32)
                pair.append(value)
            cos = [loaded["cos"][i // per, c % loaded["cos"].shape[1]].to(Float32) for i in (2 * j, 2 * j + 1)]
            sin = [loaded["sin"][i // per, c % loaded["sin"].shape[1]].to(Float32) for i in (2 * j, 2 * j + 1)]
            a[2 * j, c] = cos[0] * pair[0] - sin[0] * pair[1]
            a[2 * j + 1, c] = cos[1] * pair[1] + sin[1] * pair[0]
    result = rounded(a.load(), ELEMENTS[out.dtype])
    store_pieces(result, places["out"], inside, out.align, split.partial)


@cute.jit
def launch_rope_rows(
    pointers, strides, sizes, rows: Int32, eps: Float32, stream: cuda.CUstream, key: cutlass.Constexpr
):
    rope_rows(pointers, strides, sizes, eps, key).launch(
        grid=(rows, 1, 1), block=(key.split.threads, 1, 1), stream=stream
    )


def build(key, options):
    """Compile the kernel of `key`."""
    return cute.compile(launch_rope_rows, *key.example(Int64, Int32), Int32(1), Float32(0.0), cuda.CUstream(0), key,
                        options=options)  # fmt: skip


host = Host(see_rope, build, NAMES, ("out",), values=("norm", "eps", "weight_offset", "across", "tables"))
prepare, run = host.prepare, host.run
