"""Attention by numbers of keys: the op, its refusals, the rewrite, and which kernel is chosen for it."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import dkfuse
import dkfuse.kernels.attention  # registers the op
from dkfuse import Settings, Status, compat, seams, zoo
from dkfuse.kernels import attention, attention_lengths, attention_parts, attention_run
from dkfuse.kernels.attention_kernels import KERNELS
from dkfuse.seams import attention_choice, attention_measure
from dkfuse.seams.attention_table import DENSE, Row

from .attentions import BF16, in_fp64, install, on_cpu, rewritten, sdpa, targets, unhurried, use_rows

aten = torch.ops.aten
OP = torch.ops.dkfuse.attention.default
TAKE = ("fa4", "cudnn", "flash")
Q, K, V = (torch.randn(2, 10, 4, 64, dtype=BF16, generator=torch.Generator().manual_seed(i)) for i in range(3))
FA4 = "4.0.0b20"


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    use_rows(monkeypatch, ())
    install(monkeypatch, fa4=FA4, fa3="3.0", sage="2.2")


def heads(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.transpose(1, 2) for t in tensors]


# -- the op ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["sdpa", *TAKE])
def test_opcheck(kernel):
    q, k, v = heads(Q[:1], K[:1], V[:1])
    for n in (torch.tensor([7]), torch.tensor([10], dtype=torch.int32)):
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
        torch.library.opcheck(OP, (q, k, v, None, n), {"using": kernel, "scale": 0.2}, test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_is_the_attention_of_the_first_keys(dtype):
    q, k, v = heads(Q, K, V)
    for numbers, taken in (((3, 10), (3, 10)), ((0, 11), (1, 10)), ((-5, 2**31 - 1), (1, 10))):
        for using in ("sdpa", "fa4", "flash"):
            out = OP(q, k, v, None, torch.tensor(numbers, dtype=dtype), using=using)
            for b, n in enumerate(taken):
                expected = F.scaled_dot_product_attention(*(t[b : b + 1] for t in (q, k[:, :, :n], v[:, :, :n])))
                torch.testing.assert_close(out[b : b + 1], expected, atol=1e-2, rtol=1e-2)
            assert using == "sdpa" or out.transpose(1, 2).is_contiguous()
    nan = v.clone()
    nan[:, :, 5:] = 1e30
    assert OP(q, k, nan, None, torch.tensor([5, 5], dtype=dtype)).abs().max() < 1e3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mask": torch.ones(2, 1, 1, 10, dtype=torch.bool)}, "a mask do not go together"),
        ({"causal": True}, "causal=True do not go together"),
        ({"key_lengths": torch.tensor([3.0, 4.0])}, r"torch.float32 \[2\]; int32 or int64 \[2\]"),
        ({"key_lengths": torch.tensor([3])}, r"int64 \[1\]; int32 or int64 \[2\]"),
        ({"key_lengths": torch.tensor([[3], [4]])}, r"int64 \[2, 1\]"),
        ({"using": "efficient"}, "efficient takes no key_lengths; these do: sdpa, fa4, cudnn, flash"),
    ],
)
def test_what_does_not_go_together_is_an_error(given, said):
    arguments = {"mask": None, "key_lengths": torch.tensor([3, 4]), **given}
    mask, lengths = arguments.pop("mask"), arguments.pop("key_lengths")
    with pytest.raises(ValueError, match=said):
        OP(*heads(Q, K, V), mask, lengths, **arguments)


class Recorder:
    """Stands for a kernel that needs a GPU: keeps what it is called with."""

    def __init__(self) -> None:
        self.given: list[tuple] = []

    def __getattr__(self, name):
        return self

    def __call__(self, *args, **kwargs):
        self.given.append((args, kwargs))
        return (args[0],)


def test_kernels_are_given_the_numbers_and_no_copies(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(attention_run, "aten", recorder)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    package = types.ModuleType("flash_attn.cute")
    package.flash_attn_varlen_func = package.flash_attn_func = recorder
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", package)
    attention_lengths._fa4_function.cache_clear()
    n = torch.tensor([4, 99])
    for kernel in ("fa4", "flash"):
        recorder.given.clear()
        q, k, v = heads(Q, K, V)
        out = attention._cuda(q, k, v, None, n, using=kernel)
        ((args, kwargs),) = recorder.given
        assert [t.data_ptr() for t in args[:3]] == [t.data_ptr() for t in (q, k, v)], "copied"
        assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()
        assert kwargs["seqused_k"].tolist() == [4, 10] and kwargs["seqused_k"].dtype == torch.int32
        if kernel == "flash":
            assert [t.tolist() for t in args[3:5]] == [[0, 10, 20]] * 2 and args[0].shape == (20, 4, 64)
    attention_lengths._fa4_function.cache_clear()


@pytest.mark.parametrize("sure", [0, 10])
def test_cudnn_needs_keys_that_take_part_in_any_case_and_others(sure):
    with pytest.raises(ValueError, match=f"0 < sure < 10 keys, sure is {sure}; fa4 and flash need no such promise"):
        attention_parts.cudnn(*heads(Q, K, V), torch.tensor([4, 9]), None, sure)


# -- what kernels take -------------------------------------------------------------------------------------------------


def problem(kernel: str, batch: int = 1, capability: int = 90, **more):
    q, k, v = heads(Q[:batch], K[:batch], V[:batch])
    lengths = torch.ones(batch, dtype=torch.int32)
    given = {"q": q, "k": k, "v": v, "mask": None, "causal": False, "key_lengths": lengths, "sure": 9, **more}
    return KERNELS[kernel].problem(given, capability)


def test_constraints():
    for kernel in TAKE:
        assert problem(kernel) is None
        assert problem(kernel, causal=True).code == "key_lengths"
        assert problem(kernel, key_lengths=torch.ones(1)).code == "key_lengths"
    for kernel in ("efficient", "fa3", "sage"):
        assert problem(kernel).code == "key_lengths" and "takes no number of keys" in problem(kernel).message
        assert problem(kernel, key_lengths=None) is None
    (grouped,) = heads(K[:1, :, :2])
    for kernel in TAKE:
        assert problem(kernel, batch=2) is None and problem(kernel, k=grouped, v=grouped) is None
    for few in (0, 8, 10):
        assert f"of 10 keys {few} are known to take part" in problem("cudnn", sure=few).message
        assert problem("fa4", sure=few) is None and problem("flash", sure=few) is None


# -- the rewrite -------------------------------------------------------------------------------------------------------


def masked(padding, q, k, v):
    """Attention of the keys up to the text that is there, three times; inputs in the order that graphs take them."""
    n = 9 + padding[:, 9:].sum(dim=1, dtype=torch.int)
    taken = (torch.arange(10).unsqueeze(0) < n.unsqueeze(1)).unsqueeze(1).unsqueeze(1)
    flat = [sdpa(t, k, v, attn_mask=taken) for t in (q, q * 2)]
    return flat[0] + flat[1] + sdpa(q, k, v, attn_mask=torch.where(taken, 0.0, float("-inf")).to(q.dtype))


PADDING = torch.tensor([[1] * 7 + [0] * 3, [1] * 10])


@pytest.mark.parametrize("batch", [1, 2])
def test_attentions_are_rewritten_and_share_their_numbers(batch):
    inputs = PADDING[:batch], Q[:batch], K[:batch], V[:batch]
    module = on_cpu(masked, *inputs)
    sites = seams.run(module.graph, Settings(target="sm90", attention="fa4"))
    assert [(s.status, s.kernel, s.op) for s in sites] == [(Status.FUSED, "fa4", "dkfuse::attention")] * 3
    assert sites[0].shapes["key_lengths"] == [batch] and sites[0].shapes["mask"][-1] == 10
    module.graph.eliminate_dead_code()
    module.recompile()
    found = targets(module)
    assert found.count("dkfuse.attention.default") == 3 and found.count("aten.clamp_min.default") == 1
    assert not [t for t in found if "where" in t or "iota" in t], "the mask is still made"
    numbers = {n.args[4] for n in module.graph.nodes if str(n.target) == "dkfuse.attention.default"}
    assert len(numbers) == 1 and next(iter(numbers)).meta["val"].dtype == torch.int32
    torch.testing.assert_close(module(*inputs)[0], masked(*inputs), rtol=0, atol=0)


def test_numbers_are_bounded_once_in_the_graph():
    """Which is what the call promises, so that the kernel's own bounds cost no launch."""

    def both(n, q, k, v):
        def taken(keys):
            return (torch.arange(keys) < n[:, None])[:, None, None]

        return sdpa(q, k, v, attn_mask=taken(10)), sdpa(q, k[:, :6], v[:, :6], attn_mask=taken(6))

    inputs = torch.tensor([2**40, -9]), Q, K, V
    module = on_cpu(both, *inputs)
    sites = seams.run(module.graph, Settings(target="sm90", attention="fa4"))
    assert [s.kernel for s in sites] == ["fa4"] * 2
    calls = [n for n in module.graph.nodes if str(n.target) == "dkfuse.attention.default"]
    assert all(c.kwargs == {"using": "fa4", "bounded": True} for c in calls)
    graph = module.graph
    graph.erase_node(graph.find_nodes(op="output")[0])
    graph.output(tuple(c.args[4] for c in calls))
    module.recompile()
    found = module(*inputs)
    assert [t.tolist() for t in found] == [[10, 1], [6, 1]]
    assert all(attention_lengths.within(t, 10, True) is t for t in found)
    assert attention_lengths.within(inputs[0], 10, True).tolist() == [10, 1]  # not of the promised form


