"""Launch configurations by row width, number of rows and operands: data apart from the kernels."""

from __future__ import annotations

from dataclasses import dataclass

VECTOR = 8  # elements of a 16-byte access in half precision


@dataclass(frozen=True)
class Config:
    """`chunk` elements per chunk (a power of two), `chunks` of them per row."""

    chunk: int
    chunks: int
    num_warps: int
    num_stages: int = 1


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


# (widest row, warps): the first entry that fits. Measured on an H100, bf16, cold inputs, as a fraction of a copy:
#   1152: 1 warp 0.97, 2 0.99, 4 0.87     1536: 1 0.93, 2 0.98, 4 0.97     2048: 2 0.98, 4 1.00, 8 0.98
#   2432: 2 0.98, 4 0.99, 8 0.88          3072: 2 0.98, 4 0.99, 8 0.94     3840: 2 0.97, 4 0.95, 8 1.00
#   5120: 4 1.00, 8 1.00, 16 0.69         8192: 4 0.95, 8 1.00, 16 0.89
#   5120 with fp32 parameters: 4 0.98, 8 0.81
# What decides is how many bytes of rows an SM has in flight, registers permitting: about 30 KB suffice, 20 KB do not.
WARPS = ((512, 1), (1536, 2), (3584, 4), (4096, 8), (6144, 4), (12288, 8), (16384, 16))


def choose(width: int) -> Config:
    """The configuration for rows of `width` elements."""
    num_warps = next(warps for widest, warps in WARPS if width <= widest)
    return with_warps(width, num_warps)


def with_warps(width: int, num_warps: int) -> Config:
    """Chunks of one 16-byte access per lane, as many as the row takes."""
    chunk = min(VECTOR * 32 * num_warps, _power_of_two(width))
    return Config(chunk=chunk, chunks=-(-width // chunk), num_warps=num_warps)
