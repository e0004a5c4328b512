"""What the pass costs: CPU time linear in the nodes of the graph, on toy blocks repeated up to 20,000 nodes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dkfuse import Settings, fuse
from dkfuse.matching.terms import TermView

from .programs import trace
from .toy_blocks import AdaLNZero, CrossAttention, DoubleStream, toy_inputs

BLOCKS = (AdaLNZero, CrossAttention, DoubleStream)
SIZES = (1000, 4000, 20000)
SECONDS_PER_1000_NODES = 0.5  # generous: measured 0.07 to plan, 0.12 with the replacing
GROWTH = 2.5  # of the time per node from the smallest to the largest graph


def block_graph(block: type[nn.Module], mode: FakeTensorMode) -> fx.Graph:
    """One block as a graph of (x, text, c, *parameters) that returns (x, text)."""
    module = block().to(torch.bfloat16).requires_grad_(False)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def function(x: Tensor, text: Tensor, c: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x, text, c))

    return trace(function, [mode.from_tensor(t) for t in (*toy_inputs(1), *parameters)]).graph


def stacked(blocks: list[fx.Graph], nodes: int) -> fx.Graph:
    """The blocks in turn, each with parameters of its own, until there are as many nodes."""
    chosen: list[fx.Graph] = []
    while sum(len(block.nodes) for block in chosen) < nodes:
        chosen.append(blocks[len(chosen) % len(blocks)])
    graph = fx.Graph()
    environments: list[dict[fx.Node, Any]] = []
    for block in chosen:
        inputs = [n for n in block.nodes if n.op == "placeholder"]
        shared = environments[0] if environments else {}
        first = list(shared.values())[:3]
        own = inputs[len(first) :]
        environments.append({**dict(zip(inputs, first, strict=False)), **{n: graph.node_copy(n) for n in own}})
    x, text = list(environments[0].values())[:2]
    for block, environment in zip(chosen, environments, strict=True):
        inputs = [n for n in block.nodes if n.op == "placeholder"]
        environment[inputs[0]], environment[inputs[1]] = x, text
        for node in block.nodes:
            if node.op == "call_function":
                environment[node] = graph.node_copy(node, environment.__getitem__)
            elif node.op == "output":
                x, text = (environment[n] for n in node.args[0])
    graph.output((x, text))
    return graph


def cpu_seconds(function: Callable[[], Any], repeats: int) -> float:
    """The least CPU time of one call."""
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        function()
        best = min(best, time.process_time() - started)
    return best


@pytest.fixture(scope="module")
def graphs() -> list[fx.Graph]:
    mode = FakeTensorMode()
    blocks = [block_graph(block, mode) for block in BLOCKS]
    return [stacked(blocks, size) for size in SIZES]


def test_planning_is_linear_in_the_nodes(graphs: list[fx.Graph], record_property: Callable[[str, Any], None]) -> None:
    per_1000 = []
    for graph in graphs:
        nodes = len(graph.nodes)
        seconds = cpu_seconds(lambda graph=graph: fuse.plan(graph, Settings()), repeats=3)
        view = cpu_seconds(lambda graph=graph: TermView(graph), repeats=3)
        per_1000.append(1000 * seconds / nodes)
        record_property(f"plan of {nodes} nodes", f"{seconds:.3f} s, of it the view {view:.3f} s")
        print(f"{nodes} nodes: plan {seconds:.3f} s, view {view:.3f} s, {per_1000[-1] * 1000:.1f} ms per 1000")
    assert max(per_1000) < SECONDS_PER_1000_NODES
    assert per_1000[-1] < GROWTH * per_1000[0]


def test_replacing_is_linear_in_the_nodes(graphs: list[fx.Graph]) -> None:
    """The whole pass, up to the ops. The first run loads what is loaded on first use."""
    per_1000 = []
    for graph in (graphs[0], *graphs):
        copy = fx.Graph()
        copy.output(copy.graph_copy(graph, {}))
        nodes = len(copy.nodes)
        seconds = cpu_seconds(lambda copy=copy: fuse.run(copy, Settings(), lowered=False), repeats=1)
        per_1000.append(1000 * seconds / nodes)
        print(f"{nodes} nodes: {seconds:.3f} s, {per_1000[-1] * 1000:.1f} ms per 1000")
    assert max(per_1000[1:]) < SECONDS_PER_1000_NODES
    assert per_1000[-1] < GROWTH * per_1000[1]


def test_every_block_of_the_stack_is_fused(graphs: list[fx.Graph]) -> None:
    plan = fuse.plan(graphs[0], Settings())
    norms = [site for site in plan.record.sites if site.status.value == "fused" and site.with_site is None]
    assert len(norms) >= 2 * len(graphs[0].nodes) / 400
    assert all(site.status.value == "fused" for site in plan.record.sites)
