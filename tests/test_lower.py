"""Lowering at the level of the graph, on CPU: what a GPU run hands to Inductor."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from dkfuse import compat, compat_triton
from dkfuse.fuse import plan
from dkfuse.rewriting import inline, joins, lower
from dkfuse.rewriting.replace import replace
from dkfuse.settings import Settings

pytest.importorskip("triton")

D = 64
aten = torch.ops.aten
WRAPPER = compat_triton.triton_call_target()


def lowered(function, *inputs, dynamic=False, join=True):
    """The graph with every site as a Triton kernel node."""
    graphs = []

    def backend(gm, example_inputs):
        def inner(graph_module, _):
            graph = graph_module.graph
            decided = plan(graph, Settings(target="sm90"))
            calls = replace(graph, decided.view, decided.taken)
            order = {node: i for i, node in enumerate(graph.nodes)}
            calls.sort(key=lambda call: order[call])
            parts = joins.find(graph, calls) if join else {}
            for call in calls:
                lower.lower_to_triton(graph, call, parts)
            compat.stable_topological_sort(graph)
            graph.eliminate_dead_code()
            graph.lint()
            graphs.append(graph)
            return lambda *args: tuple(torch.empty(()) for _ in graph_module.graph.output_node().args[0])

        return compat.lower_with(gm, example_inputs, inner, {})

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    (graph,) = graphs
    return graph


def kernels(graph):
    return list(graph.find_nodes(op="call_function", target=WRAPPER))


def modulate(x, s, t):
    return F.layer_norm(x, (D,)) * (1 + s[:, None]) + t[:, None]


def inputs(*shapes):
    return [torch.randn(*shape, dtype=torch.bfloat16) for shape in shapes]


def test_one_site_is_one_kernel_node():
    graph = lowered(lambda x, s, t, w: modulate(x, s, t) @ w, *inputs((2, 5, D), (2, D), (2, D), (D, D)))
    (kernel,) = kernels(graph)
    assert set(kernel.kwargs["kwargs"]) == {"x", "scale", "shift", "out"}
    assert kernel.kwargs["tensors_to_clone"] == ["out"]
    assert kernel.kwargs["grid"] == [(10, 1, 1)]
    assert kernel.kwargs["kwargs"]["out"].target is torch.ops.aten.empty_strided.default
    planned = kernel.meta["eager_input_vals"][1]["kwargs"]
    assert planned["scale"].stride() == kernel.kwargs["kwargs"]["scale"].meta["val"].stride()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_kernel_gets_memory_and_not_a_view_of_all_of_it(dynamic):
    """Inductor makes a tensor for every view that a launch is given; sizes that are not known are left alone."""

    def block(rows, w, c):
        scale, shift = c.chunk(2, -1)
        return modulate((rows @ w).view(1, -1, D), scale, shift) @ w

    (kernel,) = kernels(lowered(block, *inputs((10, D), (D, D), (1, 2 * D)), dynamic=dynamic))
    given, values = kernel.kwargs["kwargs"], kernel.meta["eager_input_vals"][1]["kwargs"]
    assert given["x"].target is (aten.reshape.default if dynamic else aten.mm.default)
    assert given["scale"].target is (
        aten.unsqueeze.default if dynamic else operator.getitem
    )  # of a part: it has an offset
    for name, node in given.items():
        assert values[name].stride() == node.meta["val"].stride()


@pytest.mark.parametrize(
    ("base", "target", "arguments", "same"),
    [
        (torch.empty(4, 6), aten.reshape.default, ([2, 2, 6],), True),
        (torch.empty(4, 6).t(), aten.reshape.default, ([24],), False),  # a copy
        (torch.empty(4, 12)[:, :6], aten.reshape.default, ([4, 2, 3],), True),
        (torch.empty(4, 12)[:, :6], aten.reshape.default, ([24],), False),
        (torch.empty(2, 4, 6), aten.permute.default, ([0, 2, 1],), True),
        (torch.empty(4, 6), aten.unsqueeze.default, (1,), True),
        (torch.empty(4, 6), aten.slice.Tensor, (0, 0, 2), False),  # a part
        (torch.empty(4, 6), aten.expand.default, ([3, 4, 6],), False),
        (torch.empty(4, 6), aten.neg.default, (), False),
    ],
)
def test_what_is_a_view_of_all_of_a_buffer(base, target, arguments, same):
    graph = torch.fx.Graph()
    node = graph.placeholder("base")
    node.meta["val"] = base
    view = graph.call_function(target, (node, *arguments))
    view.meta["val"] = target(base, *arguments)
    assert lower.memory_of(view) is (node if same else view)
    assert not same or view.meta["val"].data_ptr() == base.data_ptr()
    with FakeTensorMode() as mode:  # whose errors are others
        node.meta["val"] = mode.from_tensor(base)
        view.meta["val"] = target(node.meta["val"], *arguments)
    assert lower.memory_of(view) is (node if same else view)


def test_a_sum_that_nobody_reads_is_not_written():
    def last(x, y, g, s, t, w):
        return modulate(x + g[:, None] * y, s, t) @ w

    def block(x, y, g, s, t, w):
        r = x + g[:, None] * y
        return r, modulate(r, s, t) @ w

    values = inputs((2, 5, D), (2, 5, D), (2, D), (2, D), (2, D), (D, D))
    (without,) = kernels(lowered(last, *values))
    (both,) = kernels(lowered(block, *values))
    assert "sum" not in without.kwargs["kwargs"]
    assert {"sum", "out"} <= set(both.kwargs["kwargs"])
    assert sorted(both.kwargs["tensors_to_clone"]) == ["out", "sum"]


def test_symbolic_sizes_become_nodes():
    values = inputs((2, 5, D), (2, D), (2, D), (D, D))
    graph = lowered(lambda x, s, t, w: modulate(x, s, t) @ w, *values, dynamic=True)
    (kernel,) = kernels(graph)
    (grid,) = kernel.kwargs["grid"]
    assert isinstance(grid[0], torch.fx.Node) and grid[1:] == (1, 1)
    runtime = [v for v in kernel.kwargs["kwargs"].values() if isinstance(v.meta["val"], torch.SymInt)]
    assert runtime, "no symbolic stride or size reached the kernel"


def test_results_of_kernels_are_concatenated_in_place():
    def both(a, b, s, t, w):
        return torch.cat([modulate(a, s, t), modulate(b, s, t)], 1) @ w

    values = inputs((2, 3, D), (2, 5, D), (2, D), (2, D), (D, D))
    graph = lowered(both, *values)
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    first, second = kernels(graph)
    joint = second.kwargs["kwargs"]["out"]
    assert joint.target is operator.getitem and joint.args == (first, "out")
    assert first.kwargs["kwargs"]["out"].meta["val"].shape == (2, 8, D)


def test_a_part_with_another_reader_is_concatenated_as_before():
    def both(a, b, s, t, w):
        left = modulate(a, s, t)
        return torch.cat([left, modulate(b, s, t)], 1) @ w, left @ w

    values = inputs((2, 3, D), (2, 5, D), (2, D), (2, D), (D, D))
    graph = lowered(both, *values)
    assert len(kernels(graph)) == 2
    assert graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)


def test_the_native_definition_is_traced_once_per_signature():
    x = torch.randn(2, 5, D, dtype=torch.bfloat16)
    constants = {"norm": "rms", "eps": 1e-6, "out_dtype": torch.bfloat16, "roundings": 0}
    first = inline.definition("norm_modulate", {"x": x}, constants)
    assert inline.definition("norm_modulate", {"x": x}, constants) is first
    assert inline.definition("norm_modulate", {"x": x[:1]}, constants) is not first


def test_the_native_definition_has_fake_tensors_of_the_compilation_that_asks():
    """torch 2.11 refuses to compute with those of two."""
    constants = {"norm": "rms", "eps": 1e-6, "out_dtype": torch.bfloat16, "roundings": 0}
    for _compilation in range(2):
        mode = FakeTensorMode()
        body = inline.definition("norm_modulate", {"x": mode.from_tensor(torch.randn(3, 5, D))}, constants)
        assert {node.meta["val"].fake_mode for node in body.nodes if node.op == "call_function"} == {mode}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_torch_copies_no_buffer_before_a_kernel_writes_it(dynamic, monkeypatch):
    """The functional kernel nodes must all be made in-place by Inductor, those that share a joint tensor too."""
    from torch._inductor import compile_fx
    from torch._inductor.fx_passes import post_grad

    seen = {}

    class Stop(Exception):
        pass

    def every_site_as_kernel(graph, calls):
        order = {node: i for i, node in enumerate(graph.nodes)}
        calls = sorted(calls, key=lambda call: order[call])
        parts = joins.find(graph, calls)
        for call in calls:
            lower.lower_to_triton(graph, call, parts)
        compat.stable_topological_sort(graph)
        graph.eliminate_dead_code()

    passes = post_grad.post_grad_passes

    def stop_after_passes(gm, is_inference):
        passes(gm, is_inference)
        targets = [str(n.target) for n in gm.graph.nodes]
        seen.update(kernels=sum("triton_kernel" in t for t in targets), copies=sum("clone" in t for t in targets))
        raise Stop

    monkeypatch.setattr(lower, "lower", every_site_as_kernel)
    monkeypatch.setattr(compile_fx, "post_grad_passes", stop_after_passes)

    def stream(a, b, y, g, s, t, w):
        r = a + g[:, None] * y
        return torch.cat([modulate(r, s, t), modulate(b, s, t)], 1) @ w, r

    values = inputs((2, 3, D), (2, 5, D), (2, 3, D), (2, D), (2, D), (2, D), (D, D))
    torch.compiler.reset()
    with torch.no_grad(), pytest.raises(Exception, match="Stop"):
        options = {"dkfuse.target": "sm90", "force_disable_caches": True}
        torch.compile(stream, backend="dkfuse", dynamic=dynamic, options=options)(*values)
    assert seen == {"kernels": 2, "copies": 0}