def test_a_mask_that_is_read_elsewhere_stays_for_it():
    def both(n, q, k, v):
        bias = torch.where(torch.arange(10) < n[:, None], 0.0, float("-inf")).to(q.dtype)[:, None, None]
        return sdpa(q, k, v, attn_mask=bias), bias.exp()

    inputs = torch.tensor([4, 9]), Q, K, V
    module = on_cpu(both, *inputs)
    assert rewritten(module, attention="flash").kernel == "flash"
    for ours, eager in zip(module(*inputs), both(*inputs), strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=0)


def test_attention_of_an_attention():
    def twice(n, q, k, v):
        taken = (torch.arange(10) < n[:, None])[:, None, None]
        return F.scaled_dot_product_attention(sdpa_heads(q, k, v, taken), *heads(k, v), attn_mask=taken)

    def sdpa_heads(q, k, v, taken):
        return F.scaled_dot_product_attention(*heads(q, k, v), attn_mask=taken)

    inputs = torch.tensor([4, 9]), Q, K, V
    module = on_cpu(twice, *inputs)
    sites = seams.run(module.graph, Settings(target="sm90", attention="flash"))
    assert [s.status for s in sites] == [Status.FUSED] * 2
    module.recompile()
    torch.testing.assert_close(module(*inputs)[0], twice(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize("between", [lambda t: t, lambda t: t.relu(), lambda t: t[:, 1:]])
def test_a_result_that_is_read_by_its_strides_stays(between):
    def strided(n, q, k, v):
        taken = (torch.arange(10) < n[:, None])[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=taken)
        return between(out).as_strided((2, 10, 32), (10 * 64, 64, 2))

    inputs = torch.tensor([4, 9]), *(t.contiguous() for t in heads(Q, K, V))
    module = on_cpu(strided, *inputs)
    site = rewritten(module, attention="flash")
    assert (site.status, site.reason.code) == (Status.REJECTED, "layout") and "as_strided" in site.reason.message
    torch.testing.assert_close(module(*inputs)[0], strided(*inputs), rtol=0, atol=0)


def test_torchs_own_kernel_is_another_one_by_numbers_of_keys():
    module = on_cpu(masked, PADDING[:1], Q[:1], K[:1], V[:1])
    sites = seams.run(module.graph, Settings(target="sm90", attention="cudnn"))
    assert [(s.status, s.kernel) for s in sites] == [(Status.FUSED, "cudnn")] * 3
    assert [n.kwargs["sure"] for n in module.graph.nodes if n.target is OP] == [9] * 3

    def few(n, q, k, v):
        taken = torch.arange(10) < n[:, None]
        return sdpa(q, k, v, attn_mask=taken[:, None, None])

    site = rewritten(on_cpu(few, torch.tensor([9, 10]), Q, K, V), attention="cudnn")
    assert (site.status, site.reason.code) == (Status.REJECTED, "key_lengths") and "0 are known" in site.reason.message


def test_inductor_runs_it_and_makes_the_numbers_once():
    from torch._inductor.utils import run_and_get_code

    def attend(padding, q, k, v):  # behind an image's keys, so that numbers are computed
        text = torch.arange(6) < padding[:, 4:].sum(dim=1)[:, None]
        taken = torch.cat([torch.ones(2, 4, dtype=torch.bool), text], 1)[:, None, None]
        return sdpa(q, k, v, attn_mask=taken) + sdpa(k, q, v, attn_mask=taken)

    seen: list = []
    hook = compat.graph_pass(lambda g: seen.extend(seams.run(g, Settings(target="sm90", attention="fa4"))), None)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(attend, options={"post_grad_custom_pre_pass": hook}, dynamic=False)
        out, (code,) = run_and_get_code(compiled, PADDING, Q, K, V)
        torch.testing.assert_close(out, attend(PADDING, Q, K, V), rtol=0, atol=0)
        with torch._dynamo.config.patch(error_on_recompile=True):
            other = PADDING.flip(0)
            torch.testing.assert_close(compiled(other, Q, K, V), attend(other, Q, K, V), rtol=0, atol=0)
    assert [s.kernel for s in seen] == ["fa4"] * 2
    calls = [
        line.split("attention.default(")[1].split(",") for line in code.splitlines() if "attention.default(" in line
    ]
    assert len(calls) == 2 and calls[0][4] == calls[1][4]


def as_a_gpu_traces(op: str, out: float, dtype: torch.dtype = BF16, place: str = "cuda"):
    """HunyuanVideo's mask, made a bias of 0 and `out` by torch, in the graph of a GPU."""
    tokens = 10
    with FakeTensorMode():
        q, k, v = (torch.empty(1, tokens, 4, 64, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(3))
        n = torch.empty(1 if place == "cuda" else (), device=place, dtype=torch.int32)
        index = torch.empty(tokens, device="cuda", dtype=torch.int64)
        fills = [torch.empty((), device="cuda", dtype=dtype) for _ in range(2)]

    def attend(q, k, v, n, index, zero, low):
        behind = (index >= n.unsqueeze(-1)).reshape(1, 1, 1, tokens) if n.dim() else (index >= n).view(1, 1, 1, tokens)
        bias = torch.where(behind, low, zero)
        if op == "efficient":
            bias = F.pad(bias, (0, 6)).narrow(3, 0, tokens).expand(1, 4, tokens, tokens)
            return aten._scaled_dot_product_efficient_attention(q, k, v, bias, False)[0]
        return aten._scaled_dot_product_cudnn_attention(q, k, v, bias, False)[0]

    module = make_fx(attend, decomposition_table=compat.decompositions())(q, k, v, n, index, *fills)
    *_, counted, zero, low = module.graph.find_nodes(op="placeholder")
    made = {  # without a GPU they cannot be traced
        counted: (torch.ops.prims.iota.default, (tokens,), {"start": 0, "step": 1, "dtype": torch.int64}),
        zero: (aten.full.default, ([], 0.0), {"dtype": dtype}),
        low: (aten.full.default, ([], out), {"dtype": dtype}),
    }
    for place, (target, args, kwargs) in made.items():
        with module.graph.inserting_after(low):
            node = module.graph.call_function(target, args, kwargs)
        node.meta["val"] = place.meta["val"]
        place.replace_all_uses_with(node)
    return module


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_masks_as_torch_gives_them_to_its_kernels(dtype):
    for op, out, kernel in (
        ("cudnn", -65504.0, "fa4"),
        ("cudnn", float("-inf"), "fa4"),
        ("efficient", float("-inf"), "flash"),
    ):
        module = as_a_gpu_traces(op, out, dtype)
        site = rewritten(module, attention=kernel)
        assert (site.status, site.kernel, site.op) == (Status.FUSED, kernel, "dkfuse::attention"), site.reason
        (call,) = [n for n in module.graph.nodes if n.target is OP]
        assert call.args[3] is None and call.meta["val"].stride() == (2560, 64, 256, 1)
        assert not [t for t in targets(module) if "iota" in t or "scaled_dot" in t]
    for op, out in (("efficient", -65504.0), ("cudnn", -30000.0)):
        site = rewritten(as_a_gpu_traces(op, out, dtype), attention="fa4")
        assert site.kernel is None and site.attempts[-1].code == "mask_values"


def test_a_number_that_is_on_the_cpu_stays_there():
    """The mask that is made of it on the GPU says which keys take part (`key_choice`)."""
    module = as_a_gpu_traces("cudnn", float("-inf"), place="cpu")
    site = rewritten(module, attention="fa4")
    assert site.kernel == "fa4" and "key_lengths" not in site.shapes and site.shapes["keys"] == [10]
    assert "aten.index.Tensor" in targets(module)


def test_symbolic_tokens_and_samples():
    k, q, v = (t.clone() for t in (K, Q, V))
    inputs = k, torch.tensor([4]), q, v
    for tensor in (k, q, v):
        torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(tensor, 1)

    def attend(k, n, q, v):
        return sdpa(q, k, v, attn_mask=(torch.arange(k.shape[1]) < n[:, None])[:, None, None])

    module = on_cpu(attend, *inputs)
    assert rewritten(module, attention="fa4").kernel == "fa4"
    assert isinstance(module.graph.find_nodes(op="call_function", target=OP)[0].meta["val"].shape[0], torch.SymInt)
    torch.testing.assert_close(module(*_symbols(module, inputs))[0], attend(*inputs), rtol=0, atol=0)


def _symbols(module, inputs):
    """`inputs` as the graph takes them: sizes that stand for symbols first, where it takes them."""
    places = [n for n in module.graph.nodes if n.op == "placeholder"]
    tensors = iter(inputs)
    sizes = {"2": 2, "10": 10}
    found = []
    for place in places:
        value = place.meta["val"]
        found.append(next(tensors) if isinstance(value, torch.Tensor) else sizes[str(value.node.hint)])
    return found


def test_a_mask_that_is_not_proved_says_why():
    bias = torch.zeros(2, 1, 1, 10, dtype=BF16)
    for kernel, code in (("fa4", "mask"), ("auto", "unmeasured")):
        module = on_cpu(lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), Q, K, V, bias)
        site = rewritten(module, attention=kernel)
        assert site.kernel is None and site.reason.code == code
        (why,) = [a for a in site.attempts if a.code == "mask_input"]
        assert why.stage == "semantics" and "an input" in why.message


def test_hunyuan_video_is_rewritten_whole():
    """All but those of its text refiner, whose masks differ from query to query."""
    model, inputs = zoo.build("hunyuan-video", layers=1)
    options = {"dkfuse.remainder": "eager", "dkfuse.target": "sm90", "dkfuse.attention": "fa4"}
    torch.compiler.reset()
    with torch.no_grad(), dkfuse.record() as coverage:
        out = torch.compile(model, backend="dkfuse", options=options, dynamic=False)(**inputs)[0]
        eager = model(**inputs)[0]
        exact = model.double()(**in_fp64(inputs))[0]
    found = [s for s in coverage.seams if s.family == "attention"]
    assert [s.kernel for s in found] == [None, None, "fa4", "fa4"]
    assert all("select_scatter" in s.attempts[-1].message for s in found[:2])
    ours, theirs = ((t.double() - exact).square().mean().sqrt().item() for t in (out, eager))
    assert ours <= 1.1 * theirs


# -- the bench ---------------------------------------------------------------------------------------------------------


def test_shapes_of_the_bench():
    from dkfuse.bench.attention import main, parse

    assert parse("1x24x4608x128") == ((1, 24, 4608, 4608, 128), None, 0)
    assert parse("1X24x25440+256x128", 0.99) == ((1, 24, 25696, 25696, 128), 25439, 25440)
    assert parse("2x16x4096x300x72:77", 0.5) == ((2, 16, 4096, 300, 72), 77, 0)
    for wrong in ("1x24x4608", "1x24x4608x128:0", "1x24x4608x128:4609", "1x24xax128"):
        with pytest.raises(ValueError):
            parse(wrong)
    with pytest.raises(SystemExit):
        main(["1x24x4608x128", "--valid", "1.5"])


# -- the choice --------------------------------------------------------------------------------------------------------

LONG = Row(90, 64, 4, 4096, 4096, {}, {DENSE: 300, "cudnn": 450, "fa4": 500, "flash": 280})
SLOW = Row(90, 64, 4, 10, 10, {"cudnn": 1e-6, "fa4": 3e-6}, {DENSE: 1e-6, "cudnn": 2e-6, "fa4": 1.5e-6})


def chosen(monkeypatch, row: Row, **settings):
    use_rows(monkeypatch, (row,))
    module = on_cpu(masked, PADDING[:1], Q[:1], K[:1], V[:1])
    return seams.run(module.graph, Settings(target="sm90", **settings))[0]


def test_what_was_not_measured_stays(monkeypatch):
    site = chosen(monkeypatch, Row(90, 64, 4, 10, 10, SLOW.tflops))
    assert (site.status, site.reason.code) == (Status.LEFT_TO_INDUCTOR, "unmeasured")
    assert "by numbers of keys" in site.reason.message and "cudnn with a dense mask" in site.reason.message
    assert chosen(monkeypatch, LONG).reason.code == "unmeasured"  # not near


def test_the_fastest_by_numbers_of_keys_is_taken(monkeypatch):
    unhurried(monkeypatch)
    site = chosen(monkeypatch, SLOW)
    assert (site.status, site.kernel) == (Status.FUSED, "cudnn")  # by the speeds with numbers, not the others
    even = Row(90, 64, 4, 10, 10, SLOW.tflops, {DENSE: 1e-6, "cudnn": 1.01e-6})
    assert chosen(monkeypatch, even).reason.code == "fastest"
    assert chosen(monkeypatch, SLOW, attention="sdpa").reason.code == "disabled"
    fa4 = Row(90, 64, 4, 10, 10, SLOW.tflops, {DENSE: 1e-6, "cudnn": 2e-6, "fa4": 3e-6})
    assert [chosen(monkeypatch, fa4, attention=a).kernel for a in ("auto", "torch")] == ["fa4", "cudnn"]
    site = chosen(monkeypatch, SLOW, attention="torch", roundings="eager")
    assert site.kernel is None and "rounding" in [a.code for a in site.attempts]


def test_rows_with_numbers_of_keys_say_nothing_of_others(monkeypatch):
    use_rows(monkeypatch, (Row(90, 64, 4, 10, 10, {}, SLOW.lengths),))
    assert rewritten(on_cpu(sdpa, Q[:1], K[:1], V[:1])).reason.code == "unmeasured"


def test_kernels_are_timed_by_numbers_of_keys(monkeypatch):
    unhurried(monkeypatch)
    asked = []
    found = {DENSE: 900.0, "cudnn": 500.0, "fa4": 400.0, "flash": 1000.0}
    monkeypatch.setattr(attention_choice, "_measures", lambda call: call.lengths is not None)

    def times(tensors, causal, kernels, folder, lengths, sure, reorders):
        assert not reorders
        asked.append((kernels, lengths, sure))
        return {k: found[k] for k in kernels}

    monkeypatch.setattr(attention_measure, "times", times)
    site = chosen(monkeypatch, LONG)
    assert (site.kernel, asked[0]) == ("fa4", ([DENSE, "cudnn", "flash", "fa4"], True, 9))
    found["fa4"] = found["cudnn"] = 890.0
    assert chosen(monkeypatch, LONG).reason.code == "fastest"


def test_what_is_timed(monkeypatch, tmp_path):
    """All keys take part; torch's rival gets the mask that says so."""
    given = []

    def call(operands, causal, kernel, sure, order):
        assert order is None
        given.append((kernel, operands[3:]))
        assert sure == 5
        raise RuntimeError("no GPU")

    monkeypatch.setattr(attention_measure, "_call", call)
    monkeypatch.setattr(attention_measure, "_known", {})
    q, k, _ = heads(Q, K[:, :6], V)
    found = attention_measure.times([q, k, k], False, [DENSE, "fa4"], str(tmp_path), True, 5)
    assert set(found.values()) == {float("inf")}
    (dense, (mask, none)), (fa4, (unmasked, numbers)) = given
    assert (dense, fa4, none, unmasked) == (DENSE, "fa4", None, None)
    assert mask.shape == (2, 1, 1, 6) and not mask.any() and numbers.tolist() == [6, 6]
