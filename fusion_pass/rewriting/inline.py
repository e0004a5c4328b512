"""An op call as the ATen nodes of its definition: what runs where no kernel does."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .. import compat
from .calls import bound_arguments, op_name, replace_results, result_names
from .replace import copy_origin


def inline(graph: fx.Graph, call: fx.Node) -> None:
    """The op as the ATen nodes of its definition, which Inductor then compiles like any others."""
    arguments = bound_arguments(call)
    nodes = {k: v for k, v in arguments.items() if isinstance(v, fx.Node)}
    constants = {k: v for k, v in arguments.items() if k not in nodes}
    body = definition(op_name(call), {k: v.meta["val"] for k, v in nodes.items()}, constants)
    known = dict(zip((n for n in body.nodes if n.op == "placeholder"), nodes.values(), strict=True))
    results, names = spliced(graph, call, body, known), result_names(call)
    replace_results(graph, call, names, dict(zip(names, results, strict=True)))


def spliced(graph: fx.Graph, call: fx.Node, body: fx.Graph, known: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """The results of `body`, copied before `call`. known: the graph's nodes for those of `body` that are not copied."""
    with graph.inserting_before(call):
        for node in body.nodes:
            if node.op == "call_function" and node not in known:
                copy = known[node] = graph.node_copy(node, known.__getitem__)
                copy_origin(call, copy)
    return [known[n] for n in body.output_node().args[0]]  # type: ignore[union-attr]


def definition(op: str, tensors: dict[str, torch.Tensor], constants: dict[str, Any]) -> fx.Graph:
    """The op's definition on these fake tensors, traced to ATen with Inductor's decompositions.

    Blocks of one model ask for the same definition again and again: with static sizes it is traced once per signature,
    and again for another compilation, whose fake tensors do not mix with those of this one.
    """
    sizes = [s for t in tensors.values() for s in (*t.shape, *t.stride())]
    if not all(isinstance(s, int) for s in sizes):
        return _trace(op, tensors, constants)
    signature = tuple((n, tuple(t.shape), t.stride(), t.dtype, t.device) for n, t in tensors.items())
    key = (op, signature, tuple(sorted((k, str(v)) for k, v in constants.items())))
    mode = next((getattr(t, "fake_mode", None) for t in tensors.values()), None)
    found = _definitions.get(key)
    if found is None or found[0] is not mode:
        found = _definitions[key] = mode, _trace(op, tensors, constants)
    return found[1]


_definitions: dict[tuple, tuple[Any, fx.Graph]] = {}  # with the mode of its fake tensors


def _trace(op: str, tensors: dict[str, torch.Tensor], constants: dict[str, Any]) -> fx.Graph:
    from torch.fx.experimental.proxy_tensor import make_fx

    from dkfuse.kernels.ops import reference_outputs
    from dkfuse.kernels.support import OPERANDS

    defaults = {a.name: a.default_value for a in getattr(torch.ops.dkfuse, op).default._schema.arguments}
    names = OPERANDS[op][2]

    def call(*values: torch.Tensor) -> list[torch.Tensor]:
        arguments = {**defaults, **dict(zip(tensors, values, strict=True)), **constants}
        results = reference_outputs(op, arguments)
        dtypes = {n: arguments.get("sum_dtype" if n == "sum" else "out_dtype") for n in names}
        return [results[n].to(dtypes[n] or torch.float32) for n in names]

    return make_fx(call, decomposition_table=compat.decompositions())(*tensors.values()).graph
