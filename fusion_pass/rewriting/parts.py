"""Operands that are parts of a tensor which Inductor does not write as a whole: each gets dense memory of its own.

    mod = a * b                         [B, N, 6, D], pointwise: Inductor computes it where it is read
    shift, scale, ... = mod.unbind(2)   each with the strides of a sixth

A kernel gets its operands with the strides that they have in the model. Inductor computes part i into memory of those
strides, with gaps for the other parts: six tensors, each of six times its size, where one copy to dense memory writes
what is read. Of one that is written as a whole anyway, parts are views.
"""

from __future__ import annotations

import torch
from torch import fx

from ..compat import statically_known_true
from ..matching.gain import CASTS, is_elementwise, is_view
from ..matching.readers import SPLITS
from ..matching.terms import getitem_source, same_size
from .replace import emit_copy, retell

MOST_READ = 4  # what is computed of more than so many tensors Inductor writes as a whole
MOST_OPS = 24  # likewise


def close_gaps(graph: fx.Graph, calls: list[fx.Node]) -> None:
    """Copy such operands of kernel calls to dense memory; Inductor computes the copy and nothing else."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    known = set(calls)
    copies: dict[fx.Node, fx.Node] = {}
    for call in sorted(calls, key=order.__getitem__):
        size = call.args[0].meta["val"].numel()  # type: ignore[union-attr]
        for operand in dict.fromkeys(call.all_input_nodes):
            value = operand.meta["val"]
            if not same_size(value.numel(), size) or not _has_gaps(value):
                continue
            if operand not in copies and _computed_in_parts(_source(operand), known):
                with graph.inserting_before(call):
                    copies[operand] = emit_copy(graph, operand)
            if operand in copies:
                call.replace_input_with(operand, copies[operand])
        retell([call])


def _has_gaps(value: torch.Tensor) -> bool:
    """Whether it is known to span more memory than it has elements."""
    span = 1
    for size, stride in zip(value.shape, value.stride(), strict=True):
        span = span + (size - 1) * stride
    return statically_known_true(span > value.numel())


def _source(node: fx.Node) -> fx.Node:
    """What `node` is a view or a part of."""
    while True:
        item = getitem_source(node)
        if item is not None and item[0].target in SPLITS:
            node = item[0].args[0]  # type: ignore[assignment]
        elif is_view(node):
            node = node.args[0]  # type: ignore[assignment]
        else:
            return node


def _computed_in_parts(source: fx.Node, calls: set[fx.Node]) -> bool:
    """Pointwise, of little, and read by nobody for whom the whole would be written."""
    if not is_elementwise(source) or source.target is torch.ops.aten.clone.default:
        return False
    read: set[fx.Node] = set()
    ops: set[fx.Node] = set()
    pending = [source]
    while pending:
        node = pending.pop()
        if is_elementwise(node):
            ops.add(node)
            pending += [n for n in node.all_input_nodes if n not in ops]
        elif is_view(node):
            pending += node.all_input_nodes
        else:
            read.add(node)
    return len(ops) <= MOST_OPS and len(read) <= MOST_READ and not _wanted_whole(source, calls)


def _wanted_whole(node: fx.Node, calls: set[fx.Node]) -> bool:
    for user in node.users:
        passes_on = is_view(user) or user.target in CASTS or user.target in SPLITS or getitem_source(user) is not None
        if _wanted_whole(user, calls) if passes_on else not (is_elementwise(user) or user in calls):
            return True
    return False
