"""Which norm_rope calls become one launch, and which write over their input.

One launch computes the queries and keys that one attention reads, of every stream: a launch of its own for each of four
small tensors costs more in launches and tails than in traffic.
"""

from __future__ import annotations

import torch
from torch import fx

from ..matching.gain import is_view

aten = torch.ops.aten
CARRIERS = (aten.cat.default, aten.clone.default)
PRODUCERS = (
    aten.addmm.default,
    aten.mm.default,
    aten.bmm.default,
    aten.baddbmm.default,
)  # they allocate what they return


def grouped(graph: fx.Graph, calls: list[fx.Node]) -> list[list[fx.Node]]:
    """`calls` by the node that reads them in the end, in graph order; groups of calls that need each other are split.

    Every call is in one group.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    by_reader: dict[fx.Node | None, list[fx.Node]] = {}
    for call in sorted(calls, key=order.__getitem__):
        reader = min(_readers(call), key=order.__getitem__, default=None)
        by_reader.setdefault(reader if reader is not None else call, []).append(call)
    return [group for together in by_reader.values() for group in _independent(together, order)]


def _readers(call: fx.Node) -> set[fx.Node]:
    """The first users behind views, cats and copies."""
    found: set[fx.Node] = set()
    pending = list(call.users)
    while pending:
        node = pending.pop()
        if is_view(node) or node.target in CARRIERS:
            pending.extend(node.users)
        else:
            found.add(node)
    return found


def _independent(calls: list[fx.Node], order: dict[fx.Node, int]) -> list[list[fx.Node]]:
    """The calls, cut where one depends on another of the same group."""
    groups: list[list[fx.Node]] = []
    for call in calls:
        if groups and not _depends(call, groups[-1], order):
            groups[-1].append(call)
        else:
            groups.append([call])
    return groups


def _depends(call: fx.Node, group: list[fx.Node], order: dict[fx.Node, int]) -> bool:
    first = order[group[0]]
    seen: set[fx.Node] = set()
    pending = list(call.all_input_nodes)
    while pending:
        node = pending.pop()
        if node in group:
            return True
        if node not in seen and order[node] > first:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return False


def in_place(call: fx.Node) -> bool:
    """Whether the result may take the memory of x: all of a buffer of the graph's own that nothing else reads."""
    x = call.args[0]
    assert isinstance(x, fx.Node)
    value, result = x.meta["val"], call.meta["val"]
    if not all(isinstance(s, int) for s in value.shape):
        return False
    if value.dtype != result.dtype or value.stride() != result.stride():
        return False
    base, reader = x, call
    while is_view(base):
        if set(base.users) != {reader}:
            return False
        base, reader = base.args[0], base  # type: ignore[assignment]
    whole = isinstance(base.meta.get("val"), torch.Tensor) and base.meta["val"].numel() == value.numel()
    return whole and base.target in PRODUCERS and set(base.users) == {reader}
