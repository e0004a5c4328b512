"""Inserting a site of queries or keys: one ``dkfuse::norm_rope`` a part, and the cat that joins them.

The result has the memory order that attention reads: that of the value it replaces, or of the contiguous copy that the
model makes of it, which then is no copy any more. Where attentions alone read it, heads stay inside of tokens, as the
projections write them: torch's kernels give their result the order of the queries, and what follows reads tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import dkfuse.kernels.attention  # noqa: F401  (registers the op)

from ..compat import statically_known_true
from ..matching.gain import is_view
from ..matching.head_site import HeadSite, reads_a_size
from ..matching.operands import fake
from ..matching.terms import Term, TermView, same_size
from ..seams.attention_call import OPS
from .replace import apart, copy_origin, emit, op_call
from .strides import is_returned, read_by_strides
from .symbols import arguments

aten = torch.ops.aten
ATTENTIONS = (*OPS, torch.ops.dkfuse.attention.default)
TOKENS_OUTSIDE = [0, 2, 1, 3]  # of [B, H, S, D]: tokens before heads in memory


def insert(
    graph: fx.Graph,
    view: TermView,
    site: HeadSite,
    renamed: dict[fx.Node, fx.Node],
    tables: dict[Term, fx.Node],
    moved: list[fx.Node],
) -> list[fx.Node]:
    """The op calls; the site's root is replaced by their result. `tables`: the views of tables inserted so far.

    A result with other strides than what it replaces is added to `moved`.
    """
    nodes = site.output_nodes("out")
    copies, order = result_order(site)
    calls = []
    with graph.inserting_before(nodes[0]):
        for part in site.calls:
            call = op_call(graph, view, part.op, part.operands, {**part.attributes, "order": order}, renamed, tables)
            call.meta["dkfuse_kernel"], call.meta["dkfuse_site"] = site.kernel, site
            copy_origin(nodes[0], call)
            calls.append(call)
        result = calls[0] if site.heads.dim is None else _joined(graph, calls, site.heads.dim, order, nodes[0])
        if not copies and order == TOKENS_OUTSIDE:
            moved.append(result)
        for cast, path in site.casts.items():
            renamed[cast] = _views_again(graph, result, path)
            cast.replace_all_uses_with(renamed[cast])
        instead = apart(graph, nodes, result)
    _keep_sizes(graph, site, calls)
    for old, new in instead:
        old.replace_all_uses_with(new)
        renamed[old] = new
    for copy, source in copies.items():
        copy.replace_all_uses_with(source)
        renamed[copy] = source
    return calls


def result_order(site: HeadSite) -> tuple[dict[fx.Node, fx.Node], list[int] | None]:
    """The copies that the result makes needless, and the op's `order`."""
    nodes = site.output_nodes("out")
    copies = _copies(nodes) if site.heads.dim is None and not site.casts else {}
    order = _wanted_order(nodes, copies)
    return copies, TOKENS_OUTSIDE if order is None and not copies and _heads_stay_inside(site, nodes) else order


def _heads_stay_inside(site: HeadSite, nodes: list[fx.Node]) -> bool:
    """Whether only attentions read the result [B, H, S, D], and its operands lie in memory as [B, S, H, D]."""
    if not all(user.target in ATTENTIONS for node in nodes for user in node.users):
        return False
    for call in site.calls:
        value = fake(site.view, call.operands["x"])
        if value.dim() != 4:
            return False
        _, heads, tokens, last = value.stride()
        if not (isinstance(heads, int) and isinstance(tokens, int) and heads < tokens and last == 1):
            return False
    return read_by_strides(nodes[0].graph).isdisjoint(nodes)


def _joined(graph: fx.Graph, calls: list[fx.Node], dim: int, order: list[int] | None, root: fx.Node) -> fx.Node:
    """The results as one, dense in the order that they have in memory."""
    if order != TOKENS_OUTSIDE:
        return _emitted(graph, root, aten.cat.default, calls, dim)
    parts = [_emitted(graph, root, aten.permute.default, call, order) for call in calls]
    cat = _emitted(graph, root, aten.cat.default, parts, order.index(dim))
    return _emitted(graph, root, aten.permute.default, cat, order)  # of two dims: its own inverse


def _emitted(graph: fx.Graph, root: fx.Node, target: Any, *args: Any) -> fx.Node:
    node = emit(graph, target, *args)
    copy_origin(root, node)
    return node


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
    return found if len(orders) == 1 and sum(map(is_returned, found)) < 2 else {}


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
