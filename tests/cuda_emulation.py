"""Runs `cuda_rope.cu` on the CPU: compiled by g++, 32 threads a warp, a barrier where lanes exchange values.

Vector loads and stores check their alignment. What is not the source's own are the conversions of bf16 and fp16, which
it has as PTX.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

BEFORE = r"""
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
struct Index { unsigned x; };
static thread_local Index threadIdx, blockIdx;
template <int BYTES> static void aligned(const void *p) { if ((uintptr_t)p % BYTES) abort(); }
struct uint4 {
    unsigned x, y, z, w;
    uint4() = default;
    uint4(unsigned a, unsigned b, unsigned c, unsigned d) : x(a), y(b), z(c), w(d) {}
    uint4(const uint4 &o) { aligned<16>(&o); x = o.x, y = o.y, z = o.z, w = o.w; }
    uint4 &operator=(const uint4 &o) { aligned<16>(this); x = o.x, y = o.y, z = o.z, w = o.w; return *this; }
} __attribute__((aligned(16)));
struct uint2 { unsigned x, y; };
static uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) { return uint4(a, b, c, d); }
static uint4 __ldg(const uint4 *p) { return *p; }
static uint2 __ldg(const uint2 *p) { aligned<8>(p); return *p; }
static float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
static unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
static float rsqrtf(float value) { return 1 / std::sqrt(value); }
static thread_local std::barrier<> *warp;
static thread_local float *exchanged;
static float __shfl_xor_sync(unsigned, float value, int offset) {
    int lane = threadIdx.x % 32;
    exchanged[lane] = value;
    warp->arrive_and_wait();
    float other = exchanged[lane ^ offset];
    warp->arrive_and_wait();
    return other;
}
static float from_half(unsigned short bits) { _Float16 value; memcpy(&value, &bits, 2); return (float)value; }
static unsigned to_half(float value) {
    _Float16 half = (_Float16)value;
    unsigned short bits;
    memcpy(&bits, &half, 2);
    return bits;
}
static unsigned to_bfloat(float value) {
    unsigned bits = __float_as_uint(value);
    return std::isnan(value) ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
"""
AFTER = r"""
extern "C" void emulate(const Arguments *arguments, unsigned blocks) {
    for (unsigned block = 0; block < blocks; block++)
        for (int first = 0; first < THREADS; first += 32) {
            std::barrier<> barrier(32);
            float values[32];
            std::vector<std::thread> lanes;
            for (int lane = 0; lane < 32; lane++)
                lanes.emplace_back([&, lane] {
                    threadIdx.x = first + lane, blockIdx.x = block, warp = &barrier, exchanged = values;
                    norm_rope(*arguments);
                });
            for (auto &lane : lanes) lane.join();
        }
}
"""
CONVERSIONS = (
    ('asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)bits));', "value = from_half(bits);"),
    (
        'asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));',
        "word = to_bfloat(low) | to_bfloat(high) << 16;",
    ),
    (
        'asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));',
        "word = to_half(low) | to_half(high) << 16;",
    ),
)


class Emulated:
    """Stands in for `cuda_driver.Kernel`."""

    def __init__(self, folder: Path, source: str, settings: tuple[tuple[str, int], ...]) -> None:
        for ours, theirs in CONVERSIONS:
            assert ours in source
            source = source.replace(ours, theirs)
        assert "asm" not in source
        name = folder / f"kernel{len(list(folder.iterdir()))}"
        name.with_suffix(".cpp").write_text(BEFORE + source + AFTER)
        definitions = [f"-D{key}={value}" for key, value in settings]
        command = ["g++", "-std=c++20", "-O0", "-w", "-shared", "-fPIC", *definitions, "-o", f"{name}.so"]
        subprocess.run([*command, f"{name}.cpp", "-lpthread"], check=True)
        self.library = ctypes.CDLL(f"{name}.so")

    def launch(self, blocks: int, threads: int, parameter: ctypes.Structure) -> None:
        self.library.emulate(ctypes.byref(parameter), blocks)


def emulator(folder: Path) -> Callable[[tuple[tuple[str, int], ...], Any], Emulated]:
    """In place of `cuda_rope._kernel`."""
    from dkfuse.kernels import cuda_rope

    @functools.cache
    def kernel(settings: tuple[tuple[str, int], ...], device: Any) -> Emulated:
        return Emulated(folder, cuda_rope.source(), settings)

    return kernel
