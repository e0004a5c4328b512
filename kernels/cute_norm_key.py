"""How the CuTe norm kernel sees a call of norm_modulate or residual_norm_modulate; imports no GPU library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .axes import collapse
from .cute_key import Operand, Seen, Split, alignment, byte_strides, moves, seen, split

INPUTS = ("x", "residual", "gate", "weight", "bias", "scale", "shift")
OUTPUTS = ("sum", "out")
ROWS = ("x", "residual", "sum", "out")  # their dtypes decide how many elements a load takes


@dataclass(frozen=True)
class NormKey:
    """What a kernel is compiled for. operands: the tensors of the call in the order of INPUTS, OUTPUTS."""

    operands: tuple[Operand, ...]
    split: Split
    axes: int
    center: bool
    weight_offset: float
    scale_offset: float

    def has(self, name: str) -> bool:
        return any(operand.name == name for operand in self.operands)

    def operand(self, name: str) -> Operand:
        return next(operand for operand in self.operands if operand.name == name)

    def example(self, wide: Any, narrow: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """(addresses, strides, sizes) of the compiler's types, any values; fillers included."""
        count = sum(sum(operand.moves) for operand in self.operands)
        return (wide(0),) * len(self.operands), (wide(0),) * (count + 1), (narrow(1),) * self.axes

    def __str__(self) -> str:
        """The kernel's name in a profile."""
        names = "_".join(operand.name for operand in self.operands)
        return f"{'layer' if self.center else 'rms'}_{self.split.width}_{names}"


def see_norm(arguments: Mapping[str, Any], outputs: Mapping[str, Any]) -> Seen:
    """The key and integers of a call; raises Unsupported("outer_dims") beyond three row axes."""
    tensors = {name: arguments[name] for name in INPUTS if arguments.get(name) is not None}
    tensors.update((name, outputs[name]) for name in OUTPUTS if outputs.get(name) is not None)
    shape = tuple(arguments["x"].shape)
    axes = collapse(tensors, shape)
    operands, strides = [], []
    for name, tensor in tensors.items():
        align = alignment(tensor, [axis.strides[name] for axis in axes])
        operands.append(Operand(name, tensor.dtype, moves(name, axes), align))
        strides += byte_strides(name, tensor.dtype.itemsize, axes)
    key = NormKey(
        tuple(operands),
        split(shape[-1], [tensors[name].dtype for name in ROWS if name in tensors]),
        len(axes),
        arguments["norm"] == "layer",
        float(arguments.get("weight_offset", 0.0)) if "weight" in tensors else 0.0,
        float(arguments.get("scale_offset", 1.0)) if "scale" in tensors else 0.0,
    )
    return seen(key, strides, axes)
