"""Measured gain of quack's GEMM: time of what runs without it / its time, sustained, one H100 80GB SXM, bf16.

The rival is cuBLAS as PyTorch calls it: addmm for act "none", `_addmm_activation` for "gelu", for "silu" addmm and
a pass over its result. torch 2.11 with CUDA 13, quack-kernels 0.6.1; each pair in turns for 8 to 25 ms a turn, at the
power limit, where most of these products run. Rows, columns (of the weight: both halves of a gated one) and K are of
[rows, K] @ [K, columns]; gains are by tiles (`dkfuse.kernels.gemm_kernels.TILES`).

A row speaks for products near it, less what their last wave of tiles leaves idle more than its own: quack computes
whole waves of tiles, one tile per multiprocessor. That is why 4608 x 3072 (4.4 waves, which take the time of 5) loses
where 4096 x 3072 (3.9) gains. Products of fewer than `MIN_ROWS` rows were all slower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dkfuse.kernels.gemm_kernels import TILES

from .common import SMS


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
    Row(90, "none", 4096, 3072, 3072, {"128x192": 1.068}),
    Row(90, "none", 4096, 9216, 3072, {"128x192": 1.077, "128x160": 1.019}),
    Row(90, "none", 4096, 12288, 3072, {"128x192": 1.065, "128x160": 1.039}),
    Row(90, "none", 4096, 3072, 12288, {"128x192": 1.019}),
    Row(90, "none", 4608, 21504, 3072, {"128x192": 1.082, "128x160": 1.051}),
    Row(90, "none", 4608, 9216, 3072, {"128x192": 1.018, "128x160": 1.050}),
    Row(90, "none", 4608, 12288, 3072, {"128x192": 1.058, "128x160": 1.068}),
    Row(90, "none", 4608, 3072, 3072, {"128x192": 0.940, "128x160": 0.948}),
    Row(90, "none", 4608, 3072, 12288, {"128x192": 0.905, "128x160": 0.848}),
    Row(90, "none", 8192, 2432, 2432, {"128x192": 1.059, "128x160": 0.981}),
    Row(90, "none", 8192, 7296, 2432, {"128x192": 1.095, "128x160": 1.043}),
    Row(90, "none", 8192, 9728, 2432, {"128x192": 1.105, "128x160": 1.087}),
    Row(90, "none", 8192, 2432, 9728, {"128x192": 0.977, "128x256": 1.001}),
    Row(90, "none", 4128, 3840, 3840, {"128x192": 0.854, "128x256": 0.946}),
    Row(90, "none", 4128, 11520, 3840, {"128x192": 0.978, "128x160": 0.989}),
    Row(90, "none", 4128, 10240, 3840, {"128x256": 1.020, "128x160": 0.988}),
    Row(90, "none", 4128, 20480, 3840, {"128x192": 0.993, "128x256": 1.005}),
    Row(90, "none", 4128, 3840, 10240, {"128x192": 0.795, "128x256": 0.938}),
    Row(90, "none", 32760, 5120, 5120, {"128x192": 0.977, "128x256": 0.988}),
    Row(90, "none", 32760, 5120, 13824, {"128x192": 0.990, "128x256": 1.003}),
    Row(90, "none", 32760, 13824, 5120, {"128x192": 1.040}),
)
MIN_ROWS = 1024
NEAR = 2.0  # a row speaks for products of up to so many times its rows and columns, or of so much fewer
NEAR_K = 1.15  # and so many times its K


def efficiency(rows: int, columns: int, tiles: str, capability: int = 90) -> float:
    """The share of the time of whole waves of whole tiles in which the result is computed, clusters kept together."""
    (height, width), (down, across) = TILES[tiles].tile, TILES[tiles].cluster
    clusters = math.ceil(rows / (height * down)) * math.ceil(columns / (width * across))
    at_once = SMS.get(f"sm{capability}", SMS["sm90"]) // (down * across)
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
