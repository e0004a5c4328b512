"""The seam to attention: which kernel is chosen, why not, and that the rewritten graph computes the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dkfuse import Settings, Status, seams
from dkfuse.kernels.attention_kernels import KERNELS
from dkfuse.seams import attention_choice, attention_table
from dkfuse.seams.attention_call import calls

from .attentions import BF16, install, on_cpu, on_gpu, rewritten, sdpa, targets, unhurried, use_rows

FA4 = "4.0.0b20"
MEASURED = attention_table.TABLE
LONG = (1, 24, 4096, 128)


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    use_rows(monkeypatch)
    install(monkeypatch)


# -- the choice --------------------------------------------------------------------------------------------------------


def test_the_fastest_installed_kernel_is_taken(monkeypatch):
    install(monkeypatch, fa4=FA4)
    module = on_gpu(LONG)
    site = rewritten(module)
    assert (site.status, site.kernel, site.op) == (Status.FUSED, "fa4", "dkfuse::attention")
    assert site.reason is None and site.shapes["q"] == list(LONG) and site.dtype == "bf16"
    found = targets(module)
    assert found.count("dkfuse.attention.default") == 1
    assert not [t for t in found if "scaled_dot_product" in t or "clone" in t or "contiguous" in t]
    (call,) = [n for n in module.graph.nodes if str(n.target) == "dkfuse.attention.default"]
    assert [a.meta["val"].stride() for a in call.args[:3]] == [(4096 * 3072, 128, 3072, 1)] * 3
    assert call.kwargs["using"] == "fa4" and call.meta["val"].stride() == (4096 * 3072, 128, 3072, 1)


def test_a_kernel_that_is_missing_is_named_with_its_gain():
    module = on_gpu(LONG)
    before = targets(module)
    site = rewritten(module)
    assert (site.status, site.kernel, site.reason.code) == (Status.LEFT_TO_INDUCTOR, None, "not_installed")
    assert "1.10x cudnn" in site.reason.message and "pip install 'dkfuse[attention]'" in site.reason.message
    assert [t for t in targets(module) if "getitem" not in t] == [t for t in before if "getitem" not in t]


def test_flash_on_hopper_becomes_cudnn():
    module = on_gpu(LONG, traced="flash")
    site = rewritten(module)
    assert (site.status, site.kernel) == (Status.FUSED, "cudnn")
    assert site.op == "aten::_scaled_dot_product_cudnn_attention"
    assert any("fa4 was measured" in a.message for a in site.attempts)
    found = targets(module)
    assert "aten._scaled_dot_product_cudnn_attention.default" in found
    assert not [t for t in found if "flash" in t or "dkfuse" in t]


@pytest.mark.parametrize(
    ("shape", "version", "code"),
    [
        ((1, 24, 16000, 128), FA4, "fastest"),  # measured as equal
        ((1, 8, 256, 64), FA4, "launch_bound"),
        ((1, 24, 4096, 96), FA4, "unmeasured"),
        ((1, 24, 1024, 128), FA4, "unmeasured"),  # four times as short as what was measured
        ((1, 2, 4096, 128), FA4, "unmeasured"),
        (LONG, "4.0.0b21", "fastest"),  # outside of what was tested
        (LONG, "3.9", "fastest"),
    ],
)
def test_what_torch_chose_stays(monkeypatch, shape, version, code):
    install(monkeypatch, fa4=version)
    module = on_gpu(shape)
    site = rewritten(module)
    assert (site.status, site.reason.code) == (Status.LEFT_TO_INDUCTOR, code), site.reason
    assert "aten._scaled_dot_product_cudnn_attention.default" in targets(module)
    if version != FA4:
        assert any(a.code == "version" and version in a.message for a in site.attempts)


@pytest.mark.parametrize(("heads", "code"), [(8, "launch_bound"), (24, None)])
def test_what_a_kernel_computes_faster_than_it_is_called_stays(monkeypatch, heads, code):
    """4 * heads * 128 * 3000^2 / 660 TFLOP/s: 56 and 168 us; the dearest call was measured at 54 us of CPU."""
    install(monkeypatch, fa4=FA4)
    site = rewritten(on_gpu((1, heads, 3000, 128)))
    assert (site.reason and site.reason.code) == code
    assert code is None or ("fa4 takes 56 us" in site.reason.message and "up to 60 us" in site.reason.message)


@pytest.mark.parametrize(
    ("q", "k", "code"),
    [
        ((1, 40, 32760, 128), (1, 40, 512, 128), "fastest"),  # text: fa4 is slower
        ((2, 16, 4096, 72), (2, 16, 300, 72), "fastest"),
        ((2, 16, 6000, 72), (2, 16, 300, 72), "fastest"),
        ((1, 24, 4608, 128), (1, 24, 77, 128), "unmeasured"),
        ((8, 16, 256, 72), None, "launch_bound"),
        ((1, 24, 512, 128), None, "unmeasured"),
        ((1, 24, 4608, 128), None, None),
        ((2, 38, 4429, 64), None, None),
        ((1, 24, 4352, 96), None, None),
        ((2, 16, 4096, 72), None, None),
    ],
)
def test_what_was_measured_on_an_h100(monkeypatch, q, k, code):
    use_rows(monkeypatch, MEASURED)
    install(monkeypatch, fa4=FA4)
    site = rewritten(on_gpu(q, k))
    assert (site.kernel, site.reason and site.reason.code) == (None if code else "fa4", code)


@pytest.mark.parametrize("traced", ["cudnn", "flash"])
def test_causal_and_grouped_attention_are_not_what_was_measured(monkeypatch, traced):
    install(monkeypatch, fa4=FA4)
    for module in (on_gpu(LONG, causal=True, traced=traced), on_gpu(LONG, (1, 6, 4096, 128), traced=traced)):
        site = rewritten(module)
        assert (site.status, site.reason.code) == (Status.LEFT_TO_INDUCTOR, "unmeasured")


def test_other_architectures_and_devices_stay(monkeypatch):
    install(monkeypatch, fa4=FA4)
    assert rewritten(on_gpu(LONG, traced="flash"), target="sm80").reason.code == "unmeasured"
    x = torch.randn(1, 16, 8, 64, dtype=BF16)
    assert seams.run(on_cpu(sdpa, x, x, x).graph, Settings(target="current")) == []


def test_torch_choice_is_known_where_a_cpu_traced():
    x = torch.randn(1, 16, 8, 64, dtype=BF16)
    mask = torch.zeros(1, 1, 16, 16, dtype=BF16)
    (plain,) = calls(on_cpu(sdpa, x, x, x).graph)
    (masked,) = calls(on_cpu(lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), x, x, x, mask).graph)
    assert [plain.chosen(90), plain.chosen(100), plain.chosen(80), plain.chosen(89)] == ["cudnn"] * 2 + ["flash"] * 2
    assert [masked.chosen(90), masked.chosen(80)] == ["cudnn", "efficient"]
    (full,) = calls(on_cpu(sdpa, *[t.float() for t in (x, x, x)]).graph)
    assert full.chosen(90) == "efficient"
    (wide,) = calls(on_cpu(sdpa, *[torch.randn(1, 16, 2, 160, dtype=BF16)] * 3).graph)
    assert wide.chosen(90) == "flash"


def test_the_measured_table_names_kernels_that_exist():
    for row in MEASURED:
        assert row.tflops or row.lengths
        for speeds, torchs in ((row.tflops, "cudnn"), (row.lengths, attention_table.DENSE)):
            assert not speeds or (torchs in speeds and set(speeds) <= {*KERNELS, torchs})
            assert all(speed > 0 for speed in speeds.values())
        assert row.head_dim % 8 == 0 and min(row.heads, row.queries, row.keys) > 0


# -- the rewritten graph -----------------------------------------------------------------------------------------------


KV = torch.randn(2, 24, 2, 64, dtype=BF16)
Q = torch.randn(2, 24, 8, 64, dtype=BF16)
CALLS = {
    "plain": (sdpa, (Q, Q.flip(1), Q.roll(1, 1))),
    "scaled": (lambda q, k, v: sdpa(q, k, v, scale=0.3), (Q, Q.flip(1), Q.roll(1, 1))),
    "causal": (lambda q, k, v: sdpa(q, k, v, is_causal=True), (Q, Q.flip(1), Q.roll(1, 1))),
    "cross": (sdpa, (Q, Q[:, :10].contiguous(), Q[:, 3:13].contiguous())),
    "grouped": (lambda q, k, v: sdpa(q, k, v, enable_gqa=True), (Q, KV, KV.flip(1))),
    "packed": (lambda x: sdpa(*x.unflatten(2, (3, 8, 64)).unbind(2)), (torch.randn(2, 24, 3 * 512, dtype=BF16),)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kernel", ["fa4", "fa3", "flash", "sage"])
def test_results_are_those_of_the_definition(monkeypatch, name, kernel):
    install(monkeypatch, fa4=FA4, fa3="3.0", sage="2.2")
    function, inputs = CALLS[name]
    module = on_cpu(function, *inputs)
    site = rewritten(module, attention=kernel)
    assert (site.status, site.kernel) == (Status.FUSED, kernel)
    assert targets(module).count("dkfuse.attention.default") == 1
    (out,) = module(*inputs)
    expected = function(*inputs)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert out.stride() == expected.stride()


def test_a_transposing_copy_goes_where_the_kernel_writes_tokens_first(monkeypatch):
    install(monkeypatch, fa4=FA4, flash="")
    q, k, v = (torch.randn(2, 4, 16, 64, dtype=BF16) for _ in range(3))
    weight = torch.randn(256, 256, dtype=BF16)

    def block(q, k, v, weight):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 16, 256) @ weight

    for kernel, copies in (("fa4", 0), ("flash", 1)):
        module = on_cpu(block, q, k, v, weight)
        assert targets(module).count("aten.clone.default") == 1
        assert rewritten(module, attention=kernel).kernel == kernel
        assert targets(module).count("aten.clone.default") == copies
        torch.testing.assert_close(module(q, k, v, weight)[0], block(q, k, v, weight), rtol=0, atol=0)
        for node in module.graph.nodes:  # the recorded strides are those of what runs
            if node.target is torch.ops.aten.permute.default:
                tokens_first = (16 * 256, 256, 64, 1) if kernel == "fa4" else (16 * 256, 64, 1024, 1)
                assert node.meta["val"].stride() == tokens_first


def test_new_strides_reach_the_pointwise_code_behind():
    q, k, v = (torch.randn(2, 4, 16, 64, dtype=BF16) for _ in range(3))
    module = on_cpu(lambda q, k, v: F.scaled_dot_product_attention(q, k, v) * 2, q, k, v)
    assert rewritten(module, attention="efficient").kernel == "efficient"
    (mul,) = [n for n in module.graph.nodes if n.target is torch.ops.aten.mul.Tensor]
    assert mul.meta["val"].stride() == module(q, k, v)[0].stride() == (16 * 256, 64, 256, 1)


def test_symbolic_sizes_use_the_example_and_add_no_guard(monkeypatch):
    install(monkeypatch, fa4=FA4)
    unhurried(monkeypatch)
    x = torch.randn(2, 16, 4, 64, dtype=BF16)

    def attention(q, k, v):
        return sdpa(*(t.unflatten(2, (4, 64)) for t in (q, k, v)))

    flat = x.flatten(2)
    for tensor in (inputs := [flat, flat.flip(1), flat.roll(1, 1)]):
        torch._dynamo.mark_dynamic(tensor, 1)
    module = on_cpu(attention, *inputs)
    value = next(iter(calls(module.graph))).q.meta["val"]
    assert isinstance(value.shape[2], torch.SymInt)
    guards = len(value.fake_mode.shape_env.guards)
    site = rewritten(module)
    assert (site.status, site.kernel) == (Status.FUSED, "fa4"), site.reason
    assert isinstance(site.shapes["q"][2], str)
    assert len(value.fake_mode.shape_env.guards) == guards


def test_sites_say_where_they_are():
    class Block(torch.nn.Module):
        def forward(self, x):
            return sdpa(x, x, x) + sdpa(x, x * 2, x)

    model = torch.nn.Sequential(Block())
    module = on_cpu(lambda x: model(x), Q)
    sites = seams.run(module.graph, Settings(target="sm90"))
    assert len({s.id for s in sites}) == 2 and all(s.family == "attention" for s in sites)
    assert all(s.source and s.source.startswith(("attentions.py", "test_attention.py")) for s in sites)
    assert sites[0].rule == attention_choice.RULE
