"""Queries and keys lowered, on CPU: one launch for an attention, joint tensors written in parts, rotation in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dkfuse import compat, compat_triton
from dkfuse.fuse import plan
from dkfuse.rewriting import lower
from dkfuse.rewriting.replace import replace
from dkfuse.settings import Settings

from .harness import check_numerics, counts, run

pytest.importorskip("triton")

HEADS, WIDTH, TEXT, IMAGE = 4, 32, 3, 8
D = HEADS * WIDTH
WRAPPER = compat_triton.triton_call_target()
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "_device", lambda call: torch.device("cuda"))


def lowered(function: Callable[..., Any], *args: Tensor, dynamic: bool = False) -> fx.Graph:
    """The graph as Inductor gets it on a GPU."""
    graphs: list[fx.Graph] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        def inner(graph_module: fx.GraphModule, _: Any) -> Any:
            graph = graph_module.graph
            decided = plan(graph, Settings(target="sm90"))
            lower.lower(graph, replace(graph, decided.view, decided.taken))
            graphs.append(graph)
            return lambda *args: tuple(torch.empty(()) for _ in graph.output_node().args[0])

        return compat.lower_with(gm, example_inputs, inner, {})

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=dynamic)(*args)
    (graph,) = graphs
    return graph


def launches(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=WRAPPER))


def count(graph: fx.Graph, target: Any) -> int:
    return len(list(graph.find_nodes(op="call_function", target=target)))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return (x.float() * cos + torch.stack([-b, a], -1).flatten(-2).float() * sin).to(x.dtype)


def heads(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).unflatten(-1, (HEADS, -1))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


def weights(n: int = 3) -> list[Tensor]:
    return [random(D, D) for _ in range(n)]


def tables(length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(length, 1, WIDTH), torch.randn(length, 1, WIDTH)


def normed_then_joined(
    image: Tensor, text: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, g: Tensor, c: Tensor, s: Tensor
) -> Tensor:
    q, k = (torch.cat([F.rms_norm(heads(x, w), (WIDTH,), g) for x in (text, image)], dim=1) for w in (wq, wk))
    v = torch.cat([heads(x, wv) for x in (text, image)], dim=1)
    return attention(rope(q, c, s), rope(k, c, s), v)


def test_one_launch_writes_both_joint_tensors() -> None:
    inputs = (random(1, IMAGE, D), random(1, TEXT, D), *weights(), random(WIDTH), *tables(TEXT + IMAGE))
    graph = lowered(normed_then_joined, *inputs)
    (launch,) = launches(graph)
    assert compat_triton.triton_kernel_name(launch) == "dkfuse_norm_rope_x4"
    assert launch.kwargs["tensors_to_clone"] == ["out_0", "out_2"], "one pointer for each joint tensor"
    assert count(graph, aten.cat.default) == 1, "only the values are still joined by a copy"
    assert count(graph, aten.empty_strided.default) == 2
    pointers = set(launch.kwargs["kwargs"])  # type: ignore[arg-type]
    assert {"cos_0", "cos_1"} <= pointers and not pointers & {"cos_2", "cos_3"}, "tables are passed once"


def test_any_number_of_tokens() -> None:
    inputs = (random(1, IMAGE, D), random(1, TEXT, D), *weights(), random(WIDTH), *tables(TEXT + IMAGE))
    for tensor in inputs[:2]:
        torch._dynamo.mark_dynamic(tensor, 1)
    for tensor in inputs[-2:]:
        torch._dynamo.mark_dynamic(tensor, 0)
    graph = lowered(normed_then_joined, *inputs, dynamic=None)  # type: ignore[arg-type]
    assert [compat_triton.triton_kernel_name(n) for n in launches(graph)] == ["dkfuse_norm_rope_x4"]


def single(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, c: Tensor, s: Tensor) -> Tensor:
    q, k, v = (heads(x, w) for w in (wq, wk, wv))
    return attention(rope(q, c, s), rope(k, c, s), v)


def test_in_place() -> None:
    graph = lowered(single, random(1, IMAGE, D), *weights(), *tables(IMAGE))
    (launch,) = launches(graph)
    assert compat_triton.triton_kernel_name(launch) == "dkfuse_norm_rope_x2"
    assert launch.kwargs["tensors_to_clone"] == ["x_0", "x_1"]
    assert count(graph, aten.empty_strided.default) == 0


def projection_read_elsewhere(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, c: Tensor, s: Tensor) -> Any:
    q, k, v = (heads(x, w) for w in (wq, wk, wv))
    return attention(rope(q, c, s), rope(k, c, s), v), q.flatten(2) @ wv


def packed(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, c: Tensor, s: Tensor) -> Tensor:
    q, k, v = (x @ torch.cat([wq, wk, wv], 1)).unflatten(-1, (3, HEADS, WIDTH)).unbind(2)
    return attention(rope(q, c, s), rope(k, c, s), v)


def wider(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """The result is fp32, the projection bf16."""
    q, k, v = (heads(x, w) for w in (wq, wk, wv))
    q, k = (rope(t.float(), c, s) for t in (q, k))
    return attention(q, k, v.float())


def of_an_input(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, c: Tensor, s: Tensor) -> Tensor:
    q = x.unflatten(-1, (HEADS, -1))
    return attention(rope(q, c, s), rope(heads(x, wk), c, s), heads(x, wv))


@pytest.mark.parametrize(
    ("function", "written"),
    [
        (projection_read_elsewhere, {"out_0", "x_1"}),
        (packed, {"out_0", "out_1"}),
        (wider, {"out_0", "out_1"}),
        (of_an_input, {"out_0", "x_1"}),
    ],
)
def test_not_in_place(function: Callable[..., Any], written: set[str]) -> None:
    """A projection that something else reads, shares with others or has another dtype keeps its memory."""
    graph = lowered(function, random(1, IMAGE, D), *weights(), *tables(IMAGE))
    (launch,) = launches(graph)
    assert set(launch.kwargs["tensors_to_clone"]) == written  # type: ignore[arg-type]


def key_of_the_query(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, c: Tensor, s: Tensor) -> Tensor:
    q = rope(heads(x, wq), c, s)
    k = rope(heads(q.flatten(2), wk), c, s)
    return attention(q, k, heads(x, wv))


def test_calls_that_need_each_other_are_two_launches() -> None:
    graph = lowered(key_of_the_query, random(1, IMAGE, D), *weights(), *tables(IMAGE))
    assert [compat_triton.triton_kernel_name(n) for n in launches(graph)] == ["dkfuse_norm_rope"] * 2


def contiguous_heads(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, c: Tensor, s: Tensor) -> Tensor:
    q, k, v = (heads(x, w) for w in (wq, wk, wv))
    q, k = (rope(t, c, s).transpose(1, 2).contiguous() for t in (q, k))
    return F.scaled_dot_product_attention(q, k, v.transpose(1, 2))


def test_the_copy_before_attention_is_not_made() -> None:
    graph = lowered(contiguous_heads, random(1, IMAGE, D), *weights(), *tables(IMAGE))
    assert count(graph, aten.clone.default) == 0
    strides = [n.args[1] for n in graph.find_nodes(op="call_function", target=aten.empty_strided.default)]
    assert strides == [[IMAGE * D, WIDTH, IMAGE * WIDTH, 1]] * 2, "written heads first"


def two_attentions(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, c: Tensor, s: Tensor) -> Tensor:
    y = single(x, wq, wk, wv, c, s).transpose(1, 2).flatten(2)
    return single(y, wq, wk, wv, c, s)


def test_one_launch_for_each_attention() -> None:
    graph = lowered(two_attentions, random(1, IMAGE, D), *weights(), *tables(IMAGE))
    assert [compat_triton.triton_kernel_name(n) for n in launches(graph)] == ["dkfuse_norm_rope_x2"] * 2


def of_heads_outside(x: Tensor, text: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wt: Tensor) -> Tensor:
    """SD3.5's attention: [B, H, S, D], queries and keys normed and joined, values joined."""
    norm = (WIDTH,)
    q, k, v = (heads(x, w).transpose(1, 2) for w in (wq, wk, wv))
    p = heads(text, wt).transpose(1, 2)
    q, k = (torch.cat([F.rms_norm(y, norm), F.rms_norm(p, norm)], 2) for y in (q, k))
    out = F.scaled_dot_product_attention(q, k, torch.cat([v, p], 2))
    return out.transpose(1, 2).flatten(2) @ wt


