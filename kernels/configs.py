"""Launch configurations by row width, number of rows and operands: data apart from the kernels."""

from __future__ import annotations

from dataclasses import dataclass

VECTOR = 8  # elements of a 16-byte access in half precision
LANES = 32
MOST_WARPS = 16
CANDIDATES = 6  # configurations of one launch that are timed, at most


def in_warps(number: int) -> str:
    """1 warp, 2 warps."""
    return f"{number} warp{'s' if number > 1 else ''}"


@dataclass(frozen=True)
class Config:
    """`chunk` elements per chunk (a power of two), `chunks` of them per row."""

    chunk: int
    chunks: int
    num_warps: int
    num_stages: int = 1

    def __str__(self) -> str:
        return f"{in_warps(self.num_warps)}, {self.chunks} x {self.chunk} columns"


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


# (widest row, warps): the first entry that fits. Measured on an H100, bf16, cold inputs, as a fraction of a copy:
#   1152: 1 warp 0.97, 2 0.99, 4 0.87     1536: 1 0.93, 2 0.98, 4 0.97     2048: 2 0.98, 4 1.00, 8 0.98
#   2432: 2 0.98, 4 0.99, 8 0.88          3072: 2 0.98, 4 0.99, 8 0.94     3840: 2 0.97, 4 0.95, 8 1.00
#   5120: 4 1.00, 8 1.00, 16 0.69         8192: 4 0.95, 8 1.00, 16 0.89
#   5120 with fp32 parameters: 4 0.98, 8 0.81; see HALVED
# What decides is how many bytes of rows an SM has in flight, registers permitting: about 30 KB suffice, 20 KB do not.
WARPS = ((512, 1), (1536, 2), (3584, 4), (4096, 8), (6144, 4), (12288, 8), (16384, 16))
# (op, of fp32 scale or shift only, narrowest row, widest, warps), with chunks of half an access: fp32 parameters then
# take a whole one, and 2432 columns leave fewer lanes idle. Measured by `python -m dkfuse.bench.tune`: 32760 x 5120 at
# 1.04x the speed of 4 warps and whole accesses, 2 x 4096 x 2432 at 1.03x. Norms that read a residual too gain nothing.
HALVED = (("norm_modulate", True, 4097, 6144, 2), ("norm_modulate_dual", False, 2305, 2560, 4))


def choose(width: int, op: str = "", wide: bool = False) -> Config:
    """The configuration of `op` for rows of `width` elements; wide: scale or shift is fp32."""
    for name, only_wide, narrowest, widest, num_warps in HALVED:
        if op == name and wide >= only_wide and narrowest <= width <= widest:
            return _of_chunks(width, VECTOR * LANES * num_warps // 2, num_warps)
    num_warps = next(warps for widest, warps in WARPS if width <= widest)
    return with_warps(width, num_warps)


def with_warps(width: int, num_warps: int) -> Config:
    """Chunks of one 16-byte access per lane, as many as the row takes."""
    return _of_chunks(width, VECTOR * LANES * num_warps, num_warps)


def candidates(width: int, op: str = "", wide: bool = False) -> list[Config]:
    """What is worth timing of `op` for rows of `width` elements, at most CANDIDATES, that of `choose` first.

    Half and twice the warps, each also with chunks of half the access: fp32 rows then take one of 16 bytes, and rows
    that are no multiple of a chunk waste less.
    """
    found = [choose(width, op, wide)]
    usual = choose(width).num_warps
    for num_warps in (usual, 2 * usual, usual // 2):
        if not 1 <= num_warps <= MOST_WARPS:
            continue
        whole = with_warps(width, num_warps)
        found.append(whole)
        if whole.chunk >= 2 * LANES * num_warps:
            found.append(_of_chunks(width, whole.chunk // 2, num_warps))
    return list(dict.fromkeys(found))[:CANDIDATES]


def _of_chunks(width: int, chunk: int, num_warps: int) -> Config:
    chunk = min(chunk, _power_of_two(width))
    return Config(chunk=chunk, chunks=-(-width // chunk), num_warps=num_warps)
