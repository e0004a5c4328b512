"""Measured speed of attention kernels: TFLOP/s of 4*B*H*S*Sk*d, bf16, no mask, not causal, `[B, S, H, d]` in memory.

One H100 80GB SXM, torch 2.11 with CUDA 13, cuDNN 9.19, flash-attn-4 4.0.0b20, by `python -m dkfuse.bench.attention`.
`flash` is torch's copy of FlashAttention 2. `cudnn` is the better of its two runs there, as torch's SDPA, which chooses
it, and by name: they differ by up to 11 %, and what another kernel gains within that is no gain. The row of 256 keys is
as short as a call: all are bound by calls there.

`lengths` are speeds where a mask says how many of the first keys take part, with `DENSE` for torch's choice given that
mask as a `[B, 1, 1, Sk]` bias, and others by the numbers of keys; all keys count, also those that do not take part. By
`python -m dkfuse.bench.attention 1x24x25440+256x128 1x24x67320+256x128 --valid 0.997`; empty where it was not measured.
The four last rows are of an H200, with `--valid 0.9`: 1x24x4096+512x128 2x38x4096+333x64 1x24x4096+256x96
1x16x49290+1985x128.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
    lengths: dict[str, float] = field(default_factory=dict)


TABLE = (
    Row(90, 128, 24, 4608, 4608, {"cudnn": 651, "flash": 332, "efficient": 167, "fa4": 689}),
    Row(90, 64, 76, 4429, 4429, {"cudnn": 415, "flash": 295, "efficient": 129, "fa4": 542}),
    Row(90, 128, 24, 25000, 25000, {"cudnn": 603, "flash": 354, "efficient": 181, "fa4": 708}),
    Row(90, 128, 40, 32760, 32760, {"cudnn": 568, "flash": 363, "efficient": 178, "fa4": 643}),
    Row(90, 128, 12, 32760, 32760, {"cudnn": 604, "flash": 362, "efficient": 182, "fa4": 688}),
    Row(90, 128, 30, 4128, 4128, {"cudnn": 567, "flash": 330, "efficient": 167, "fa4": 652}),
    Row(90, 128, 24, 4224, 4224, {"cudnn": 678, "flash": 359, "efficient": 178, "fa4": 718}),
    Row(90, 64, 96, 17776, 17776, {"cudnn": 432, "flash": 330, "efficient": 140, "fa4": 555}),
    Row(90, 72, 32, 4096, 4096, {"cudnn": 375, "flash": 214, "efficient": 94, "fa4": 420}),
    Row(90, 128, 40, 32760, 512, {"cudnn": 584, "flash": 318, "efficient": 160, "fa4": 504}),
    Row(90, 128, 24, 1536, 1536, {"cudnn": 440, "flash": 230, "efficient": 141, "fa4": 452}),
    Row(90, 72, 32, 4096, 300, {"cudnn": 176, "flash": 148, "efficient": 70, "fa4": 160}),
    Row(90, 72, 128, 256, 256, {"cudnn": 53, "flash": 56, "efficient": 64, "fa4": 64}),
    Row(90, 64, 32, 8064, 8064, {"cudnn": 477, "flash": 288, "efficient": 132, "fa4": 558}),
    Row(90, 96, 24, 4352, 4352, {"cudnn": 479, "flash": 281, "efficient": 132, "fa4": 544}),
    Row(90, 128, 24, 25696, 25696, {}, {"dense": 412, "cudnn": 580, "flash": 368, "fa4": 705}),
    Row(90, 128, 24, 67576, 67576, {}, {"dense": 401, "cudnn": 584, "flash": 354, "fa4": 690}),
    Row(90, 128, 24, 4608, 4608, {}, {"dense": 407, "cudnn": 460, "flash": 372, "fa4": 741}),
    Row(90, 64, 76, 4429, 4429, {}, {"dense": 141, "cudnn": 340, "flash": 321, "fa4": 582}),
    Row(90, 96, 24, 4352, 4352, {}, {"dense": 289, "cudnn": 398, "flash": 322, "fa4": 596}),
    Row(90, 128, 16, 51275, 51275, {}, {"dense": 404, "cudnn": 568, "flash": 400, "fa4": 740}),
)
DENSE = "dense"
# Microseconds of CPU that a call costs more than torch's own attention (19), measured on that host; with numbers of
# keys where True. FlashAttention 4 is called past the dispatcher in compiled graphs. OTHER: kernels that are not
# listed, if they are of a package or take such numbers.
EXTRA = {("fa4", False): 0.0, ("fa4", True): 0.0, ("cudnn", True): 242.0}
OTHER = 61.0  # fa4's own function
COPY = 2.9e6  # bytes per microsecond, read and written, of a copy on an H100
NEAR = 2.0  # a row speaks for shapes with up to twice as many queries, keys or (four times as many) heads, or as few


def nearest(
    capability: int, head_dim: int, heads: int, queries: int, keys: int, lengths: bool = False
) -> dict[str, float] | None:
    """The speeds of this architecture and head_dim whose tokens are nearest; None where none is near.

    lengths: those with numbers of keys that take part.
    """
    best: tuple[float, dict[str, float]] | None = None
    for row in TABLE:
        speeds = row.lengths if lengths else row.tflops
        if not speeds or (row.capability, row.head_dim) != (capability, head_dim) or not (heads and queries and keys):
            continue
        apart = [abs(log(queries / row.queries)), abs(log(keys / row.keys)), abs(log(heads / row.heads)) / 2]
        if max(apart) <= log(NEAR) and (best is None or sum(apart) < best[0]):
            best = sum(apart), speeds
    return best[1] if best is not None else None


def extra(kernel: str, distributed: bool, lengths: bool) -> float:
    """Microseconds of CPU that a call of `kernel` costs more than torch's own; distributed: it is of a package."""
    return EXTRA.get((kernel, lengths), OTHER if distributed or lengths else 0.0)


def reordered(head_dim: int, heads: int, queries: int, keys: int, tflops: float, moved: int) -> float:
    """The speed of a kernel behind a copy of `moved` bytes of keys and values."""
    flops = 4e-6 * heads * queries * keys * head_dim
    return flops / (flops / tflops + 2 * moved / COPY)


def microseconds(head_dim: int, heads: int, queries: int, keys: int, tflops: float) -> float:
    """How long a kernel of this speed takes."""
    return 4 * heads * queries * keys * head_dim / tflops * 1e-6
