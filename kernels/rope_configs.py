"""Tile shapes of norm_rope's kernel by columns, rows and kind of norm: data apart from the kernel."""

from __future__ import annotations

from dataclasses import dataclass

from .configs import LANES, VECTOR, WARPS, in_warps


@dataclass(frozen=True)
class RopeConfig:
    """A program takes `blocks` tiles of `rows` rows (a power of two); repeat: see `triton_rope_tiles`."""

    rows: int
    blocks: int
    num_warps: int
    num_stages: int = 1
    repeat: bool = True

    def __str__(self) -> str:
        return f"{in_warps(self.num_warps)}, {self.blocks} x {self.rows} rows{'' if self.repeat else ', shared'}"


MANY = 256  # beyond so many rows along the tile axis, their number does not matter
MAX_BLOCKS = 8
MOST = 6144  # elements that a program takes by choice; a norm across more needs all of them in one

# (columns of a row, rows along the tile axis, None for many; norm across them) -> what measured best, where the rule
# below does not find it.
MEASURED: dict[tuple[int, int | None, bool], RopeConfig] = {}


def choose_rope(columns: int, part: int, rows: int | None, across: bool, num_warps: int | None = None) -> RopeConfig:
    """The configuration for `rows` rows (None: not known, or many) of `columns` columns, loaded `part` at a time.

    Both are padded to powers of two, part <= columns. num_warps: only configurations with so many, where several calls
    share a launch.
    """
    return ranked(columns, part, rows, across, num_warps)[0]


def ranked(columns: int, part: int, rows: int | None, across: bool, num_warps: int | None = None) -> list[RopeConfig]:
    """`choose_rope`'s configuration, then the others by what is expected of them."""
    known = None if rows is not None and rows > MANY and not across else rows
    measured = MEASURED.get((columns, known, across))
    found = sorted(_candidates(part, known, across, num_warps), key=lambda c: _cost(c, columns, part, known))
    if measured is not None and num_warps in (None, measured.num_warps):
        found = [measured, *(c for c in found if c != measured)]
    return found


def _candidates(part: int, rows: int | None, across: bool, num_warps: int | None) -> list[RopeConfig]:
    found = []
    for warps in (1, 2, 4, 8, 16) if num_warps is None else (num_warps,):
        fitting = max(1, LANES * warps * VECTOR // part)  # one 16-byte access per lane, in half precision
        for height in {fitting, max(1, fitting // 2)}:
            needed = 1 if rows is None else -(-rows // height)
            if across:
                found.append(RopeConfig(height, needed, warps))
            else:
                choices = range(1, MAX_BLOCKS + 1)
                blocks = choices if rows is None else {-(-needed // pieces) for pieces in range(1, needed + 1)}
                found += [RopeConfig(height, b, warps) for b in blocks if b <= MAX_BLOCKS]
    return found


def _cost(config: RopeConfig, columns: int, part: int, rows: int | None) -> float:
    """Rows that are masked away, then how far a program is from the size that measured best for rows in registers."""
    tile = config.rows * config.blocks
    waste = 1.0 if rows is None else -(-rows // tile) * tile / rows
    elements = tile * columns
    wanted = next((warps for widest, warps in WARPS if elements <= widest), 2 * WARPS[-1][1])
    misfit = max(wanted / config.num_warps, config.num_warps / wanted) - 1.0
    small = max(0.0, 3072 / elements - 1.0) if rows is None or -(-rows // tile) > 1 else 0.0
    large = max(0.0, elements / MOST - 1.0)
    narrow = 0.06 if config.rows * part < LANES * VECTOR * config.num_warps else 0.0
    return waste + 0.08 * misfit + 0.1 * small + 0.1 * large + narrow
