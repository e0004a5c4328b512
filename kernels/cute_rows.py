"""CuTe DSL helpers: pieces of a row in registers, and sums over a row.

A row of `width` elements is held by `threads` threads, `vector` elements at a time: thread t has the columns
(t + c*threads)*vector, ... of piece c = 0, 1, .... Pieces beyond the width (only the last c has them) are zeros and
not stored.
"""

# CuTe DSL is a language of its own, and reads annotations as they stand
# mypy: ignore-errors

import cutlass
import cutlass.cute as cute
import torch
import tvm_ffi  # noqa: F401 - launches go through it: where it is missing, so is the provider
from cutlass import Float32, Int32, Int64, const_expr

ELEMENTS = {torch.float16: cutlass.Float16, torch.bfloat16: cutlass.BFloat16, torch.float32: cutlass.Float32}
WARP = 32


def at(address, dtype, vector, align):
    """The `vector` elements of global memory at a byte address that is a multiple of `align`."""
    pointer = cute.make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=align)
    return cute.make_tensor(pointer, cute.make_layout(vector))


@cute.jit
def load_pieces(addresses, inside, held, align: cutlass.Constexpr, partial: cutlass.Constexpr):
    """Fill `held`, `[vector, pieces]`, from one address per piece; the last piece only where `inside`, if `partial`."""
    count = len(addresses)
    vector = cute.size(held, mode=[0])
    for c in cutlass.range_constexpr(count):
        if const_expr(partial and c == count - 1):
            held[None, c].fill(0)
            if inside:
                cute.autovec_copy(at(addresses[c], held.element_type, vector, align), held[None, c])
        else:
            cute.autovec_copy(at(addresses[c], held.element_type, vector, align), held[None, c])


@cute.jit
def store_pieces(held, addresses, inside, align: cutlass.Constexpr, partial: cutlass.Constexpr):
    """The inverse of `load_pieces`."""
    count = len(addresses)
    vector = cute.size(held, mode=[0])
    for c in cutlass.range_constexpr(count):
        if const_expr(partial and c == count - 1):
            if inside:
                cute.autovec_copy(held[None, c], at(addresses[c], held.element_type, vector, align))
        else:
            cute.autovec_copy(held[None, c], at(addresses[c], held.element_type, vector, align))


def rounded(values, dtype):
    """fp32 values as a register tensor of `dtype`, each rounded once."""
    held = cute.make_rmem_tensor(values.shape, dtype)
    held.store(values.to(dtype))
    return held


@cute.jit
def row_sum(values, threads: cutlass.Constexpr):
    """The sum of all threads' values, the same in every thread. Each call has shared memory of its own."""
    total = values.reduce(cute.ReductionOp.ADD, init_val=Float32(0.0), reduction_profile=0)
    total = cute.arch.warp_reduction(total, lambda a, b: a + b)
    warps = threads // WARP
    if const_expr(warps > 1):
        shared = cute.make_tensor(cute.arch.alloc_smem(Float32, warps, alignment=16), cute.make_layout(warps))
        lane, _, _ = cute.arch.thread_idx()
        warp = lane // WARP
        if lane % WARP == 0:
            shared[warp] = total
        cute.arch.barrier()
        partials = cute.make_rmem_tensor(warps, Float32)
        cute.autovec_copy(shared, partials)
        total = partials.load().reduce(cute.ReductionOp.ADD, init_val=Float32(0.0), reduction_profile=0)
    return total


@cute.jit
def normalised(
    z, inside, eps: Float32, width: cutlass.Constexpr, threads: cutlass.Constexpr, center: cutlass.Constexpr,
    partial: cutlass.Constexpr,
):  # fmt: skip
    """(z - mean)*rsqrt(var + eps) if `center`, the variance of the centred values, else z*rsqrt(mean(z^2) + eps)."""
    n = z
    if const_expr(center):
        n = z - row_sum(z, threads) * (1.0 / width)
        if const_expr(partial):
            held = cute.make_rmem_tensor(z.shape, Float32)
            held.store(n)
            if not inside:
                held[None, z.shape[1] - 1].fill(0.0)
            n = held.load()
    return n * cute.math.rsqrt(row_sum(n * n, threads) * (1.0 / width) + eps)


def row_indices(program, sizes, axes):
    """(i0, i1, i2) as Int64 of row number `program`, innermost first; sizes: those of all axes but the outermost."""
    indices = [Int32(program)]
    for axis in range(axes - 1):
        indices[axis : axis + 1] = [indices[axis] % sizes[axis], indices[axis] // sizes[axis]]
    return [Int64(index) for index in indices]


def base_address(pointer, indices, strides, moves):
    """Byte address of a row. strides: bytes, one per axis that the tensor moves along, in order."""
    address, used = pointer, 0
    for index, moving in zip(indices, moves, strict=True):
        if moving:
            address = address + index * strides[used]
            used += 1
    return address