def test_heads_stay_inside_of_tokens_for_attention() -> None:
    """The kernel writes the joint tensors as [B, S, H, D], so that attention's result is, which the model reads."""
    graph = lowered(of_heads_outside, random(2, IMAGE, D), random(2, TEXT, D), *weights(4))
    (launch,) = launches(graph)
    written = {name: buffer.meta["val"] for name, buffer in launch.kwargs["kwargs"].items() if "out" in name}
    assert {tuple(value.shape) for value in written.values()} == {(2, TEXT + IMAGE, HEADS, WIDTH)}
    assert count(graph, aten.clone.default) == 0
    assert count(graph, aten.cat.default) == 1  # of the values


def read_by_another(x: Tensor, text: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wt: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (heads(x, w).transpose(1, 2) for w in (wq, wk, wv))
    q, k = (F.rms_norm(y, (WIDTH,)) for y in (q, k))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), k @ v.transpose(2, 3)


def test_other_readers_keep_the_order_of_the_model() -> None:
    graph = lowered(read_by_another, random(2, IMAGE, D), random(2, TEXT, D), *weights(4))
    (call,) = (n for n in graph.nodes if "scaled_dot_product" in str(n.target))
    q, k = (node.meta["val"].stride() for node in call.args[:2])
    assert q == (IMAGE * D, WIDTH, D, 1), "attention alone reads it"
    assert k == (IMAGE * D, IMAGE * WIDTH, WIDTH, 1)


@pytest.mark.parametrize("function", [of_heads_outside, read_by_another])
def test_the_order_in_memory_changes_no_value(function: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    args = [random(2, IMAGE, D), random(2, TEXT, D), *(w / D**0.5 for w in weights(4))]
    results, coverage = run(function, args)
    assert counts(coverage)["qk_norm"] == 2
    check_numerics(function, args, results)
