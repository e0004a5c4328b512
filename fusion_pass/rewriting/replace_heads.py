"""Inserting a site of queries or keys: one ``dkfuse::norm_rope`` a part, and the cat that joins them.

The result has the memory order that attention reads: that of the value it replaces, or of the contiguous copy that the
model makes of it, which then is no copy any more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compat import statically_known_true
from ..matching.gain import is_view
from ..matching.head_site import HeadSite, reads_a_size
from ..matching.terms import Term, TermView, same_size
from .replace import copy_origin, op_call
from .symbols import arguments

aten = torch.ops.aten


def insert(
    graph: fx.Graph,
    view: TermView,
    site: HeadSite,
    renamed: dict[fx.Node, fx.Node],
    tables: dict[Term, fx.Node],
) -> list[fx.Node]:
    """The op calls; the site's root is replaced by their result. `tables`: the views of tables inserted so far."""
    nodes = site.output_nodes("out")
    copies, order = result_order(site)
    calls = []
    with graph.inserting_before(nodes[0]):
        for part in site.calls:
            call = op_call(graph, view, part.op, part.operands, {**part.attributes, "order": order}, renamed, tables)
            call.meta["dkfuse_kernel"], call.meta["dkfuse_site"] = site.kernel, site
            copy_origin(nodes[0], call)
            calls.append(call)
        result = calls[0] if site.heads.dim is None else _joined(graph, calls, site.heads.dim, nodes[0])
        for cast, path in site.casts.items():
            renamed[cast] = _views_again(graph, result, path)
            cast.replace_all_uses_with(renamed[cast])
    _keep_sizes(graph, site, calls)
    for old in nodes:
        old.replace_all_uses_with(result)
        renamed[old] = result
    for copy, source in copies.items():
        copy.replace_all_uses_with(source)
        renamed[copy] = source
    return calls


def result_order(site: HeadSite) -> tuple[dict[fx.Node, fx.Node], list[int] | None]:
    """The copies that the result makes needless, and the op's `order`."""
    nodes = site.output_nodes("out")
    copies = _copies(nodes) if site.heads.dim is None and not site.casts else {}
    return copies, _wanted_order(nodes, copies)


def _joined(graph: fx.Graph, calls: list[fx.Node], dim: int, root: fx.Node) -> fx.Node:
    cat = graph.call_function(aten.cat.default, (calls, dim))
    cat.meta["val"] = aten.cat.default([call.meta["val"] for call in calls], dim)
    copy_origin(root, cat)
    return cat


def _keep_sizes(graph: fx.Graph, site: HeadSite, calls: list[fx.Node]) -> None:
    """Sizes that others read from values in between are read from the operands."""
    operands = [call.args[0] for call in calls]
    for node in site.interior:
        for user in list(node.users):
            if reads_a_size(site, user):
                with graph.inserting_before(user):
                    user.replace_all_uses_with(arguments(graph, user.meta["val"], operands))  # type: ignore[arg-type]


def _views_again(graph: fx.Graph, node: fx.Node, path: list[fx.Node]) -> fx.Node:
    """The views in `path` of another tensor."""
    for view in path:
        copy = graph.call_function(view.target, (node, *view.args[1:]), dict(view.kwargs))  # type: ignore[arg-type]
        args, kwargs = fx.map_arg((copy.args, copy.kwargs), lambda n: n.meta["val"])
        copy.meta["val"] = copy.target(*args, **kwargs)  # type: ignore[operator]
        copy_origin(view, copy)
        node = copy
    return node


def _copies(nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """``{contiguous copy: what it copies}`` where every reader of the value wants the same order in memory."""
    found: dict[fx.Node, fx.Node] = {}
    orders = set()
    for node in nodes:
        for user in node.users:
            reads = [user] if user.target is aten.clone.default else list(user.users) if is_view(user) else []
            if not reads or any(r.target is not aten.clone.default or r in nodes for r in reads):
                return {}
            for copy in reads:
                order = memory_order(copy.meta["val"])
                dims = _permuted_dims(user) if copy is not user else list(range(copy.meta["val"].dim()))
                if order is None or dims is None:
                    return {}
                orders.add(tuple(dims[d] for d in order))
                found[copy] = copy.args[0]  # type: ignore[assignment]
    return found if len(orders) == 1 else {}


def _permuted_dims(node: fx.Node) -> list[int] | None:
    return [d % len(node.args[1]) for d in node.args[1]] if node.target is aten.permute.default else None


def _wanted_order(nodes: list[fx.Node], copies: dict[fx.Node, fx.Node]) -> list[int] | None:
    """The op's `order`: None where it is contiguous or nothing better is known."""
    if copies:
        copy, source = next(iter(copies.items()))
        order = memory_order(copy.meta["val"])
        dims = list(range(len(order or ()))) if source in nodes else _permuted_dims(source)
        order = [dims[d] for d in order] if order is not None and dims is not None else None
    else:
        order = memory_order(nodes[-1].meta["val"])
    return None if order is None or order == sorted(order) else order


def memory_order(value: Any) -> list[int] | None:
    """The dims from outermost in memory to innermost, where the tensor is dense and its last dim innermost."""
    rank = value.dim()
    known = [i for i in range(rank) if isinstance(value.stride(i), int)]
    if len(known) < rank:
        return list(range(rank)) if value.is_contiguous() else None
    order = sorted(range(rank), key=lambda d: (-value.stride(d), d))
    order = _ones_in_place(value, order)
    step: Any = 1
    for dim in reversed(order):
        if not same_size(value.shape[dim], 1) and not statically_known_true(value.stride(dim) == step):
            return None
        step = step * value.shape[dim]
    return order if rank and order[-1] == rank - 1 else None


def _ones_in_place(value: Any, order: list[int]) -> list[int]:
    """Dims of size 1, whose stride says nothing, first."""
    ones = [d for d in range(value.dim()) if same_size(value.shape[d], 1) and d != value.dim() - 1]
    return ones + [d for d in order if d not in ones]
