"""Measured gain of quack's GEMM: time of what runs without it / its time, sustained, one H100 80GB SXM, bf16.

The rival is cuBLAS as PyTorch calls it: addmm for act "none", `_addmm_activation` for "gelu", for "silu" mm and one
Triton pass over its result. torch 2.11 with CUDA 13, quack-kernels 0.6.1; each pair in turns for 8 to 25 ms a turn, at
the power limit, where most of these products run; the mean of two runs where there are two, which differ by up to 2 %.
Rows, columns (of the weight: both halves of a gated one) and K are of [rows, K] @ [K, columns]; gains are by tiles
(`dkfuse.kernels.gemm_kernels.TILES`). They were taken on CUDA graphs of rotating operands, before the module
`dkfuse.bench.gemm`, which takes such rows, was written. Its own are those of 27280 and 44520 rows, of an H200.

A row speaks for products near it, less what their last wave of tiles leaves idle more than its own: quack computes
whole waves of tiles, one tile per multiprocessor. That is why 4608 x 3072 (4.4 waves, which take the time of 5) loses
where 4096 x 3072 (3.9) gains. Products of fewer than `MIN_ROWS` rows were all slower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dkfuse.kernels.gemm_kernels import TILES

from .common import sms


@dataclass(frozen=True)
class Row:
    """One measured product. `act` is "none", "gelu" or "silu"."""

    capability: int
    act: str
    rows: int
    columns: int
    k: int
    gains: dict[str, float]


TABLE = (
    Row(90, "none", 4096, 3072, 3072, {"128x192": 1.076}),
    Row(90, "none", 1024, 9216, 3072, {"128x192": 1.103, "128x160": 0.998}),
    Row(90, "none", 2048, 9216, 3072, {"128x192": 1.089, "128x160": 0.974}),
    Row(90, "none", 4096, 9216, 3072, {"128x192": 1.088, "128x160": 1.016}),
    Row(90, "none", 17776, 9216, 3072, {"128x192": 1.062}),
    Row(90, "none", 25440, 9216, 3072, {"128x192": 1.067, "128x160": 0.938}),
    Row(90, "none", 4096, 12288, 3072, {"128x192": 1.065, "128x160": 1.039}),
    Row(90, "none", 4096, 3072, 12288, {"128x192": 1.024}),
    Row(90, "none", 4608, 21504, 3072, {"128x192": 1.089, "128x160": 1.068}),
    Row(90, "none", 4608, 9216, 3072, {"128x192": 1.018, "128x160": 1.056}),
    Row(90, "none", 4608, 12288, 3072, {"128x192": 1.058, "128x160": 1.068}),
    Row(90, "none", 4608, 3072, 3072, {"128x192": 0.940, "128x160": 0.948}),
    Row(90, "none", 4608, 3072, 12288, {"128x192": 0.905, "128x160": 0.848}),
    Row(90, "none", 8192, 4608, 1536, {"128x192": 1.178}),
    Row(90, "none", 8192, 2432, 2432, {"128x192": 1.049, "128x160": 0.977}),
    Row(90, "none", 4096, 7296, 2432, {"128x192": 1.030, "128x160": 1.019}),
    Row(90, "none", 8192, 7296, 2432, {"128x192": 1.089, "128x160": 1.040}),
    Row(90, "none", 8192, 9728, 2432, {"128x192": 1.105, "128x160": 1.087}),
    Row(90, "none", 8192, 2432, 9728, {"128x192": 0.977}),
    Row(90, "none", 4128, 3840, 3840, {"128x192": 0.854}),
    Row(90, "none", 4128, 11520, 3840, {"128x192": 0.982, "128x160": 0.985}),
    Row(90, "none", 4128, 10240, 3840, {"128x192": 0.989, "128x160": 0.988}),
    Row(90, "none", 4128, 20480, 3840, {"128x192": 0.993}),
    Row(90, "none", 4128, 3840, 10240, {"128x192": 0.795}),
    Row(90, "none", 32760, 5120, 5120, {"128x192": 0.977}),
    Row(90, "none", 32760, 5120, 13824, {"128x192": 0.990}),
    Row(90, "none", 32760, 13824, 5120, {"128x192": 1.040}),
    Row(90, "none", 27280, 9216, 3072, {"128x192": 1.042, "128x160": 0.997}),
    Row(90, "none", 44520, 16384, 3072, {"128x192": 0.895, "128x160": 0.868}),
    Row(90, "gelu", 4096, 4608, 1152, {"128x192": 1.327, "128x160": 1.209}),
    Row(90, "gelu", 8192, 9728, 2432, {"128x192": 1.184, "128x160": 1.133}),
    Row(90, "gelu", 4096, 12288, 3072, {"128x192": 1.106, "128x160": 1.055}),
    Row(90, "gelu", 4608, 12288, 3072, {"128x192": 1.127, "128x160": 1.151}),
    Row(90, "gelu", 25440, 12288, 3072, {"128x192": 1.128, "128x160": 1.020}),
    Row(90, "gelu", 27280, 14336, 3072, {"128x192": 1.081, "128x160": 1.062}),
    Row(90, "silu", 4096, 12288, 2304, {"128x192": 1.243, "128x160": 1.231}),
    Row(90, "silu", 4352, 16384, 3072, {"128x192": 1.136, "128x160": 1.144}),
    Row(90, "silu", 4128, 20480, 3840, {"128x192": 1.068, "128x160": 1.089}),
    Row(90, "silu", 4096, 36864, 6144, {"128x192": 1.046, "128x160": 1.081}),
)
MIN_ROWS = 1024
TFLOPS = 650  # of cuBLAS at the power limit
NEAR = 2.0  # a row speaks for products of up to so many times its rows and columns, or of so much fewer
NEAR_K = 1.15  # and so many times its K


def efficiency(rows: int, columns: int, tiles: str, capability: int = 90) -> float:
    """The share of the time of whole waves of whole tiles in which the result is computed, clusters kept together."""
    (height, width), (down, across) = TILES[tiles].tile, TILES[tiles].cluster
    clusters = math.ceil(rows / (height * down)) * math.ceil(columns / (width * across))
    at_once = sms(f"sm{capability}") // (down * across)
    waves = math.ceil(clusters / at_once)
    return rows * columns / (waves * at_once * height * down * width * across)


def gains(capability: int, act: str, rows: int, columns: int, k: int) -> dict[str, float] | None:
    """Expected gain by tiles, from the nearest measured product; None where none is near."""
    best: tuple[float, Row] | None = None
    for row in TABLE:
        if (row.capability, row.act) != (capability, act) or not (rows and columns and k):
            continue
        apart = abs(math.log(rows / row.rows)), abs(math.log(columns / row.columns))
        apart_k = abs(math.log(k / row.k))
        if max(apart) <= math.log(NEAR) and apart_k <= math.log(NEAR_K):
            distance = sum(apart) + 3 * apart_k
            if best is None or distance < best[0]:
                best = distance, row
    if best is None:
        return None
    row, found = best[1], {}
    for tiles, gain in row.gains.items():
        own = efficiency(row.rows, row.columns, tiles, capability)
        found[tiles] = gain * min(1.0, efficiency(rows, columns, tiles, capability) / own)
    return found


def microseconds(rows: int, columns: int, k: int) -> float:
    """About how long cuBLAS takes."""
    return 2 * rows * columns * k / TFLOPS * 1e-6
