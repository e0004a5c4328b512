"""How the CuTe kernel sees a call of norm_rope; imports no GPU library.

A row is all heads of one token, `heads * d` elements; without a norm across heads it is one head as wide as x's last
dim. Every tensor has a stride between heads of its own: weights `[d]` and tables are shared by the heads, an output
`[B, H, S, d]` has its heads apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .axes import Axis, check_count, contiguous_strides, merged, stride_of
from .cute_key import Operand, Seen, Split, alignment, byte_strides, moves, seen, split

NAMES = ("x", "weight", "bias", "cos", "sin")
ROWS = ("x", "out")  # their dtypes decide how many elements a load takes


@dataclass(frozen=True)
class RopeKey:
    """What a kernel is compiled for. operands: the tensors of the call in the order of NAMES, and "out".

    tables: "half" has a value per pair, "full" one per column.
    """

    operands: tuple[Operand, ...]
    split: Split
    axes: int
    d: int
    heads: int
    center: bool
    weight_offset: float
    tables: str

    def has(self, name: str) -> bool:
        return any(operand.name == name for operand in self.operands)

    def operand(self, name: str) -> Operand:
        return next(operand for operand in self.operands if operand.name == name)

    def example(self, wide: Any, narrow: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """(addresses, strides, sizes) of the compiler's types, any values; fillers included."""
        count = sum(stride_count(operand) for operand in self.operands)
        return (wide(0),) * len(self.operands), (wide(0),) * (count + 1), (narrow(1),) * self.axes

    def __str__(self) -> str:
        """The kernel's name in a profile."""
        names = "_".join(operand.name for operand in self.operands)
        return f"{'layer' if self.center else 'rms'}_{self.heads}x{self.d}_{self.tables}_{names}"


def stride_count(operand: Operand) -> int:
    """Run-time strides of an operand: those of the axes it moves along, then that of its heads."""
    return sum(operand.moves) + (operand.heads == "strided")


def row_axes(arguments: Mapping[str, Any], out: Any | None = None) -> tuple[list[Axis], Axis]:
    """(row axes, innermost first, the axis of the heads); without `out` its result is laid out by `order`.

    Raises Unsupported("outer_dims") beyond three row axes.
    """
    x, across = arguments["x"], arguments.get("across")
    rank = x.dim()
    tensors = {name: arguments[name] for name in NAMES if arguments.get(name) is not None}
    if out is not None:
        tensors["out"] = out
    dims = [Axis(x.shape[i], {name: stride_of(t, i, rank) for name, t in tensors.items()}) for i in range(rank - 1)]
    if out is None:
        order = list(arguments.get("order") or range(rank))
        dense = contiguous_strides(tuple(x.shape[dim] for dim in order))
        for i, axis in enumerate(dims):
            axis.strides["out"] = dense[order.index(i)]
    names = (*tensors, "out") if out is None else tuple(tensors)
    heads = Axis(1, dict.fromkeys(names, 0)) if across is None else dims.pop(across % rank)
    axes = merged(dims[::-1]) or [Axis(1, dict.fromkeys(names, 0))]
    check_count(len(axes), tuple(x.shape))
    return axes, heads


def see_rope(arguments: Mapping[str, Any], outputs: Mapping[str, Any]) -> Seen:
    """The key and integers of a call."""
    axes, heads = row_axes(arguments, outputs["out"])
    tensors = {name: arguments[name] for name in NAMES if arguments.get(name) is not None}
    tensors["out"] = outputs["out"]
    d, count = arguments["x"].shape[-1], heads.size
    operands, strides = [], []
    for name, tensor in tensors.items():
        head, size, width = heads.strides[name], tensor.dtype.itemsize, tensor.shape[-1]
        inner = 1 if name in ("x", "out") else stride_of(tensor, tensor.dim() - 1, tensor.dim())
        known = isinstance(head, int)
        kind = "shared" if known and head == 0 else "dense" if known and head == width * inner else "strided"
        if count == 1:
            kind = "dense"
        steps = [axis.strides[name] for axis in axes] + ([head] if kind == "strided" else [])
        align = alignment(tensor, steps) if inner == 1 else size
        operands.append(Operand(name, tensor.dtype, moves(name, axes), align, kind, inner))
        strides += byte_strides(name, size, axes) + ([head * size] if kind == "strided" else [])
    pieces = split(count * d, [tensors[name].dtype for name in ROWS])
    offset = float(arguments.get("weight_offset", 0.0)) if "weight" in tensors else 0.0
    layer = arguments["norm"] == "layer"
    key = RopeKey(tuple(operands), pieces, len(axes), d, count, layer, offset, arguments["tables"])
    return seen(key, strides, axes)
