"""The views between the products of several streams and the cat that joins them, on the tensor that all are written to.

    product [B*S, N] -> columns of it -> [B, S, ...] -> permuted          of each stream
    buffer  [B, S_1 + S_2 + .., N] -> the same                            of all together

Whether the second really has the parts of the cat where the first has them is not argued but compared: sizes, strides
and offsets of fake tensors, part by part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import compat
from ..matching.terms import same_shape, same_size
from ..rewriting.strides import RESHAPES, same_layout
from .linear import Linear

aten = torch.ops.aten
TRANSPOSES = (aten.permute.default, aten.transpose.int)
VIEWS = (*RESHAPES, *TRANSPOSES, aten.slice.Tensor)
Put = Callable[..., Any]  # (op, value, *args) -> its result, as a tensor or as a node


class NotThis(Exception):
    """A view that is not understood; says which."""


@dataclass(frozen=True)
class Stream:
    """One part of the cat: a product [B*S, N] and the views from it to the part, in order."""

    product: fx.Node
    linear: Linear
    tiles: str
    chain: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Joint:
    """A cat [.., S, ..] along `dim` of `streams`, of `batch` samples and `lengths` tokens each."""

    cat: fx.Node
    dim: int
    streams: tuple[Stream, ...]
    lengths: tuple[Any, ...]
    batch: int = 0

    @property
    def products(self) -> tuple[fx.Node, ...]:
        return tuple(stream.product for stream in self.streams)

    @property
    def starts(self) -> list[Any]:
        return list(itertools.accumulate(self.lengths, initial=0))[:-1]

    @property
    def tokens(self) -> Any:
        return self.cat.meta["val"].shape[self.dim]

    @property
    def columns(self) -> int:
        return self.streams[0].product.meta["val"].shape[1]


def batch_of(joint: Joint) -> int:
    """Samples of each product's rows."""
    first = next((node for node in joint.streams[0].chain if node.target in RESHAPES), None)
    size = first.meta["val"].shape[0] if first is not None and first.meta["val"].dim() > 2 else 1
    if not isinstance(size, int):
        raise NotThis(f"a batch of {size}: its size must be known")
    for stream, length in zip(joint.streams, joint.lengths, strict=True):
        rows = stream.product.meta["val"].shape[0]
        if not compat.statically_known_true(rows == size * length):
            raise NotThis(f"{rows} rows of a product and {length} tokens of a part are not those of {size} samples")
    return size


def joint_value(joint: Joint) -> torch.Tensor:
    """The joint tensor as the cat's readers will see it; NotThis unless each part is where its product is written."""
    buffer = joint.streams[0].product.meta["val"].new_empty(joint.batch, joint.tokens, joint.columns)
    full = replayed(joint, 0, buffer, joint.tokens, evaluate)
    if not same_shape(full.shape, joint.cat.meta["val"].shape):
        raise NotThis(f"the tokens are not dim {joint.dim} of the cat")
    for i, (start, length) in enumerate(zip(joint.starts, joint.lengths, strict=True)):
        part = replayed(joint, i, buffer.narrow(1, start, length), length, evaluate)
        place = full.narrow(joint.dim, start, length)
        if not same_layout(part, place) or not same_size(part.storage_offset(), place.storage_offset()):
            raise NotThis("the parts of the cat are different views of their products")
    return full


def replayed(joint: Joint, index: int, value: Any, length: Any, put: Put) -> Any:
    """The views of a stream's chain, of rows [B, length, N] instead of its product [B*S, N]."""
    stream, split = joint.streams[index], False
    own, at = joint.lengths[index], 1
    for node in stream.chain:
        shape = node.meta["val"].shape
        if node.target in RESHAPES:
            if at != 1 or len(shape) < 3 or not (same_size(shape[0], joint.batch) and same_size(shape[1], own)):
                raise NotThis(f"{node.name} gives rows the shape {list(shape)}, which joins them with other dims")
            split, value = True, put(aten.reshape.default, value, [joint.batch, length, *shape[2:]])
        elif node.target is aten.slice.Tensor and node.args[1] in (-1, node.meta["val"].dim() - 1):
            dim, *limits = node.args[1:]
            value = put(aten.slice.Tensor, value, dim if split else 2, *limits)
        elif node.target in TRANSPOSES and split:
            order = _order(node)
            at, value = order.index(at), put(aten.permute.default, value, order)
        else:
            raise NotThis(f"{node.name} ({node.target}) lies between a product and the cat")
    if not split:
        raise NotThis("the cat joins rows of matrices")
    return value


def _order(node: fx.Node) -> list[int]:
    count = node.meta["val"].dim()
    if node.target is aten.permute.default:
        return [d % count for d in node.args[1]]  # type: ignore[union-attr,operator]
    order = list(range(count))
    a, b = (d % count for d in node.args[1:])  # type: ignore[operator]
    order[a], order[b] = order[b], order[a]
    return order


def evaluate(target: Any, value: torch.Tensor, *args: Any) -> torch.Tensor:
    if target is aten.reshape.default:
        try:
            return value.view(*args)
        except (RuntimeError, ValueError) as error:  # fake tensors raise the latter
            raise NotThis(f"a part of {list(value.shape)} cannot be seen as {list(args[0])}") from error
    return target(value, *args)


def first_reads(joint: Joint, index: int) -> list[tuple[fx.Node, tuple[fx.Node, ...]]]:
    """Who gives a product's rows the shape [B, S, ...], and the cuts of columns before; NotThis if others read it."""
    found: list[tuple[fx.Node, tuple[fx.Node, ...]]] = []
    pending: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(user, ()) for user in joint.streams[index].product.users]
    own = joint.lengths[index]
    while pending:
        user, before = pending.pop()
        value = user.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue  # a symbolic size
        if user.target is aten.slice.Tensor and user.args[1] in (1, -1):
            pending += [(u, (*before, user)) for u in user.users]
            continue
        fits = user.target in RESHAPES and value.dim() > 2
        if not fits or not (same_size(value.shape[0], joint.batch) and same_size(value.shape[1], own)):
            raise NotThis(f"{user.name} ({user.target}) reads rows of all samples as one matrix")
        found.append((user, before))
    return found


def reread(joint: Joint) -> list[tuple[fx.Node, torch.Tensor]]:
    """The first reads of every product with the values that they will have: not dense between samples."""
    buffer = joint.streams[0].product.meta["val"].new_empty(joint.batch, joint.tokens, joint.columns)
    found = []
    for i, (start, length) in enumerate(zip(joint.starts, joint.lengths, strict=True)):
        part = buffer.narrow(1, start, length)
        found += [(node, read_again(node, cuts, part, evaluate)) for node, cuts in first_reads(joint, i)]
    return found


def read_again(node: fx.Node, cuts: tuple[fx.Node, ...], part: Any, put: Put) -> Any:
    """What `node` and the `cuts` before it make of a product's rows, made of those of `part` [B, S, N]."""
    for cut in cuts:
        part = put(aten.slice.Tensor, part, 2, *cut.args[2:])
    return put(aten.reshape.default, part, list(node.meta["val"].shape))
