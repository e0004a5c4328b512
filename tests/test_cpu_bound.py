"""Which attention kernel a graph gets whose launches take longer than the GPU's work, and the estimate of both."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dkfuse import Status
from dkfuse.seams import attention_choice, attention_measure, attention_table, cpu_bound
from dkfuse.seams.attention_call import calls
from dkfuse.seams.attention_table import Row

from .attentions import BF16, OPS, install, rewritten, use_rows

ROW = Row(90, 128, 24, 4096, 4096, {"cudnn": 600, "fa4": 660, "flash": 300})


def transformer(tokens: int, linears: int, heads: int = 24, width: int | None = None) -> fx.GraphModule:
    """One attention of `tokens` and so many linears [tokens, width] x [width, width], as a GPU traces them."""
    width = width or heads * 128
    with FakeTensorMode():
        x = torch.empty(tokens, width, device="cuda", dtype=BF16)
        q = torch.empty(1, tokens, heads, 128, device="cuda", dtype=BF16)
        weight = torch.empty(width, width, device="cuda", dtype=BF16)

    def run(x, q, weight):
        q = q.transpose(1, 2)
        out = OPS["cudnn"](q, q, q, False, 0.0)[0]
        for _ in range(linears):
            x = F.silu(x @ weight)
        return x, out

    return make_fx(run)(x, q, weight)


def load(module: fx.GraphModule) -> cpu_bound.Load:
    found = cpu_bound.load(module.graph, list(calls(module.graph)))
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    use_rows(monkeypatch, (ROW,))
    install(monkeypatch, fa4="4.0.0b20")
    monkeypatch.setitem(attention_table.EXTRA, ("fa4", False), 100.0)


# -- the estimate ------------------------------------------------------------------------------------------------------


def test_work_and_launches_are_counted():
    found = load(transformer(4096, 10))
    size = 4096 * 3072 * 2
    gemm = 2 * 4096 * 3072 * 3072 / 600e12 + 2 * size / 2.5e12
    attention = 4 * 24 * 4096 * 4096 * 128 / 500e12 + 4 * size / 2.5e12
    assert found.gpu == pytest.approx(10 * gemm + attention)
    assert found.cpu == pytest.approx(11 * 2.4 * 20e-6)
    assert list(found.alike.values()) == [1]


def test_a_gemm_that_waits_for_memory_takes_its_time():
    """One row: the weight is all there is to read; and it is one launch."""
    one, none = load(transformer(1, 1, heads=1, width=8192)), load(transformer(1, 0, heads=1, width=8192))
    assert one.gpu - none.gpu == pytest.approx((8192 * 8192 * 2 + 4 * 8192 * 2) / 2.5e12)
    assert one.cpu - none.cpu == pytest.approx(20e-6)


def test_convolutions_are_work():
    with FakeTensorMode():
        x = torch.empty(1, 64, 128, 128, device="cuda", dtype=BF16)
        weight = torch.empty(256, 64, 2, 2, device="cuda", dtype=BF16)

    graph = make_fx(lambda x, w: F.conv2d(x, w, stride=2))(x, weight).graph
    flops, moved = 2 * 256 * 64 * 64 * 64 * 4, 2 * (64 * 128 * 128 + 256 * 64 * 64)
    expected = max(flops / 600e12, (moved + 2 * weight.numel()) / 2.5e12) + moved / 2.5e12
    found = cpu_bound.load(graph, [])
    assert found is not None and found.gpu == pytest.approx(expected)
    back = make_fx(lambda x, w: F.conv_transpose2d(x, w, stride=2))(x.new_empty(1, 256, 64, 64), weight).graph
    again = cpu_bound.load(back, [])
    assert again is not None and again.gpu == pytest.approx(expected)


def test_nothing_is_said_of_work_of_unknown_size():
    module = transformer(4096, 1)
    library = torch.library.Library("cpu_bound_test", "FRAGMENT")
    library.define("scan(Tensor x) -> Tensor")
    (product,) = [n for n in module.graph.nodes if n.target is torch.ops.aten.mm.default]
    product.target, product.args = torch.ops.cpu_bound_test.scan.default, product.args[:1]
    assert cpu_bound.load(module.graph, []) is None


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 400), st.floats(0, 400))
def test_more_work_never_takes_a_kernel_away(gpu, more, cpu, extra, dearer):
    """Nor do fewer launches, or cheaper calls."""
    call = next(calls(transformer(256, 0).graph))
    alike = load(transformer(256, 0)).alike

    def left_out(gpu, cpu, extra):
        return cpu_bound.Load(gpu, cpu, alike).too_slow(call, extra) is not None

    assert left_out(gpu + more, cpu, extra) <= left_out(gpu, cpu, extra)
    assert left_out(gpu, cpu, extra) <= left_out(gpu, cpu + more, extra)
    assert left_out(gpu, cpu, extra) <= left_out(gpu, cpu, extra + dearer)
    assert not left_out(gpu, cpu, 0)


# -- the choice --------------------------------------------------------------------------------------------------------


def small() -> fx.GraphModule:
    """An attention of 0.41 ms and 20 linears of 7 us, which the CPU launches in 1.0 ms."""
    return transformer(4096, 20, width=512)


def test_a_graph_bound_by_the_cpu_keeps_torchs_kernel():
    site = rewritten(small())
    assert (site.status, site.reason.code) == (Status.LEFT_TO_INDUCTOR, "cpu_bound")
    message = "fa4: bound by the CPU: ~0.59 ms of GPU work, ~1 ms of launches, to which it would add 0.1 ms"
    assert site.reason.message == message
    assert rewritten(transformer(4096, 20)).kernel == "fa4"


def test_who_asks_for_a_kernel_gets_it():
    assert rewritten(small(), attention="fa4").kernel == "fa4"


def test_a_kernel_of_torchs_costs_no_more():
    module = small()
    (node,) = [n for n in module.graph.nodes if n.target is torch.ops.aten._scaled_dot_product_cudnn_attention.default]
    node.target, node.args = torch.ops.aten._scaled_dot_product_flash_attention.default, node.args[:3]
    site = rewritten(module)
    assert site.kernel == "cudnn" and "cpu_bound" in [a.code for a in site.attempts]


def test_other_gpus_are_not_judged_by_these_figures(monkeypatch):
    row = Row(100, *[getattr(ROW, n) for n in ("head_dim", "heads", "queries", "keys")], ROW.tflops)
    use_rows(monkeypatch, (row,))
    assert rewritten(small(), target="sm100").kernel == "fa4"


@pytest.mark.parametrize("options", [{}, {"triton.cudagraphs": True}], ids=["launched", "cuda graphs"])
@pytest.mark.parametrize("timed", [False, True], ids=["table", "timed"])
def test_not_under_cuda_graphs(monkeypatch, options, timed):
    """Under max-autotune without graphs it is the same rule; what is left out is not timed either."""
    asked = []

    def times(tensors, causal, kernels, *_):
        asked.extend(kernels)
        return {k: 300.0 if k == "fa4" else 400.0 for k in kernels}

    monkeypatch.setattr(attention_choice, "_measures", lambda call: timed)
    monkeypatch.setattr(attention_measure, "times", times)
    with torch._inductor.config.patch(options):
        site = rewritten(small())
    assert (site.kernel == "fa4") == bool(options)
    assert ("fa4" in asked) == (timed and bool(options))
    assert ("cpu_bound" in [r.code for r in (site.reason, *site.attempts) if r]) != bool(options)
