"""Plain torch meaning of dkfuse::norm_rope: the CPU implementation, and what the kernel is tested against.

    n   = norm(x)                                over the last dim, or over `across` and the last dim
    a   = n*(weight_offset + weight) + bias
    out0 = c0*a0 - s0*a1                         for the pairs (a0, a1) of the first r columns, r from the tables
    out1 = c1*a1 + s1*a0
    out = a                                      for the other columns

With norm_last out = norm(rotate(x))*(weight_offset + weight) + bias. The rotation is computed in fp64 where a table is
fp64, else in `compute`; a norm always in `compute`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .reference import _rounded, affine, normalize
from .rope_support import rotated_columns
from .rounding import Rounding


def norm_rope(arguments: Mapping[str, Any], compute: torch.dtype = torch.float32) -> Tensor:
    """The result in `compute` or fp64, before it is rounded to out_dtype; dims in x's order, memory in any."""
    x, roundings = arguments["x"], arguments["roundings"]
    rotates, last = arguments["rotation"] != "none", arguments["norm_last"]
    a = x.to(compute)
    if rotates and last:
        a = _rounded(_rotated(a, arguments, roundings, x.dtype).to(compute), x.dtype, roundings, Rounding.ROTATED)
    if arguments["norm"] != "none":
        across = arguments["across"]
        dims = (-1,) if across is None else (across % x.dim(), x.dim() - 1)
        a = normalize(a, arguments["norm"], arguments["eps"], dims)
    a = affine(a, arguments["weight"], arguments["bias"], arguments["weight_offset"], roundings, x.dtype)
    return _rotated(a, arguments, roundings, x.dtype) if rotates and not last else a


def _rotated(a: Tensor, arguments: Mapping[str, Any], roundings: int, dtype: torch.dtype) -> Tensor:
    tables = [arguments[name] for name in ("cos", "sin") if arguments[name] is not None]
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tables) else a.dtype
    a, half = a.to(wide), arguments["rotation"] == "half"
    r = rotated_columns(arguments)
    c0, s0, c1, s1 = _factors(*(t.to(wide) for t in tables), tables=arguments["tables"], half=half)
    a0, a1 = _pairs(a[..., :r], half)

    def product(factor: Tensor, value: Tensor) -> Tensor:
        return _rounded(factor * value, dtype, roundings, Rounding.ROTATION)

    out0 = product(c0, a0) - product(s0, a1)
    out1 = product(c1, a1) + product(s1, a0)
    rotated = torch.cat((out0, out1), -1) if half else torch.stack((out0, out1), -1).flatten(-2)
    return rotated if r == a.shape[-1] else torch.cat((rotated, a[..., r:]), -1)


def _pairs(columns: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    if half:
        middle = columns.shape[-1] // 2
        return columns[..., :middle], columns[..., middle:]
    return columns[..., ::2], columns[..., 1::2]


def _factors(cos: Tensor, sin: Tensor | None = None, *, tables: str, half: bool) -> tuple[Tensor, ...]:
    """c0, s0, c1, s1 of the r/2 pairs."""
    if tables == "matrix":
        return cos[..., 0::4], -cos[..., 1::4], cos[..., 3::4], cos[..., 2::4]
    if sin is None:
        cos, sin = cos[..., 0::2], cos[..., 1::2]
    if tables == "full":
        (c0, c1), (s0, s1) = _pairs(cos, half), _pairs(sin, half)
        return c0, s0, c1, s1
    return cos, sin, cos, sin
