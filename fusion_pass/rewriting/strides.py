"""New strides of a value: who would mind, and the same carried on, so that later passes read them as facts."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from ..compat import statically_known_true

aten = torch.ops.aten

RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)  # views, where strides allow it
VIEWS = {
    aten.permute.default, aten.t.default, aten.transpose.int, aten.slice.Tensor, aten.select.int,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default,
    aten.alias.default, aten.detach.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
}  # fmt: skip


def owner(node: fx.Node) -> fx.Node:
    """What `node` is a view of, or itself."""
    while _is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def is_returned(node: fx.Node) -> bool:
    """Whether who calls the graph gets the memory of `node`, by whatever view, and may write to it."""
    return any(user.op == "output" or (_is_view(user) and is_returned(user)) for user in node.users)


def renew_views(graph: fx.Graph) -> None:
    """Let views have the storages of what they are views of now.

    Inductor tells by the storages of fake values whether a copy would be returned beside what it is of, and may go
    otherwise, and whether a value that an op overwrites is read later by a view.
    """
    for node in graph.nodes:
        if _is_view(node) and _storage(node) != _storage(node.args[0]):
            _recompute(node)


def _storage(node: fx.Node) -> int:
    value = node.meta["val"]
    first = value[0] if isinstance(value, (tuple, list)) else value
    return first.untyped_storage()._cdata


def _is_view(node: fx.Node) -> bool:
    """A reshape counts as one, also where it copies; so do the parts of a split."""
    of = node.args[0] if node.target is operator.getitem else node
    return isinstance(of, fx.Node) and (of.target in VIEWS or of.target in RESHAPES)


def propagate(
    start: fx.Node, users: Iterable[fx.Node] | None = None, instead: Callable[[fx.Node], fx.Node | None] | None = None
) -> None:
    """Compute the fake values behind `start` anew, as far as their layouts change, each node after its inputs.

    users: whom to begin with; by default all users of `start`. instead: another node with the values and the layout of
    a node that is reached, which takes its place, or None. A view that need not be possible any more becomes a reshape.
    """
    pending = list(start.users if users is None else users)
    heapq.heapify(pending)  # nodes compare by their place in the graph
    while pending:
        node = heapq.heappop(pending)
        while pending and pending[0] is node:
            heapq.heappop(pending)
        if node.op != "call_function" or "val" not in node.meta:
            continue
        readers = list(node.users)
        if instead is not None and (other := instead(node)) is not None:
            node.replace_all_uses_with(other)
            node.graph.erase_node(node)
            changed = True
        else:
            changed = _recompute(node)
        if changed:
            for reader in readers:
                heapq.heappush(pending, reader)


def spread(node: fx.Node) -> None:
    """`propagate` from `node` on, and drop each copy that only made its input contiguous where the input now is."""
    propagate(node, instead=_source_of_needless_copy)


def _source_of_needless_copy(clone: fx.Node) -> fx.Node | None:
    """What a copy to contiguous memory reads, if that is contiguous memory and nobody could tell the two apart."""
    if clone.target is not aten.clone.default or clone.kwargs.get("memory_format") is not torch.contiguous_format:
        return None
    source = clone.args[0]
    needless = (
        isinstance(source, fx.Node)
        and source.op == "call_function"
        and all(user.op == "call_function" for user in clone.users)
        and same_layout(source.meta["val"], clone.meta["val"])
        and not (is_returned(clone) and is_returned(owner(source)))
    )
    return source if needless else None  # type: ignore[return-value]


def copying_reader(pending: list[tuple[fx.Node, torch.Tensor]], readers: set[fx.Node]) -> fx.Node | None:
    """A reader that could not read the new values of nodes in place; the others' first ops go to `readers`.

    pending: nodes with the values, of other strides, that they would have.
    """
    pending = list(pending)
    while pending:
        node, value = pending.pop()
        for user in node.users:
            if user.op != "call_function":
                continue
            if user.target in RESHAPES:
                try:
                    pending.append((user, value.view(user.meta["val"].shape)))
                except (RuntimeError, ValueError):  # fake tensors raise the latter
                    return user
            elif user.target in VIEWS:
                args = [value if a is node else fx.map_arg(a, lambda n: n.meta["val"]) for a in user.args]
                result = user.target(*args, **user.kwargs)  # type: ignore[operator]
                parts = result if isinstance(result, (tuple, list)) else None
                if parts is None:
                    pending.append((user, result))
                else:
                    pending += [(item, parts[item.args[1]]) for item in user.users]  # type: ignore[misc,index]
            elif not isinstance(user.target, torch._ops.OpOverload) or user.target is aten.as_strided.default:
                return user
            elif user.target.namespace not in ("aten", "prims", "dkfuse"):
                return user  # it may insist on the strides that it had
            else:
                readers.add(user)
    return None


def read_by_strides(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose strides may say what an `as_strided` reads: what it is computed from, up to the matmuls.

    It means places in memory: with other strides it would read other values. A matmul's result has its own strides.
    """
    pending = [n for target in _BY_STRIDES for n in graph.find_nodes(op="call_function", target=target)]
    found: set[fx.Node] = set()
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                if source.target not in _MATMULS:
                    pending.append(source)
    return found


_BY_STRIDES = (aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default)
_MATMULS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


def same_layout(one: Any, other: Any) -> bool:
    """Whether two values, tensors or lists of them, are known to have the same sizes, strides and dtypes."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        pairs = zip((*one.shape, *one.stride()), (*other.shape, *other.stride()), strict=False)
        same = one.dtype == other.dtype and one.dim() == other.dim()
        return same and all(statically_known_true(a == b) for a, b in pairs)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(same_layout, one, other))
    return not isinstance(one, torch.Tensor) and not isinstance(other, torch.Tensor)


def _recompute(node: fx.Node) -> bool:
    """Whether the layout of its value changed."""
    if node.target is aten.view.default:
        node.target = aten.reshape.default
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    old, node.meta["val"] = node.meta["val"], node.target(*args, **kwargs)  # type: ignore[operator]
    return not same_layout(old, node.meta["val"])
