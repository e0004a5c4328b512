"""Rows that are repeated for tokens, and what is computed of them row by row: the same of the rows, repeated last.

    f(repeat(rows))  =  repeat(f(rows))        rows [B, F, 1, 1, ...], tokens [B, F, H, W, ...] or [B, F * H * W, ...]

Models with a timestep for each frame (Cosmos, AnyFlow, SkyReels) repeat its embedding for the tokens of the frame, and
add a table to it or split it into shifts, scales and gates afterwards. Kernels read one row for each frame (`frames`)
where the repeat is the last that happens. f: pointwise ops, slices, splits and reshapes of the features of a token; no
value changes. Linears are `seams.repeated`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..matching.gain import is_elementwise
from ..matching.recombine import argument
from ..matching.terms import getitem_source, same_shape, same_size
from . import symbols
from .replace import copy_origin, emit, emit_like
from .strides import RESHAPES, is_returned, propagate

aten = torch.ops.aten
COPIES = (*RESHAPES, aten.clone.default, aten.alias.default)
SHAPES = (*COPIES, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
Sizes = tuple[Any, ...]


@dataclass(frozen=True)
class Repeat:
    """How a value repeats rows: rows and tokens are the leading sizes before and after, of as many dims.

    lead: the leading sizes of the value itself, which number the tokens in any shape; source: the node that repeats;
    direct: the value is that, or a view of it.
    """

    rows: Sizes
    tokens: Sizes
    lead: Sizes
    source: fx.Node
    direct: bool = True

    def alike(self, other: Repeat) -> bool:
        return all(map(same_shape, (self.rows, self.tokens, self.lead), (other.rows, other.tokens, other.lead)))


class Repeats:
    """The values of a graph that repeat rows, of the nodes that were `read`, in order."""

    def __init__(self) -> None:
        self.found: dict[fx.Node, Repeat] = {}
        self._rows: dict[fx.Node, fx.Node] = {}

    def read(self, node: fx.Node) -> None:
        if (shape := _shape(node)) is None or (known := self._repeat(node, shape)) is None:
            return
        if all(isinstance(size, int) for size in shape[len(known.lead) :]):
            self.found[node] = known

    def row(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """What `node`, one of `found`, repeats: ``[*rows, *features]``, computed at the graph's insertion point."""
        if node not in self._rows:
            self._rows[node] = self._row(graph, node)
        return self._rows[node]

    def last(self, graph: fx.Graph, node: fx.Node, row: fx.Node) -> fx.Node:
        """`row` repeated as `node` does, in the tokens' own dims."""
        known = self.found[node]
        features = row.meta["val"].shape[len(known.rows) :]
        sizes = symbols.arguments(graph, [*known.tokens, *features], [known.source])
        many = emit(graph, aten.expand.default, row, sizes)
        copy_origin(node, many)
        self.found[many] = replace(known, lead=known.tokens, source=many, direct=True)
        return many

    def _repeat(self, node: fx.Node, shape: Sizes) -> Repeat | None:
        if node.target in (aten.expand.default, aten.repeat.default):
            return _repeated(node, shape)
        source, _ = getitem_source(node) or (node, 0)
        viewed = source.args[0] if source.args else None
        known = self.found.get(viewed) if isinstance(viewed, fx.Node) else None
        if known is not None and node.target in SHAPES:
            lead = leading(shape, math.prod(known.tokens))
            return replace(known, lead=lead) if lead else None
        if known is not None and _is_of_features(node, len(known.lead)):
            return replace(known, direct=False)
        return self._pointwise(node, shape) if is_elementwise(node) else None

    def _pointwise(self, node: fx.Node, shape: Sizes) -> Repeat | None:
        """Of repeated rows that lie alike, and of what is the same for every token."""
        inputs = [a for a in node.args if isinstance(a, fx.Node)]
        known = [self.found[i] for i in inputs if i in self.found]
        if not known or set(inputs) != set(node.all_input_nodes) or not all(map(known[0].alike, known)):
            return None
        lead, features = known[0].lead, len(shape) - len(known[0].lead)
        for i in inputs:
            own = _shape(i)
            if own is None or (i in self.found and len(own) != len(shape)):
                return None
            if i not in self.found and any(not same_size(size, 1) for size in own[: max(0, len(own) - features)]):
                return None
        return replace(known[0], direct=False) if same_shape(shape[: len(lead)], lead) else None

    def _row(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        known = self.found[node]
        features = list(node.meta["val"].shape[len(known.lead) :])
        if node.target in (aten.expand.default, aten.repeat.default):
            return node.args[0]  # type: ignore[return-value]
        if node.target in SHAPES:
            row = self.row(graph, node.args[0])  # type: ignore[arg-type]
            sizes = [*known.rows, *features]
            return row if same_shape(row.meta["val"].shape, sizes) else reshaped(graph, row, sizes)
        source, index = getitem_source(node) or (node, 0)
        if is_elementwise(node):
            args = fx.map_arg(node.args, lambda i: self._operand(graph, i, len(features)))
            return emit_like(graph, node, *args)
        row = self.row(graph, source.args[0])  # type: ignore[arg-type]
        before = len(self.found[source.args[0]].lead)  # type: ignore[index]
        dim = _dim(source) - before + len(known.rows)
        if source.target is aten.unbind.int:
            return emit(graph, aten.select.int, row, dim, index)
        if source.target in SPLITS:
            sizes = [part.shape[_dim(source)] for part in source.meta["val"]]
            return emit(graph, aten.slice.Tensor, row, dim, sum(sizes[:index]), sum(sizes[: index + 1]))
        return emit(graph, source.target, row, dim, *source.args[2:])

    def _operand(self, graph: fx.Graph, operand: fx.Node, features: int) -> fx.Node:
        if operand in self.found:
            return self.row(graph, operand)
        shape = operand.meta["val"].shape
        own = shape[max(0, len(shape) - features) :]
        return operand if len(own) == len(shape) else reshaped(graph, operand, own)


def repeat_last(graph: fx.Graph) -> None:
    """Give pointwise ops of tokens the rows that they read as `repeat(f(rows))`."""
    repeats, changed = Repeats(), False
    for node in graph.nodes:
        repeats.read(node)
    for node, known in list(repeats.found.items()):
        users = [u for u in node.users if u not in repeats.found and is_elementwise(u)]
        if known.direct or not users:
            continue
        with graph.inserting_before(node):
            result = repeats.last(graph, node, repeats.row(graph, node))
            if not same_shape(known.lead, known.tokens):
                result = reshaped(graph, result, node.meta["val"].shape)
                copy_origin(node, result)
        for user in users:
            user.replace_input_with(node, result)
        changed = True
    if changed:
        graph.eliminate_dead_code()


def drop_repeats_of_one(graph: fx.Graph) -> None:
    """Leave out ``repeat_interleave(1, dim)``, which copies everything: code for grouped heads has it where none are.

    It is a copy to contiguous memory of what is expanded to the sizes that it has; attention reads any order of heads.
    """
    for copy in graph.find_nodes(op="call_function", target=aten.clone.default):
        expand = copy.args[0]
        if expand.target is not aten.expand.default or is_returned(copy):
            continue
        source = expand.args[0]
        if same_shape(source.meta["val"].shape, expand.meta["val"].shape):
            users = list(copy.users)
            copy.replace_all_uses_with(source)
            graph.erase_node(copy)
            propagate(source, users)


def reshaped(graph: fx.Graph, node: fx.Node, sizes: Sequence[Any]) -> fx.Node:
    return emit(graph, aten.reshape.default, node, symbols.arguments(graph, list(sizes), [node]))


def leading(shape: Sizes, count: int) -> Sizes | None:
    """The leading sizes of `shape` that number `count` tokens, in any dims."""
    return next((shape[:k] for k in range(1, len(shape)) if same_size(math.prod(shape[:k]), count)), None)


def _repeated(node: fx.Node, shape: Sizes) -> Repeat | None:
    """``expand`` or ``repeat`` of dims of size 1, with features behind them that it leaves."""
    before = _shape(node.args[0])
    if before is None or len(before) != len(shape):
        return None
    grown = [d for d, (one, many) in enumerate(zip(before, shape, strict=True)) if not same_size(one, many)]
    if not grown or grown[-1] + 1 == len(shape) or any(not same_size(before[d], 1) for d in grown):
        return None
    outer = grown[-1] + 1
    return Repeat(before[:outer], shape[:outer], shape[:outer], node)


def _shape(node: Any) -> Sizes | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _dim(node: fx.Node) -> int:
    """The dim of a slice, a select, a split or an unbind."""
    at = 2 if node.target in SPLITS else 1
    return argument(node, at, "dim", 0) % node.args[0].meta["val"].dim()  # type: ignore[union-attr, no-any-return]


def _is_of_features(node: fx.Node, lead: int) -> bool:
    """Whether `node` cuts dims behind the first `lead`."""
    if getitem_source(node) is not None:
        producer = node.args[0]
        return producer.target in (*SPLITS, aten.unbind.int) and _dim(producer) >= lead  # type: ignore[union-attr, arg-type]
    return node.target in (aten.slice.Tensor, aten.select.int) and _dim(node) >= lead
