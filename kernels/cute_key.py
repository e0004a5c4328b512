"""What a CuTe kernel is compiled for, from the layouts of a call; imports no GPU library.

A kernel is compiled per dtypes, operands that are there, row axes that each of them moves along, width and constants,
not per number of rows or stride: those are run-time integers. A pointer or stride that is not a multiple of 16 bytes
gives a key of its own, with narrower loads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .axes import Axis, Int

WIDEST = 16  # bytes of the widest load
MOST_THREADS = 1024
WARP = 32


@dataclass(frozen=True)
class Operand:
    """A tensor of a call. moves: does its address depend on the index of this row axis, innermost axis first.

    align: bytes that all its rows start at a multiple of, at most 16. heads: how it moves along the heads of a row:
    "dense" (the row is one piece of memory), "shared" (the same columns for all) or "strided".
    """

    name: str
    dtype: torch.dtype
    moves: tuple[bool, ...]
    align: int
    heads: str = "dense"
    inner: int = 1  # elements between columns

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize


@dataclass(frozen=True)
class Split:
    """A row of `width` elements over `threads` threads, `pieces` vectors of `vector` elements for each."""

    width: int
    vector: int
    threads: int

    @property
    def pieces(self) -> int:
        return -(-self.width // (self.vector * self.threads))

    @property
    def partial(self) -> bool:
        """Do some threads have one piece less?"""
        return self.width % (self.vector * self.threads) != 0


@dataclass(frozen=True)
class Seen:
    """A key, and the run-time integers of a call: strides in bytes, sizes of all row axes but the outermost.

    Each list ends with a filler, as the compiler takes no empty ones.
    """

    key: Any  # a NormKey or RopeKey
    strides: list[Int]
    sizes: list[Int]
    rows: Int


def seen(key: Any, strides: Sequence[Int], axes: Sequence[Axis]) -> Seen:
    """What was seen of a call whose rows lie along `axes`, innermost first."""
    rows: Int = 1
    for axis in axes:
        rows = rows * axis.size
    return Seen(key, [*strides, 0], [*(axis.size for axis in axes[:-1]), 1], rows)


def split(width: int, dtypes: Iterable[torch.dtype]) -> Split:
    """Vectors of 16 bytes of the widest of `dtypes`; about 24 elements per thread, with as few idle lanes as can be."""
    vector = WIDEST // max(dtype.itemsize for dtype in dtypes)
    vectors = -(-width // vector)
    wanted = 24 // vector
    options = []
    for pieces in range(1, 64 // vector + 1):
        count = WARP * -(-vectors // (WARP * pieces))
        idle = count * pieces / vectors - 1
        options.append((round(idle, 1), abs(pieces - wanted), -pieces, count))
    threads = min(option for option in options if option[-1] <= MOST_THREADS)[-1]
    return Split(width, vector, threads)


def alignment(tensor: Any, steps: Sequence[Int]) -> int:
    """Bytes, at most 16, that the pointer and `steps` (strides in elements) are multiples of; symbols count as aligned.

    A tensor-like without memory counts by its storage offset.
    """
    size = tensor.dtype.itemsize
    offset: Int = address_of(tensor)
    if offset == 0 and hasattr(tensor, "storage_offset"):
        offset = tensor.storage_offset() * size
    known = [value for value in (offset, *(step * size for step in steps)) if isinstance(value, int)]
    return math.gcd(WIDEST, *known)


def address_of(tensor: Any) -> int:
    """The data pointer; 0 for fake and meta tensors."""
    if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
        return 0
    from torch._subclasses.fake_tensor import FakeTensor

    return 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()


def moves(name: str, axes: Sequence[Axis]) -> tuple[bool, ...]:
    """Which axes the tensor moves along."""
    return tuple(not (isinstance(axis.strides[name], int) and axis.strides[name] == 0) for axis in axes)


def byte_strides(name: str, size: int, axes: Sequence[Axis]) -> list[Int]:
    """Strides in bytes along the axes that the tensor moves along, innermost first."""
    steps = (axis.strides[name] for axis in axes)
    return [step * size for step in steps if not (isinstance(step, int) and step == 0)]


def known_misaligned(tensor: Any, steps: Sequence[Int]) -> Int | None:
    """The first stride, in elements, that is known not to be a multiple of 16 bytes."""
    per = WIDEST // tensor.dtype.itemsize
    return next((step for step in steps if statically_known_true(step % per != 0)), None)


def layout_signature(names: Sequence[str], tensors: Mapping[str, Any]) -> list[Any]:
    """What a launch depends on in `tensors`, cheap to make: shapes, strides, dtypes, and the pointers' low bits."""
    signature: list[Any] = []
    for name in names:
        tensor = tensors.get(name)
        if tensor is None:
            signature.append(None)
        else:
            signature += (tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % WIDEST)
    return signature
