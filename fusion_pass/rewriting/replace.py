"""Replacing sites by ops: a taken site becomes one ``dkfuse::`` call, its operands the nodes that were bound.

Operands that no node computes are views of one that does, and are inserted.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from .. import compat
from ..matching.head_site import HeadSite
from ..matching.operands import own_node
from ..matching.rules import Candidate
from ..matching.terms import Term, TermView, same_shape
from ..matching.views import replay
from .strides import is_returned, owner, spread
from .symbols import arguments

TABLES = ("cos", "sin")


def replace(graph: fx.Graph, view: TermView, sites: list[Candidate | HeadSite]) -> list[fx.Node]:
    """Put one op call in the place of each site; returns those that are read. Dead code is dropped, order restored."""
    if not sites:
        return []
    renamed: dict[fx.Node, fx.Node] = {}
    tables: dict[Term, fx.Node] = {}  # queries and keys of all blocks read the same ones
    moved: list[fx.Node] = []
    calls = [call for site in sites for call in _inserted(graph, view, site, renamed, tables, moved)]
    compat.stable_topological_sort(graph)
    graph.eliminate_dead_code()
    for result in moved:
        spread(result)
        retell(result.users)
    graph.lint()
    live = set(graph.nodes)
    return [call for call in calls if call in live]


def _inserted(
    graph: fx.Graph,
    view: TermView,
    site: Candidate | HeadSite,
    renamed: dict[fx.Node, fx.Node],
    tables: dict[Term, fx.Node],
    moved: list[fx.Node],
) -> list[fx.Node]:
    if isinstance(site, HeadSite):
        from .replace_heads import insert

        return insert(graph, view, site, renamed, tables, moved)
    return [_insert(graph, view, site, renamed)]


def op_call(
    graph: fx.Graph,
    view: TermView,
    op: str,
    terms: dict[str, Term],
    attributes: dict[str, Any],
    renamed: dict[fx.Node, fx.Node],
    tables: dict[Term, fx.Node] | None = None,
) -> fx.Node:
    """A call of ``dkfuse::op`` on the nodes of `terms`, with everything that torch wants to know about it."""
    import dkfuse.kernels.ops  # noqa: F401  (registers torch.ops.dkfuse)

    from .row_numbers import checked

    overload = getattr(torch.ops.dkfuse, op).default
    operands = {
        name: realize(graph, view, term, renamed, tables if name in TABLES else None) for name, term in terms.items()
    }
    if "pick" in operands:
        operands["pick"] = checked(graph, operands)
    args = tuple(operands.get(a.name) for a in overload._schema.arguments if not a.kwarg_only)
    call = graph.call_function(overload, args, dict(attributes))
    call.meta["val"] = overload(*(a.meta["val"] if a is not None else None for a in args), **attributes)
    call.meta["eager_input_vals"] = fake_arguments(call)
    return call


def _insert(graph: fx.Graph, view: TermView, site: Candidate, renamed: dict[fx.Node, fx.Node]) -> fx.Node:
    anchor = site.output_nodes("out")[0]
    with graph.inserting_before(anchor):
        call = op_call(graph, view, site.op, site.operands, site.attributes, renamed)
        call.meta["dkfuse_kernel"], call.meta["dkfuse_site"] = site.kernel, site
        copy_origin(anchor, call)
        results = _results(graph, call)
        shaped = {name: _shaped(graph, results[name], site.output_nodes(name)[0]) for name in site.outputs}
        instead = {old: new for name in shaped for old, new in apart(graph, site.output_nodes(name), shaped[name])}
    for old, new in instead.items():
        old.replace_all_uses_with(new)
        renamed[old] = new
    return call


def apart(graph: fx.Graph, nodes: list[fx.Node], result: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """`nodes`, which `result` is to replace, with what does: a copy where the caller gets more than one of them.

    A model may return a value and a clone of it, and go on in one of them in place.
    """
    copies: dict[fx.Node, fx.Node] = {}
    for node in dict.fromkeys(map(owner, nodes)):
        if is_returned(node):
            copies[node] = emit_copy(graph, result) if copies else result
    return [(node, copies.get(owner(node), result)) for node in nodes]


def _shaped(graph: fx.Graph, result: fx.Node, old: fx.Node) -> fx.Node:
    """`result` in the shape of the value that it replaces: tokens that the op saw as frames."""
    shape = old.meta["val"].shape
    if same_shape(result.meta["val"].shape, shape):
        return result
    sizes = arguments(graph, list(shape), [result, *old.all_input_nodes])
    reshaped = graph.call_function(torch.ops.aten.reshape.default, (result, sizes))
    reshaped.meta["val"] = result.meta["val"].reshape(shape)
    copy_origin(old, reshaped)
    return reshaped


def _results(graph: fx.Graph, call: fx.Node) -> dict[str, fx.Node]:
    """The results of an op call by name; one `getitem` each where there are several."""
    returns = call.target._schema.returns  # type: ignore[union-attr]
    if len(returns) == 1:
        return {"out": call}
    results = {}
    for i, result in enumerate(returns):
        item = graph.call_function(operator.getitem, (call, i))
        item.meta["val"] = call.meta["val"][i]
        results[result.name] = item
    return results


def emit(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call of `target` at the graph's insertion point, with the value that it has."""
    node = graph.call_function(target, args, kwargs)
    values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    node.meta["val"] = target(*values, **named)
    return node


