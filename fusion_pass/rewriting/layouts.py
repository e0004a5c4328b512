"""Streams whose rows are not dense: a patch embedding's convolution leaves [B, L, D] with D outermost in memory.

Eager's pointwise ops keep that layout from block to block, and kernels that read rows cannot take it. One copy where
the stream begins makes it dense for good; it is made only if sites were refused for it. A stream may also begin as an
input, where a graph breaks behind the embedding or each block is compiled by itself: such a copy is made at each
call of each graph, and is to gain `GAINED` sites, or one and the place of several copies in front of norms.
"""

from __future__ import annotations

import torch
from torch import fx

from ..matching.gain import is_elementwise, is_view
from .strides import propagate

aten = torch.ops.aten
GAINED = 2  # that a copy of an input is worth: it reads and writes the stream, and torch may ask for another at the end


def settle(graph: fx.Graph, nodes: list[fx.Node]) -> list[fx.Node]:
    """Make `nodes`, operands that were refused for their inner stride, dense at their source; the copies made."""
    sources: dict[fx.Node, None] = {}
    for node in nodes:
        sources.update(dict.fromkeys(_sources(node)))
    copies = []
    for source in sources:
        users = [user for user in source.users if user.op != "output"]
        with graph.inserting_after(_last_input(graph) if source.op == "placeholder" else source):
            copy = graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
        copy.meta = {k: v for k, v in source.meta.items() if k != "val"}
        copy.meta["val"] = aten.clone.default(source.meta["val"], memory_format=torch.contiguous_format)
        for user in users:
            user.replace_input_with(source, copy)
        propagate(copy)
        copies.append(copy)
    return copies


def copies_of_rows(graph: fx.Graph) -> int:
    """How many copies `graph` makes of streams whose rows are not dense, as a norm's decomposition does."""
    copies = graph.find_nodes(op="call_function", target=aten.clone.default)
    return sum(_dense(copy) and not _dense(copy.args[0]) for copy in copies)


def worth(graph: fx.Graph, copies: list[fx.Node], before: int) -> int:
    """How many sites `copies` must gain to be kept; before: `copies_of_rows` that were made without them."""
    if copies_of_rows(graph) < before:
        return 1
    return sum(GAINED for copy in copies if copy.args[0].op == "placeholder") or 1  # type: ignore[union-attr]


def undo(graph: fx.Graph, copies: list[fx.Node]) -> None:
    """Take the copies of `settle` back."""
    for copy in copies:
        source = copy.args[0]
        assert isinstance(source, fx.Node)
        users = list(copy.users)
        copy.replace_all_uses_with(source)
        graph.erase_node(copy)
        propagate(source, users)


def _dense(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or not value.dim() or value.stride(-1) == 1


def _last_input(graph: fx.Graph) -> fx.Node:
    return [node for node in graph.nodes if node.op == "placeholder"][-1]


def _is_written(node: fx.Node) -> bool:
    """Whether the graph writes into an input, which a copy would not see."""
    return any(getattr(getattr(u.target, "_schema", None), "is_mutable", False) for u in node.users)


def _sources(node: fx.Node) -> list[fx.Node]:
    """Where rows stop being dense, up from `node` through elementwise ops and views: at a view, or at an input."""
    found: list[fx.Node] = []
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        at = pending.pop()
        if at in seen or _dense(at):
            continue
        seen.add(at)
        if at.op == "placeholder":
            if not _is_written(at):
                found.append(at)
            continue
        if not (is_view(at) or is_elementwise(at)):
            continue
        inputs = [source for source in at.all_input_nodes if not _dense(source)]
        if is_view(at) and not inputs:
            found.append(at)
        pending.extend(inputs)
    return found
