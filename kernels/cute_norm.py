"""norm_modulate and residual_norm_modulate in CuTe DSL.

    z   = residual + gate*x                   gate None: residual + x; without a residual z = x
    n   = norm(z)                             "layer" or "rms", fp32, the variance in a second pass over registers
    out = (n*(weight_offset + weight) + bias)*(scale_offset + scale) + shift;   sum = z

One block per row. Operands are read in place with 16-byte loads through the strides of up to three row axes; an absent
one costs nothing, it is not in the compiled kernel. Arithmetic in fp32, every output rounded once.
"""

# mypy: ignore-errors

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from .cute_launch import Host
from .cute_norm_key import INPUTS, OUTPUTS, see_norm
from .cute_rows import (
    ELEMENTS,
    base_address,
    load_pieces,
    normalised,
    rounded,
    row_indices,
    store_pieces,
)


@cute.kernel
def norm_rows(pointers, strides, sizes, eps: Float32, key: cutlass.Constexpr):
    lane, _, _ = cute.arch.thread_idx()
    program, _, _ = cute.arch.block_idx()
    split = key.split
    indices = row_indices(program, sizes, key.axes)
    last = lane + (split.pieces - 1) * split.threads
    inside = last * split.vector < split.width

    places = {}
    used = 0
    for i in cutlass.range_constexpr(len(key.operands)):
        operand = key.operands[i]
        count = sum(operand.moves)
        row = base_address(pointers[i], indices, strides[used : used + count], operand.moves)
        used += count
        step = split.vector * operand.size
        places[operand.name] = [row + (lane + c * split.threads) * step for c in range(split.pieces)]

    # Every load stands before the reduction, so that their latencies overlap.
    loaded = {}
    for i in cutlass.range_constexpr(len(key.operands)):
        operand = key.operands[i]
        if const_expr(operand.name in INPUTS):
            held = cute.make_rmem_tensor((split.vector, split.pieces), ELEMENTS[operand.dtype])
            load_pieces(places[operand.name], inside, held, operand.align, split.partial)
            loaded[operand.name] = held

    z = loaded["x"].load().to(Float32)
    if const_expr("residual" in loaded):
        if const_expr("gate" in loaded):
            z = z * loaded["gate"].load().to(Float32)
        z = loaded["residual"].load().to(Float32) + z
    if const_expr(key.has("sum")):
        operand = key.operand("sum")
        store_pieces(rounded(z, ELEMENTS[operand.dtype]), places["sum"], inside, operand.align, split.partial)

    if const_expr(key.has("out")):
        a = normalised(z, inside, eps, split.width, split.threads, key.center, split.partial)
        if const_expr("weight" in loaded):
            weight = loaded["weight"].load().to(Float32)
            a = a * (weight + key.weight_offset if key.weight_offset else weight)
        if const_expr("bias" in loaded):
            a = a + loaded["bias"].load().to(Float32)
        if const_expr("scale" in loaded):
            scale = loaded["scale"].load().to(Float32)
            a = a * (scale + key.scale_offset if key.scale_offset else scale)
        if const_expr("shift" in loaded):
            a = a + loaded["shift"].load().to(Float32)
        operand = key.operand("out")
        store_pieces(rounded(a, ELEMENTS[operand.dtype]), places["out"], inside, operand.align, split.partial)


@cute.jit
def launch_norm_rows(
    pointers, strides, sizes, rows: Int32, eps: Float32, stream: cuda.CUstream, key: cutlass.Constexpr
):
    norm_rows(pointers, strides, sizes, eps, key).launch(
        grid=(rows, 1, 1), block=(key.split.threads, 1, 1), stream=stream
    )


def build(key, options):
    """Compile the kernel of `key`."""
    return cute.compile(launch_norm_rows, *key.example(cutlass.Int64, Int32), Int32(1), Float32(0.0), cuda.CUstream(0),
                        key, options=options)  # fmt: skip


host = Host(see_norm, build, INPUTS, OUTPUTS, values=("norm", "eps", "weight_offset", "scale_offset"))
prepare, run = host.prepare, host.run
