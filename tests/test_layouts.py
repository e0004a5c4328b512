"""A stream that begins with a convolution has its rows strided; one copy makes them dense where that gains a site."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dkfuse import compat
from dkfuse.fuse import run, settled
from dkfuse.reporting.report import Status
from dkfuse.settings import Settings

D, PATCH = 64, 2
aten = torch.ops.aten


def stream(image: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(image, kernel, stride=PATCH).flatten(2).transpose(1, 2)


def blocks(image: Tensor, kernel: Tensor, e: Tensor, w: Tensor) -> Tensor:
    h = stream(image, kernel)
    for _ in range(2):
        shift, scale, gate = e.chunk(3, dim=-1)
        h = h + gate * ((F.layer_norm(h, (D,)) * (1 + scale) + shift) @ w)
    return (F.layer_norm(h, (D,)) * (1 + scale) + shift) @ w


def residual_only(image: Tensor, kernel: Tensor, e: Tensor, w: Tensor) -> Tensor:
    """Nothing to gain: the norm is not the stream's."""
    h = stream(image, kernel)
    return (h + e[..., :D] * (h @ w)) @ w


def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((1, 4, 8, 8), (D, 4, PATCH, PATCH), (1, 1, 3 * D), (D, D))
    return tuple(torch.randn(*size, generator=generator) for size in sizes)


def graph_of(function: Any, decide: Any) -> tuple[fx.Graph, Any, int]:
    """The graph, the decision, and how many copies it added."""
    seen: list[tuple[fx.Graph, Any, int]] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        def inner(graph_module: fx.GraphModule, _: Any) -> Any:
            before = copies(graph_module.graph)
            decided = decide(graph_module.graph)
            seen.append((graph_module.graph, decided, copies(graph_module.graph) - before))
            graph_module.recompile()
            return graph_module

        return compat.lower_with(gm, example_inputs, inner, {})

    torch.compiler.reset()
    with torch.no_grad():
        results = torch.compile(function, backend=backend, dynamic=False)(*inputs())
        torch.testing.assert_close(results, function(*inputs()), rtol=1e-4, atol=1e-4 * results.abs().max().item())
    return seen[0]


def copies(graph: fx.Graph) -> int:
    return len(list(graph.find_nodes(op="call_function", target=aten.clone.default)))


def test_one_copy_for_the_whole_stream() -> None:
    graph, decided, added = graph_of(blocks, lambda g: settled(g, Settings(target="sm90")))
    assert added == 1
    assert all(site.status is Status.FUSED for site in decided.record.sites), str(decided.record)
    layouts = [n.meta["val"].stride() for n in graph.find_nodes(op="call_function", target=aten.add.Tensor)]
    assert all(stride[-1] == 1 for stride in layouts if len(stride) == 3), layouts


def test_fake_values_are_what_the_graph_computes() -> None:
    """After the copy every fake value still has the layout that its node's op gives."""
    graph, _, _ = graph_of(blocks, lambda g: settled(g, Settings(target="sm90")))
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            assert node.target(*args, **kwargs).stride() == node.meta["val"].stride(), node


def test_no_copy_without_a_site_gained() -> None:
    _, _, added = graph_of(residual_only, lambda g: settled(g, Settings(target="sm90")))
    assert added == 0


def test_no_copy_where_no_kernel_asks_for_one() -> None:
    _, record, added = graph_of(blocks, lambda g: run(g, Settings(target="cpu"), lowered=False))
    assert added <= 0
    assert all(site.status is Status.FUSED for site in record.sites), str(record)
