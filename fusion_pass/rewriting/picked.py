"""Rows that are picked per token, ``where(mask, row0, row1)``, as kernels read them (`matching.picks`).

    tanh(where(mask, a, b))          where(mask, tanh(a), tanh(b))           `functions_of_rows`
    where(mask, f(a), f(b))          p = f(cat([a, b]))                      `side_by_side`
                                     where(mask, p[:n], p[n:])

A function of picked rows is one of each row first: of two rows of a sample, and not of one for every token. Where both
rows are views of one tensor, it is taken of that, so that they stay neighbours. Kernels read the two rows as one
tensor. Rows of two projections (Z-Image and FIBO 2 give noisy and clean tokens modulations of their own) are brought
together where they were made, with what is computed of both in the same way behind: one small copy for all of a
block's. That is kept if sites are gained. No value changes by a bit.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..matching.gain import is_elementwise, is_view
from ..matching.picks import unexpanded
from ..matching.terms import broadcast_shape, same_shape, same_size
from .replace import emit, emit_like

aten = torch.ops.aten
FUNCTIONS = (aten.tanh.default, aten.sigmoid.default)
ALONG = {  # views that rows pass through, and which argument behind the first says along which dim
    aten.unsqueeze.default: 0, aten.squeeze.dim: 0, aten.slice.Tensor: 0, aten.split.Tensor: 1,
    aten.split_with_sizes.default: 1,
}  # fmt: skip
PARTS = 32  # of conditioning in one tensor: gates, scales and shifts, of two rows each
Picks = list[tuple[fx.Node, fx.Node]]  # as they were, and as they are
Pair = tuple[fx.Node, fx.Node]


# -- functions of what was picked --------------------------------------------------------------------------------------


def functions_of_rows(graph: fx.Graph) -> None:
    """Rewrite every such function in `graph`."""
    for function in FUNCTIONS:
        for node in list(graph.find_nodes(op="call_function", target=function)):
            picked = node.args[0]
            if picked.target is aten.where.self and len(picked.users) == 1 and _picks_rows(picked):
                _rewrite(graph, node, picked)


def _rewrite(graph: fx.Graph, node: fx.Node, picked: fx.Node) -> None:
    mask, *rows = picked.args
    common = next((view for view in _views(rows[1]) if view in _views(rows[0])), None)
    if common is not None and not _is_small(common, unexpanded(rows[0])):
        common = None
    made: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(picked):
        taken = [_taken(graph, node, row, common or unexpanded(row), made) for row in rows]
        again = emit_like(graph, picked, mask, *taken)
    node.replace_all_uses_with(again)
    graph.erase_node(node)
    graph.erase_node(picked)


def _taken(graph: fx.Graph, node: fx.Node, row: Any, base: fx.Node, made: dict[fx.Node, fx.Node]) -> fx.Node:
    """The function `node` of `row`, which is a view of `base`, as a view of that of `base`."""
    if row in made:
        return made[row]
    if row is base:
        made[row] = emit_like(graph, node, row)
    else:
        inner = _taken(graph, node, row.args[0], base, made)
        made[row] = emit_like(graph, row, inner, *row.args[1:])
    return made[row]


# -- rows of two tensors -----------------------------------------------------------------------------------------------


def side_by_side(graph: fx.Graph) -> Picks:
    """Bring the rows together that are picked of two tensors; the picks that were replaced, which stay, unread."""
    found: Picks = []
    merged: dict[Pair, fx.Node] = {}
    shared: dict[fx.Node, fx.Node] = {}
    for node in list(graph.find_nodes(op="call_function", target=aten.where.self)):
        if not node.users or not _picks_rows(node):
            continue
        mask, *rows = node.args
        first, second = map(unexpanded, rows)
        values = [row.meta["val"] for row in (first, second)]
        if values[0].dim() != values[1].dim() or values[0].dim() < 2 or values[0].shape[1:] != values[1].shape[1:]:
            continue
        counts = [value.shape[0] for value in values]
        count = max(counts)
        if min(counts) not in (1, count) or (counts[0] == counts[1] and set(_views(first)) & set(_views(second))):
            continue
        shape = broadcast_shape([tuple(mask.meta["val"].shape), (count, *values[0].shape[1:])])  # type: ignore[union-attr]
        if not same_shape(shape, node.meta["val"].shape):
            continue
        with graph.inserting_before(node):  # which comes before the next pick that reads the same
            first, second = (_for_samples(graph, row, count, shared) for row in (first, second))
            both = _merged(graph, (first, second), merged)
            halves = [emit(graph, aten.slice.Tensor, both, 0, start, start + count) for start in (0, count)]
            again = emit_like(graph, node, mask, *halves)
        node.replace_all_uses_with(again)
        found.append((node, again))
    return found


def undo(graph: fx.Graph, picks: Picks) -> None:
    """Take back what `side_by_side` did, or any other rewriting that left the nodes as they were, unread."""
    for before, after in reversed(picks):
        after.replace_all_uses_with(before)
        pending = [after]
        while pending:
            node = pending.pop()
            if node.op == "call_function" and not node.users:
                inputs = node.all_input_nodes
                graph.erase_node(node)
                pending += [i for i in inputs if not i.users and i not in pending]


def _for_samples(graph: fx.Graph, row: fx.Node, count: int, known: dict[fx.Node, fx.Node]) -> fx.Node:
    """`row`, which may be the same for all samples (Qwen-Image 2.1's of timestep 0), for each of `count` samples."""
    if row.meta["val"].shape[0] == count:
        return row
    if row not in known:
        known[row] = emit(graph, aten.expand.default, row, [count, *row.meta["val"].shape[1:]])
    return known[row]


def _merged(graph: fx.Graph, pair: Pair, known: dict[Pair, fx.Node]) -> fx.Node:
    """The rows of both, one behind the other in dim 0: of what both are computed from in the same way, or a cat."""
    if pair not in known:
        first, second = pair
        source = _made_alike(first, second)
        if source is None:
            known[pair] = emit(graph, aten.cat.default, [first, second])
        else:
            inner = _merged(graph, source, known)
            known[pair] = emit_like(graph, first, inner, *first.args[1:])
    return known[pair]


def _made_alike(first: fx.Node, second: fx.Node) -> Pair | None:
    """What both are the same function of, one that treats rows of dim 0 alike; None where they are not."""
    if first.op != "call_function" or first.target is not second.target or first.kwargs != second.kwargs:
        return None
    (one, *rest), (other, *others) = first.args or (None,), second.args or (None,)
    if rest != others or not isinstance(one, fx.Node) or not isinstance(other, fx.Node) or one is other:
        return None
    if any(isinstance(value, fx.Node) for value in (*rest, *first.kwargs.values())):
        return None
    if first.target is operator.getitem:
        return (one, other) if _made_alike(one, other) is not None else None
    value, like = one.meta.get("val"), other.meta.get("val")
    if not (isinstance(value, torch.Tensor) and isinstance(like, torch.Tensor)):
        return None
    if value.shape != like.shape or value.dtype != like.dtype or not value.dim():
        return None
    if is_elementwise(first):
        return one, other
    if first.target not in ALONG:
        return None
    at: Any = rest[ALONG[first.target]] if len(rest) > ALONG[first.target] else 0
    rank = value.dim() + (first.target is aten.unsqueeze.default)
    return (one, other) if at % rank else None


# -- common ------------------------------------------------------------------------------------------------------------


def _picks_rows(picked: fx.Node) -> bool:
    """Whether one mask for all columns picks of two rows for all tokens, of the dtype of what is picked."""
    mask, *rows = picked.args
    if not all(isinstance(node, fx.Node) for node in picked.args):
        return False
    value, picks = picked.meta["val"], mask.meta["val"]  # type: ignore[union-attr]
    if not picks.dim() or not same_size(picks.shape[-1], 1) or same_size(value.shape[-1], 1):
        return False
    values = [unexpanded(row).meta["val"] for row in rows]
    return all(v.dtype == value.dtype and _is_repeated(v.shape, value.shape) for v in values)


def _is_repeated(row: torch.Size, shape: torch.Size) -> bool:
    """Whether `row`, of known sizes, has one element for several in one of the dims before the last."""
    if not row or not all(isinstance(size, int) for size in row) or not same_size(row[-1], shape[-1]):
        return False
    row = torch.Size([1] * (len(shape) - len(row)) + list(row))
    return any(one == 1 and not same_size(size, 1) for one, size in zip(row[:-1], shape[:-1], strict=True))


def _is_small(base: fx.Node, row: fx.Node) -> bool:
    """Whether all of `base`, which `row` is a part of, is hardly more than some rows of conditioning."""
    known = all(isinstance(size, int) for size in base.meta["val"].shape)
    return known and base.meta["val"].numel() <= PARTS * row.meta["val"].numel()


def _views(node: Any) -> list[fx.Node]:
    """`node` and what it is a view of."""
    found = [node]
    while is_view(found[-1]):
        found.append(found[-1].args[0])
    return found
