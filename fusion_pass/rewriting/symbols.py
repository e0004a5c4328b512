"""Symbolic sizes as graph nodes: a SymInt that a pass computed becomes `sym_size`, `sym_stride` and arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

aten = torch.ops.aten


class UnknownSymbol(Exception):
    """No size or stride of the tensors at hand gives a symbol."""


def arguments(graph: fx.Graph, value: Any, tensors: Iterable[fx.Node]) -> Any:
    """`value` with every SymInt in it replaced by a node; new nodes go to the graph's insertion point."""
    tensors = list(tensors)
    if isinstance(value, (tuple, list)):
        return type(value)(arguments(graph, v, tensors) for v in value)
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return int(expression) if expression.is_Integer else node_for(graph, expression, tensors)
    return value


def node_for(graph: fx.Graph, expression: sympy.Expr, tensors: list[fx.Node]) -> fx.Node:
    """A node that computes `expression` from the sizes and strides of `tensors`."""
    for node in tensors:
        val = node.meta["val"]
        for op, sizes in ((aten.sym_size.int, val.shape), (aten.sym_stride.int, val.stride())):
            for dim, size in enumerate(sizes):
                if isinstance(size, torch.SymInt) and size.node.expr == expression:
                    found = graph.call_function(op, (node, dim))
                    found.meta["val"] = size
                    return found
    if expression.is_Mul or expression.is_Add:
        combine = operator.mul if expression.is_Mul else operator.add
        total: Any = None
        for part in expression.args:
            term = int(part) if part.is_Integer else node_for(graph, part, tensors)
            total = term if total is None else _binary(graph, combine, total, term)
        return total
    if expression.is_Pow and expression.exp.is_Integer and expression.exp > 1:  # of a square image's sides
        base = node_for(graph, expression.base, tensors)
        total = base
        for _ in range(int(expression.exp) - 1):
            total = _binary(graph, operator.mul, total, base)
        return total
    if isinstance(expression, FloorDiv):
        above, below = (int(p) if p.is_Integer else node_for(graph, p, tensors) for p in expression.args)
        return _binary(graph, operator.floordiv, above, below)
    for node in graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt) and val.node.expr == expression:
            return node
    raise UnknownSymbol(str(expression))


def _binary(graph: fx.Graph, op: Any, a: Any, b: Any) -> fx.Node:
    node = graph.call_function(op, (a, b))
    values = [x.meta["val"] if isinstance(x, fx.Node) else x for x in (a, b)]
    node.meta["val"] = op(*values)
    return node
