"""Replacing sites by ops, and ops by what runs them.

A taken site becomes one ``dkfuse::`` call, its operands the nodes (and views of nodes) that were bound. The call is then
lowered: `triton` to the kernel-wrapper node that Inductor launches, caches and exports like its own kernels (an opaque
op costs 20 us of Python a call), `native` to the op's definition as ATen nodes.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .compat import stable_topological_sort
from .rules import Candidate
from .terms import Term, TermView
from .views import replay


def replace(graph: fx.Graph, view: TermView, sites: list[Candidate]) -> list[fx.Node]:
    """Put one op call in the place of each site; returns the calls. Dead code is dropped, order restored."""
    if not sites:
        return []
    renamed: dict[fx.Node, fx.Node] = {}
    calls = []
    for site in sites:
        calls.append(_insert(graph, view, site, renamed))
    stable_topological_sort(graph)
    graph.eliminate_dead_code()
    graph.lint()
    return calls


def _insert(graph: fx.Graph, view: TermView, site: Candidate, renamed: dict[fx.Node, fx.Node]) -> fx.Node:
    import dkfuse.kernels.ops  # noqa: F401  (registers torch.ops.dkfuse)

    overload = getattr(torch.ops.dkfuse, site.rule.op).default
    anchor = site.output_nodes("out")[0]
    with graph.inserting_before(anchor):
        arguments = {name: realize(graph, view, term, renamed) for name, term in site.operands.items()}
        schema = overload._schema
        args = tuple(arguments.get(a.name) for a in schema.arguments if not a.kwarg_only)
        kwargs = dict(site.attributes)
        call = graph.call_function(overload, args, kwargs)
        fakes = tuple(a.meta["val"] if a is not None else None for a in args)
        call.meta["val"] = overload(*fakes, **kwargs)
        call.meta["eager_input_vals"] = (fakes, kwargs)
        call.meta["dkfuse_kernel"] = site.kernel
        for key in ("stack_trace", "nn_module_stack", "original_aten"):
            if key in anchor.meta:
                call.meta[key] = anchor.meta[key]
        results = {"out": call}
        returns = schema.returns
        if len(returns) > 1:
            for i, result in enumerate(returns):
                if result.name in site.outputs:
                    item = graph.call_function(operator.getitem, (call, i))
                    item.meta["val"] = call.meta["val"][i]
                    results[result.name] = item
    for name in site.outputs:
        for old in site.output_nodes(name):
            old.replace_all_uses_with(results[name])
            renamed[old] = results[name]
    return call


def realize(graph: fx.Graph, view: TermView, term: Term, renamed: dict[fx.Node, fx.Node]) -> fx.Node:
    """The node that computes `term`, its views inserted where no node has them."""
    nodes = view.nodes(term)
    if nodes:
        return renamed.get(nodes[0], nodes[0])
    return replay(graph, realize(graph, view, term.args[0], renamed), term)
