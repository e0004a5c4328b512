"""``tanh(where(mask, row0, row1))`` of rows that are picked per token, as ``where(mask, tanh(row0), tanh(row1))``.

A function of picked rows is one of each row first: of two rows of a sample, and not of one for every token. The same
values, bit for bit, and the pick is what a kernel reads then (`matching.picks`). Where both rows are views of one
tensor, the function is taken of that, so that they stay neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..matching.gain import is_view
from .replace import copy_origin

aten = torch.ops.aten
FUNCTIONS = (aten.tanh.default, aten.sigmoid.default)


def functions_of_rows(graph: fx.Graph) -> None:
    """Rewrite every such function in `graph`."""
    for function in FUNCTIONS:
        for node in list(graph.find_nodes(op="call_function", target=function)):
            picked = node.args[0]
            if picked.target is aten.where.self and len(picked.users) == 1 and _picks_rows(picked):
                _rewrite(graph, node, picked)


def _picks_rows(picked: fx.Node) -> bool:
    """Whether one mask for all columns picks of two tensors that are smaller than what is picked, and of its dtype."""
    mask, *rows = picked.args
    if not all(isinstance(node, fx.Node) for node in picked.args):
        return False
    value, picks = picked.meta["val"], mask.meta["val"]  # type: ignore[union-attr]
    if not all(isinstance(size, int) for size in (*value.shape, *picks.shape)) or picks.dim() == 0:
        return False
    small = all(2 * _held(row) <= value.numel() and row.meta["val"].dtype == value.dtype for row in rows)  # type: ignore[arg-type]
    return picks.shape[-1] == 1 and value.shape[-1] > 1 and small


def _held(node: fx.Node) -> int:
    """Elements of what `node` was expanded from."""
    while node.target is aten.expand.default:
        node = node.args[0]  # type: ignore[assignment]
    return node.meta["val"].numel()


def _rewrite(graph: fx.Graph, node: fx.Node, picked: fx.Node) -> None:
    mask, first, second = picked.args
    above = _views(first)
    base = next((view for view in _views(second) if view in above), None)
    if base is not None and base.meta["val"].numel() > picked.meta["val"].numel():
        base = None
    made: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(picked):
        rows = [_taken(graph, node, row, base, made) for row in (first, second)]
        again = _call(graph, picked, aten.where.self, (mask, *rows))
    node.replace_all_uses_with(again)
    graph.erase_node(node)
    graph.erase_node(picked)


def _views(node: Any) -> list[fx.Node]:
    """`node` and what it is a view of."""
    found = [node]
    while is_view(found[-1]):
        found.append(found[-1].args[0])
    return found


def _taken(graph: fx.Graph, node: fx.Node, row: Any, base: fx.Node | None, made: dict[fx.Node, fx.Node]) -> fx.Node:
    """The function `node` of `row`, which is a view of `base`, as a view of that of `base`."""
    if row in made:
        return made[row]
    if base is None or row is base:
        made[row] = _call(graph, node, node.target, (row,))
    else:
        inner = _taken(graph, node, row.args[0], base, made)
        made[row] = _call(graph, row, row.target, (inner, *row.args[1:]), row.kwargs)
    return made[row]


def _call(graph: fx.Graph, origin: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
    made = graph.call_function(target, args, kwargs or {})
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
    made.meta["val"] = target(*values, **(kwargs or {}))
    copy_origin(origin, made)
    return made
