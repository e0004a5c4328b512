"""Calls of kernels that the compiler cannot look into: ``dkfuse_<provider>::<op>`` in the place of ``dkfuse::<op>``.

Inductor allocates nothing and fuses nothing there; operands arrive with the strides that were checked.
"""

from __future__ import annotations

import operator

from torch import fx

from dkfuse.kernels import registry

from .calls import op_name, replace_results, result_names
from .replace import copy_origin, fake_arguments

INSIDE = ("triton", "native")  # their work is visible to Inductor


def is_opaque(call: fx.Node, eager: bool = False) -> bool:
    """Whether the call's implementation runs on the device that the call is on, as an op of its own.

    eager: nobody compiles the graph, and ``dkfuse::op`` launches Triton: where that can be, the definition is an op of
    its own.
    """
    provider, device = call.meta["dkfuse_kernel"], call.args[0].meta["val"].device.type  # type: ignore[union-attr]
    if provider in INSIDE:
        return eager and provider == "native" and device != "cpu"
    implementation = registry.find(provider, op_name(call))
    return implementation is not None and implementation.runs_on(device)


def lower_to_op(graph: fx.Graph, call: fx.Node) -> fx.Node:
    """Replace `call` by one of its provider's op; a sum that nobody reads is not asked for."""
    from dkfuse.kernels.provider_ops import define

    implementation = registry.find(call.meta["dkfuse_kernel"], op_name(call))
    assert implementation is not None
    names, kwargs = result_names(call), dict(call.kwargs)
    read = {names[user.args[1]] for user in call.users} if len(names) > 1 else set(names)  # type: ignore[index]
    if "sum" in names and "sum" not in read:
        kwargs["sum_dtype"] = None
    overload = define(implementation)
    with graph.inserting_before(call):
        node = graph.call_function(overload, call.args, kwargs)
        args, values = fx.map_arg((call.args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = overload(*args, **values)
        node.meta["eager_input_vals"] = fake_arguments(node)
        node.meta["dkfuse_kernel"] = call.meta["dkfuse_kernel"]
        copy_origin(call, node)
        items = {"out": node}
        if len(names) > 1:
            items = {n: _item(graph, node, i) for i, n in enumerate(names) if n in read}
    replace_results(graph, call, names, items)
    return node


def _item(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    item = graph.call_function(operator.getitem, (node, index))
    item.meta["val"] = node.meta["val"][index]
    return item


def lower_opaque(graph: fx.Graph, calls: list[fx.Node], eager: bool = False) -> list[fx.Node]:
    """Lower those of `calls` that are opaque (see `is_opaque`); the others are returned."""
    rest = []
    for call in calls:
        if is_opaque(call, eager):
            lower_to_op(graph, call)
        else:
            rest.append(call)
    return rest
