"""New strides are carried on through a graph, each node after its inputs; copies that they make needless can go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dkfuse.rewriting.strides import propagate, same_layout, spread

aten = torch.ops.aten


def graph_of(function: Callable[..., Any], *sizes: tuple[int, ...]) -> fx.Graph:
    with FakeTensorMode():
        inputs = [torch.empty(size) for size in sizes]
    return make_fx(function)(*inputs).graph


def nodes(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=target))


def columns_first(node: fx.Node) -> fx.Node:
    """Let the value of `node` lie as if another kernel had written it with its last two dims swapped."""
    value = node.meta["val"]
    with value.fake_mode:
        node.meta["val"] = value.mT.contiguous().mT
    return node


def as_recorded(graph: fx.Graph) -> bool:
    """Whether every fake value has the layout that its node's op gives."""
    return all(
        same_layout(node.target(*fx.map_arg(node.args, lambda n: n.meta["val"]), **node.kwargs), node.meta["val"])  # type: ignore[operator]
        for node in graph.nodes
        if node.op == "call_function" and node.target is not aten.relu.default  # what was changed by hand
    )


def test_strides_reach_readers_after_all_their_inputs() -> None:
    def function(x: Tensor) -> Any:
        h = torch.relu(x)
        first, second = h.split(4, -1)  # a list of tensors
        return torch.exp(h * (2 * torch.exp(h)))[..., :4] + first * second

    graph = graph_of(function, (3, 5, 8))
    (relu,) = nodes(graph, aten.relu.default)
    propagate(columns_first(relu))
    assert as_recorded(graph)
    (add,) = nodes(graph, aten.add.Tensor)
    assert add.meta["val"].stride() == (20, 1, 5)


def test_each_reader_is_computed_once_and_only_as_far_as_layouts_change() -> None:
    def function(x: Tensor) -> Any:
        h = torch.relu(x)
        return (torch.exp(h) + torch.sin(h)).mT.clone(memory_format=torch.contiguous_format) * 3

    graph = graph_of(function, (3, 5, 8))
    (relu,) = nodes(graph, aten.relu.default)
    seen: list[fx.Node] = []
    propagate(columns_first(relu), instead=seen.append)
    names = [str(node.target) for node in seen]
    assert sorted(names[:2]) == ["aten.exp.default", "aten.sin.default"]
    assert names[2:] == ["aten.add.Tensor", "aten.transpose.int", "aten.clone.default"]  # dense whatever it reads
    seen.clear()
    propagate(relu, instead=seen.append)
    assert len(seen) == 2  # nothing is new


def test_only_the_users_that_are_named_are_begun_with() -> None:
    graph = graph_of(lambda x: (torch.exp(torch.relu(x)), torch.sin(torch.relu(x))), (3, 5, 8))
    first, _ = nodes(graph, aten.relu.default)
    columns_first(first)
    propagate(first, [])
    (exp,) = nodes(graph, aten.exp.default)
    assert exp.meta["val"].is_contiguous()
    propagate(first, [exp])
    assert not exp.meta["val"].is_contiguous()


def test_a_view_that_is_not_possible_any_more_becomes_a_reshape() -> None:
    graph = graph_of(lambda x: torch.relu(x).view(15, 8) + 1, (3, 5, 8))
    (relu,) = nodes(graph, aten.relu.default)
    propagate(columns_first(relu))
    assert not nodes(graph, aten.view.default) and len(nodes(graph, aten.reshape.default)) == 1
    assert as_recorded(graph)


def transposed(x: Tensor) -> Tensor:
    return torch.exp(torch.relu(x).mT.clone(memory_format=torch.contiguous_format))


def test_a_copy_of_what_is_contiguous_now_goes() -> None:
    """`spread` drops it, `propagate` alone keeps it: streams are made dense by copies."""
    for carry, copies in ((spread, 0), (propagate, 1)):
        graph = graph_of(transposed, (3, 5, 8))
        (relu,) = nodes(graph, aten.relu.default)
        carry(columns_first(relu))
        graph.lint()
        assert len(nodes(graph, aten.clone.default)) == copies
        assert as_recorded(graph)
        (exp,) = nodes(graph, aten.exp.default)
        assert exp.meta["val"].is_contiguous()


def test_a_copy_that_can_be_told_apart_stays() -> None:
    def returned(x: Tensor) -> Tensor:
        return torch.relu(x).mT.clone(memory_format=torch.contiguous_format)

    def of_an_input(x: Tensor) -> Tensor:
        return torch.exp(x.clone(memory_format=torch.contiguous_format))

    graph = graph_of(returned, (3, 5, 8))
    spread(columns_first(nodes(graph, aten.relu.default)[0]))
    assert len(nodes(graph, aten.clone.default)) == 1
    graph = graph_of(of_an_input, (3, 5, 8))
    spread(next(iter(graph.nodes)))
    assert len(nodes(graph, aten.clone.default)) == 1


def test_symbols_are_compared_without_a_guard() -> None:
    module = make_fx(transposed, tracing_mode="symbolic")(torch.empty(3, 5, 8))
    value = nodes(module.graph, aten.relu.default)[0].meta["val"]
    environment = value.fake_mode.shape_env
    guards = len(environment.guards)
    spread(columns_first(nodes(module.graph, aten.relu.default)[0]))
    assert not nodes(module.graph, aten.clone.default)
    assert len(environment.guards) == guards
