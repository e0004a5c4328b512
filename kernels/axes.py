"""Row dims of a call: collapsed jointly over all its tensors, innermost first, as few as the strides allow.

A kernel addresses a row by at most three indices. Dims are merged where every tensor's strides permit it (0 included,
so a broadcast dim merges with its neighbour) and dims of size 1 vanish. Sizes and strides may be symbols; nothing here
guards on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .unsupported import Unsupported

MAX_AXES = 3
Int: TypeAlias = "int | torch.SymInt"


@dataclass
class Axis:
    """One row dim: its size and every tensor's stride along it, in elements (int 0 where the tensor is broadcast)."""

    size: Int
    strides: dict[str, Int]


def stride_of(tensor: Any, dim: int, rank: int) -> Int:
    """Stride of right-aligned dim `dim` of a `rank`-dim space; 0 where the tensor is broadcast along it."""
    own = dim - (rank - tensor.dim())
    if own < 0 or statically_known_true(tensor.shape[own] == 1) or statically_known_true(tensor.stride(own) == 0):
        return 0
    return tensor.stride(own)


def inner_stride(tensor: Any) -> Int | None:
    """Stride of the last dim in elements; None where one scalar serves the whole row."""
    if tensor.dim() == 0:
        return None
    stride = stride_of(tensor, 0, 1) if tensor.dim() == 1 else stride_of(tensor, tensor.dim() - 1, tensor.dim())
    return None if isinstance(stride, int) and stride == 0 else stride


def _merges(outer: Axis, inner: Axis) -> bool:
    strides = inner.strides.items()
    return all(statically_known_true(outer.strides[name] == stride * inner.size) for name, stride in strides)


def contiguous_strides(shape: tuple[Int, ...]) -> list[Int]:
    """Strides of a contiguous tensor of this shape."""
    strides: list[Int] = []
    step: Int = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step = step * size
    return strides


def collapse(
    tensors: Mapping[str, Any],
    shape: tuple[Int, ...],
    extra: Mapping[str, list[Int]] | None = None,
) -> list[Axis]:
    """Row dims of the call, innermost first; at least one. Raises Unsupported("outer_dims") beyond three.

    `tensors` are the operands and outputs by name, `shape` is x's, `extra` are strides for x's shape of tensors that
    do not exist yet.
    """
    rank = len(shape)
    dims: list[Axis] = []
    for dim in range(rank - 2, -1, -1):
        axis = Axis(shape[dim], {name: stride_of(tensor, dim, rank) for name, tensor in tensors.items()})
        axis.strides.update((name, strides[dim]) for name, strides in (extra or {}).items())
        dims.append(axis)
    axes = merged(dims) or [Axis(1, dict.fromkeys((*tensors, *(extra or {})), 0))]
    check_count(len(axes), shape)
    return axes


def merged(dims: Iterable[Axis]) -> list[Axis]:
    """`dims`, innermost first, without those of size 1, each merged into the one before where all strides allow."""
    axes: list[Axis] = []
    for axis in dims:
        if statically_known_true(axis.size == 1):
            continue
        if axes and _merges(axis, axes[-1]):
            axes[-1] = Axis(axes[-1].size * axis.size, axes[-1].strides)
        else:
            axes.append(axis)
    return axes


def check_count(axes: int, shape: tuple[Int, ...]) -> None:
    """Raise Unsupported("outer_dims") beyond three."""
    if axes > MAX_AXES:
        raise Unsupported(
            "outer_dims",
            f"the row dims of {tuple(shape)} collapse to {axes} with these strides and a kernel takes {MAX_AXES}; "
            "make x or the parameter contiguous.",
        )
