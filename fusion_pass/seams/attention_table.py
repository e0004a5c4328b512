"""Measured speed of attention kernels: TFLOP/s of 4*B*H*S*Sk*d, bf16, no mask, not causal, `[B, S, H, d]` in memory.

One H100 80GB SXM, torch 2.11 with CUDA 13, flash-attn-4 4.0.0b20. `flash` is torch's copy of FlashAttention 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log


@dataclass(frozen=True)
class Row:
    """One measured shape, and the speed of each kernel there. `heads` is B*H."""

    capability: int
    head_dim: int
    heads: int
    queries: int
    keys: int
    tflops: dict[str, float]


# flash lay between 291 and 366 over these shapes; its best is what the others are compared with
TABLE = (
    Row(90, 128, 24, 4608, 4608, {"cudnn": 643, "fa4": 680, "flash": 366}),
    Row(90, 64, 76, 4429, 4429, {"cudnn": 406, "fa4": 516, "flash": 366}),
    Row(90, 128, 24, 25000, 25000, {"cudnn": 617, "fa4": 695, "flash": 366}),
    Row(90, 128, 40, 32760, 32760, {"cudnn": 591, "fa4": 590, "flash": 366}),
)
NEAR = 2.0  # a row speaks for shapes with up to twice as many queries, keys or (four times as many) heads, or as few


def nearest(capability: int, head_dim: int, heads: int, queries: int, keys: int) -> Row | None:
    """The row of this architecture and head_dim whose tokens are nearest; None where none is near."""
    best: tuple[float, Row] | None = None
    for row in TABLE:
        if (row.capability, row.head_dim) != (capability, head_dim) or not (heads and queries and keys):
            continue
        apart = [abs(log(queries / row.queries)), abs(log(keys / row.keys)), abs(log(heads / row.heads)) / 2]
        if max(apart) <= log(NEAR) and (best is None or sum(apart) < best[0]):
            best = sum(apart), row
    return best[1] if best is not None else None


def microseconds(head_dim: int, heads: int, queries: int, keys: int, tflops: float) -> float:
    """How long a kernel of this speed takes."""
    return 4 * heads * queries * keys * head_dim / tflops * 1e-6
