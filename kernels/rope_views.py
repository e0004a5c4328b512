"""How norm_rope's kernel sees a call: a tile axis, at most two further row axes, and rows of d columns.

Row dims are sorted by x's strides, so that a tile of rows is dense in memory whatever the order of the dims is (heads,
where q is a projection's result seen as [B, H, S, d]), and merged where every tensor's strides allow it; without tables
usually all of them. A norm across heads has the heads as its tile. A long row without heads is cut into rows of 128
columns, with a norm across them: the same result, and no tile is padded to a power of two.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true

from .axes import Axis, Int, check_count, contiguous_strides, merged, stride_of
from .rope_support import NAMES, rotated_columns
from .unsupported import Unsupported

CUT = 128  # columns of the rows that a long row is cut into
LONG = 1024  # rows beyond this many columns are cut


@dataclass(frozen=True)
class Rows:
    """axes: innermost first, the tile's axis first of all; inner: a tensor's stride between columns, 0 for a scalar.

    d, r: columns of a row, and how many of them are rotated, by halves if `half`.
    across: the norm is over the tile axis too.
    """

    axes: list[Axis]
    inner: dict[str, Int]
    d: int
    r: int
    half: bool
    across: bool


def see(arguments: Mapping[str, Any], out: Any | None = None) -> Rows:
    """The rows of a call with every argument given; without `out` its result is laid out by `order`."""
    x = arguments["x"]
    shape, rank = tuple(x.shape), x.dim()
    tensors = {name: arguments[name] for name in NAMES if arguments[name] is not None}
    if out is not None:
        tensors["out"] = out
    dims = [Axis(shape[i], {name: stride_of(t, i, rank) for name, t in tensors.items()}) for i in range(rank - 1)]
    inner = {name: stride_of(t, t.dim() - 1, t.dim()) if t.dim() else 0 for name, t in tensors.items()}
    if out is None:
        for axis, stride in zip(dims, _ordered_strides(shape, arguments["order"])[:-1], strict=True):
            axis.strides["out"] = stride
        inner["out"] = 1
    d, r = shape[-1], int(rotated_columns(arguments))
    across = arguments["across"] is not None
    tile = [dims.pop(arguments["across"] % rank)] if across else []
    if d > LONG and d % CUT == 0 and r in (0, d) and arguments["rotation"] != "half" and not across:
        tile, d, r = [_cut(arguments, inner, d)], CUT, min(r, CUT)
        across = arguments["norm"] != "none"
    rest = _innermost_first(dims)
    axes = tile + merged(rest) if across else merged(tile + rest)
    axes = axes or [Axis(1, dict.fromkeys(inner, 0))]
    check_count(len(axes), shape)
    return Rows(axes, inner, d, r, arguments["rotation"] == "half", across)


def _cut(arguments: Mapping[str, Any], inner: dict[str, Int], d: int) -> Axis:
    """The pieces of a row as an axis of their own."""
    strides: dict[str, Int] = {}
    for name, stride in inner.items():
        columns = arguments[name].shape[-1] if name in ("cos", "sin") else d
        strides[name] = stride * (columns * CUT // d)
    return Axis(d // CUT, strides)


def _innermost_first(dims: list[Axis]) -> list[Axis]:
    """By x's strides, where it is known that one is less; otherwise as they are, the last dim first."""

    def compare(a: Axis, b: Axis) -> int:
        left, right = a.strides["x"], b.strides["x"]
        return -1 if statically_known_true(left < right) else int(statically_known_true(right < left))

    result = dims[::-1]
    result.sort(key=functools.cmp_to_key(compare))
    return result


def _ordered_strides(shape: tuple[Int, ...], order: list[int] | None) -> list[Int]:
    if order is None:
        return contiguous_strides(shape)
    strides = contiguous_strides(tuple(shape[dim] for dim in order))
    return [strides[list(order).index(dim)] for dim in range(len(shape))]


def outer_dims(arguments: Mapping[str, Any]) -> Unsupported | None:
    """Why the row dims do not fit, if so; `plan` decides for other output layouts than `order`'s."""
    try:
        see(arguments)
    except Unsupported as reason:
        return reason
    return None
