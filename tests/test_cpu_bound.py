"""Which attention kernel a graph gets whose launches take longer than the GPU's work, and the estimate of both."""

from __future__ import annotations

import functools
from typing import Any

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


@functools.cache
def one_attention() -> tuple[Any, Any]:
    graph = transformer(256, 0).graph
    call = next(calls(graph))
    return call, cpu_bound.load(graph, [call]).alike


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 400), st.floats(0, 400))
def test_more_work_never_takes_a_kernel_away(gpu, more, cpu, extra, dearer):
    """Nor do fewer launches, or cheaper calls."""
    call, alike = one_attention()

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


# -- published sizes ---------------------------------------------------------------------------------------------------


def stack(blocks: int, linears: list[tuple[int, int, int]], attentions: list[tuple[int, int, int, int, int]]) -> Any:
    """So many blocks of linears (rows, in, out) and attentions (batch, heads, queries, keys, head_dim)."""
    with FakeTensorMode():
        pairs = [[torch.empty(s, device="cuda", dtype=BF16) for s in ((m, k), (k, n))] for m, k, n in linears]
        threes = [
            [torch.empty(b, h, t, d, device="cuda", dtype=BF16) for t in (s, sk, sk)] for b, h, s, sk, d in attentions
        ]

    def run(pairs, threes):
        found = []
        for _ in range(blocks):
            found += [x @ w for x, w in pairs] + [OPS["cudnn"](*t, False, 0.0)[0] for t in threes]
        return found

    return make_fx(run)(pairs, threes)


def joint(batch: int, image: int, text: int, width: int, head_dim: int) -> tuple[list, list]:
    """A block of image and text streams with projections, MLPs of four times the width and modulations of their own."""
    rows = batch * image, batch * text
    linears = [(r, width, width) for r in rows for _ in range(4)]
    linears += [size for r in rows for size in ((r, width, 4 * width), (r, 4 * width, width))]
    linears += [(batch, width, 6 * width)] * 2
    return linears, [(batch, width // head_dim, image + text, image + text, head_dim)]


PIXART = (
    [(4096, 1152, 1152)] * 6 + [(300, 1152, 1152)] * 2 + [(4096, 1152, 4608), (4096, 4608, 1152)],
    [(1, 16, 4096, 4096, 72), (1, 16, 4096, 300, 72)],
)
DIT = (
    [(256, 1152, 1152)] * 4 + [(256, 1152, 4608), (256, 4608, 1152), (1, 1152, 6912)],
    [(1, 16, 256, 256, 72)],
)
WAN = (
    [(32760, 5120, 5120)] * 6 + [(512, 5120, 5120)] * 2 + [(32760, 5120, 13824), (32760, 13824, 5120)],
    [(1, 40, 32760, 32760, 128), (1, 40, 32760, 512, 128)],
)


@pytest.mark.parametrize(
    ("name", "block", "bound"),
    [
        ("PixArt-Sigma 1024px", PIXART, True),
        ("DiT-XL/2", DIT, True),
        ("Flux", joint(1, 4096, 512, 3072, 128), False),
        ("HunyuanVideo 480p", joint(1, 25440, 256, 3072, 128), False),
        ("SD3.5-Large", joint(1, 4096, 333, 2432, 64), False),
        ("SD3.5-Large, batch 2", joint(2, 4096, 333, 2432, 64), False),
        ("Wan-14B", WAN, False),
    ],
)
def test_published_sizes(name, block, bound):
    module = stack(3, *block)
    found = load(module)
    call = next(calls(module.graph))
    assert found.alike[cpu_bound._kind(call)] == 3
    for extra in (5.0, 131.0):
        assert (found.too_slow(call, extra) is not None) == bound, (name, found.gpu, found.cpu)
