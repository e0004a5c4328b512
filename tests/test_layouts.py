"""A stream that begins with a convolution has its rows strided; one copy makes them dense where that gains a site."""

from __future__ import annotations

from typing import Any

import pytest
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


def graph_of(function: Any, decide: Any, *args: Tensor) -> tuple[fx.Graph, Any, int]:
    """The graph, the decision, and how many copies it added. args: in the place of `inputs`."""
    seen: list[tuple[fx.Graph, Any, int]] = []
    args = args or inputs()

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
        given, expected = ([a.clone(memory_format=torch.preserve_format) for a in args] for _ in range(2))
        results = torch.compile(function, backend=backend, dynamic=False)(*given)
        right = function(*expected)
        torch.testing.assert_close(results, right, rtol=1e-4, atol=1e-4 * right.abs().max().item())
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
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


# -- streams that begin as an input ------------------------------------------------------------------------------------


def rms(h: Tensor) -> Tensor:
    """As models write it; `F.layer_norm` would be given a dense copy each time."""
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


def block(h: Tensor, e: Tensor, w: Tensor) -> Tensor:
    """One of those that are compiled one by one."""
    shift, scale, gate = e.chunk(3, dim=-1)
    h = h + gate * ((rms(h) * (1 + scale) + shift) @ w)
    return h + gate * ((rms(h) * (1 + scale) + shift) @ w)


def block_of_layer_norms(h: Tensor, e: Tensor, w: Tensor) -> Tensor:
    """HunyuanVideo's: each norm is given a dense copy, and keeps the residual before it from being seen."""
    shift, scale, gate = e.chunk(3, dim=-1)
    h = h + gate * ((F.layer_norm(h, (D,)) * (1 + scale) + shift) @ w)
    return h + gate * ((F.layer_norm(h, (D,)) * (1 + scale) + shift) @ w)


def norm_alone(h: Tensor, e: Tensor, w: Tensor) -> Tensor:
    return (rms(h) * (1 + e[..., :D])) @ w


def written(h: Tensor, e: Tensor, w: Tensor) -> Tensor:
    out = block(h, e, w)
    h.add_(1)
    return out


def given() -> tuple[Tensor, Tensor, Tensor]:
    image, kernel, e, w = inputs()
    return stream(image, kernel), e, w


@pytest.mark.parametrize("function", [block, block_of_layer_norms])
def test_an_input_is_copied_once_for_all_that_reads_it(function: Any) -> None:
    graph, decided, added = graph_of(function, lambda g: settled(g, Settings(target="sm90")), *given())
    assert added == 1
    reasons = [site.reason for site in decided.record.sites if site.status is not Status.FUSED]
    assert [reason.code for reason in reasons] == ["pointwise"], str(decided.record)  # the last residual
    before = [node.op for node in graph.nodes]
    assert before[: before.count("placeholder")] == ["placeholder"] * before.count("placeholder")


@pytest.mark.parametrize("function", [norm_alone, written])
def test_no_copy_of_an_input(function: Any) -> None:
    """It would cost more than one norm gains; a copy would not see what is written."""
    _, decided, added = graph_of(function, lambda g: settled(g, Settings(target="sm90")), *given())
    assert added <= 0
    assert {"inner_stride", "mutated"} & {site.reason.code for site in decided.record.sites if site.reason}