def emit_like(graph: fx.Graph, source: fx.Node, *args: Any) -> fx.Node:
    """What `source` computes, of other arguments, and of its origin."""
    node = emit(graph, source.target, *args, **source.kwargs)
    copy_origin(source, node)
    return node


def emit_numbers(graph: fx.Graph, count: Any, like: torch.Tensor) -> fx.Node:
    """0 to `count` - 1 in int64, as Inductor has aranges. like: a fake tensor of the device where they are."""
    how = {"start": 0, "step": 1, "dtype": torch.int64, "device": like.device, "requires_grad": False}
    node = graph.call_function(torch.ops.prims.iota.default, (count,), how)
    node.meta["val"] = like.new_empty((count,), dtype=torch.int64)
    return node


def emit_copy(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A copy of `node` in contiguous memory."""
    copy = graph.call_function(torch.ops.aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    copy.meta["val"] = torch.ops.aten.clone.default(node.meta["val"], memory_format=torch.contiguous_format)
    copy_origin(node, copy)
    return copy


def copy_origin(source: fx.Node, target: fx.Node) -> None:
    for key in ("stack_trace", "nn_module_stack"):
        if key in source.meta:
            target.meta[key] = source.meta[key]


def realize(
    graph: fx.Graph,
    view: TermView,
    term: Term,
    renamed: dict[fx.Node, fx.Node],
    inserted: dict[Term, fx.Node] | None = None,
) -> fx.Node:
    """The node that computes `term`, its views inserted where no node has them, or taken from `inserted`."""
    if (node := own_node(view, term)) is not None:
        return renamed.get(node, node)
    if inserted is not None and term in inserted:
        return inserted[term]
    node = replay(graph, realize(graph, view, term.args[0], renamed, inserted), term)
    if inserted is not None:
        inserted[term] = node
    return node


def retell(readers: Iterable[fx.Node]) -> None:
    """Let torch know the new strides of what `readers` read, where it keeps those of eager for them."""
    for reader in readers:
        if "eager_input_vals" in reader.meta:
            reader.meta["eager_input_vals"] = fake_arguments(reader)


def fake_arguments(node: fx.Node) -> tuple[Any, Any]:
    """``(args, kwargs)`` of a node as fake values, in fx's own containers: torch compares the two structures."""
    return fx.map_arg(node.args, lambda n: n.meta["val"]), fx.map_arg(node.kwargs, lambda n: n.meta["val"])
