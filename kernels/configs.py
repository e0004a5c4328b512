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


def choose(width: int) -> Config:
    """The configuration for rows of `width` elements."""
    num_warps = 1 if width <= 512 else 2 if width <= 1024 else 4 if width <= 4096 else 8 if width <= 8192 else 16
    chunk = min(VECTOR * 32 * num_warps, _power_of_two(width))
    return Config(chunk=chunk, chunks=-(-width // chunk), num_warps=num_warps)
