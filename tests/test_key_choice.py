"""Attention whose mask chooses keys: what is proved of masks, the order of keys, the op, the rewrite, the choice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

import dkfuse
import dkfuse.kernels.attention  # registers the op
from dkfuse import Settings, Status, compat, seams, zoo
from dkfuse.seams import attention_choice, attention_measure
from dkfuse.seams.attention_table import COPY, DENSE, Row
from dkfuse.seams.key_choice import KeyChoice, choice
from dkfuse.seams.key_lengths import Unproved
from dkfuse.seams.key_order import order_of_keys, zero_where_nobody_asks

from .attentions import BF16, in_fp64, install, on_cpu, rewritten, sdpa, targets, unhurried, use_rows
from .masks import INF, KEYS, SPELLINGS, arange, bias, mask_of, traced

aten = torch.ops.aten
OP = torch.ops.dkfuse.attention.default
HEADS, QUERIES = 2, 3
Q, K, V = (torch.randn(2, 10, 4, 64, dtype=BF16, generator=torch.Generator().manual_seed(i)) for i in range(3))
PADDING = torch.tensor([[1] * 5 + [0] * 5, [0, 1] * 5])


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    use_rows(monkeypatch, ())
    install(monkeypatch, fa4="4.0.0b20", fa3="3.0", sage="2.2")


# -- what is proved ----------------------------------------------------------------------------------------------------


def chosen(build, *inputs: torch.Tensor, batch: int = 2, queries: int = QUERIES) -> tuple[fx.GraphModule, KeyChoice]:
    module = traced(build, *inputs)
    return module, choice(mask_of(module), batch, queries, KEYS)


def same(build, *calls: tuple[torch.Tensor, ...], queries: int = QUERIES) -> KeyChoice:
    """Assert that order, number and askers of what is proved are the mask, for inputs of equal shapes."""
    module, found = chosen(build, *calls[0], queries=queries)
    graph = module.graph
    (output,) = graph.find_nodes(op="output")
    with graph.inserting_before(output):
        q = graph.create_node("get_attr", "q")
        with next(n.meta["val"] for n in graph.nodes if "val" in n.meta).fake_mode:
            q.meta["val"] = torch.empty(2, HEADS, queries, 8)
        known: dict = {}
        order, count = order_of_keys(graph, found, q, known)
        assert order_of_keys(graph, found, q, known) == (order, count), "made twice"
        rows = zero_where_nobody_asks(graph, found, q, known)
        assert (rows is q) == (not found.queries)
        asks = known[found.queries, "queries"] if found.queries else None
    output.args = ((order, count, asks),)
    for made in (rows, q):
        if not made.users:
            graph.erase_node(made)
    graph.eliminate_dead_code()
    module.recompile()
    for inputs in calls:
        order, count, asks = module(*inputs)
        assert (order.dtype, count.dtype, order.shape) == (torch.int64, torch.int32, (2, KEYS))
        assert order.sort().values.equal(arange().expand(2, -1)), "no order of all keys"
        mask = build(*inputs)
        mask = (mask if mask.dtype == torch.bool else mask == 0).expand(2, HEADS, queries, KEYS)
        taken = torch.zeros(2, KEYS, dtype=torch.bool)
        for sample in range(2):
            taken[sample, order[sample, : count[sample]].long()] = True
        none = ~mask.any(-1).any(-1).any(-1)
        assert (count[none] == 1).all()
        taken[none] = False
        wanted = taken[:, None, None] if asks is None else taken[:, None, None] & asks
        torch.testing.assert_close(mask, wanted.expand_as(mask), rtol=0, atol=0)
    return found


def both_sides(p: torch.Tensor, before: int) -> torch.Tensor:
    """HunyuanVideo-1.5: padded text is masked as keys and as queries, the video's tokens before it are not."""
    taken = F.pad(p, (before, 0), value=True).bool()
    across = taken.view(p.shape[0], 1, 1, KEYS).repeat(1, 1, KEYS, 1)
    return (across & across.transpose(2, 3)).bool()


FORMS = {
    "an input": (lambda n, p: p[:, None, None].bool(), 0),
    "an input as bias": (lambda n, p: bias(p[:, None, None].bool()), 0),
    "as numbers": (lambda n, p: torch.where(p[:, None, None] != 0, 0.0, INF), 0),
    "filled": (lambda n, p: torch.zeros(2, 1, 1, KEYS).masked_fill((p == 0)[:, None, None], INF), 0),
    "least fp32 in bf16": (
        lambda n, p: torch.where(p[:, None, None] > 0, 0.0, torch.finfo(torch.float32).min).to(BF16),
        0,
    ),
    "one sample's": (lambda n, p: p[:1, None, None].bool(), 0),
    "padded in front": (lambda n, p: F.pad(p[:, :8].bool(), (4, 0), value=True)[:, None, None], 4),
    "padded numbers": (lambda n, p: F.pad(p[:, :8], (4, 0), value=1).bool()[:, None, None], 4),
    "padded with nothing": (lambda n, p: F.pad(p[:, :8].bool(), (4, 0), value=False)[:, None, None], 0),
    "padded behind": (lambda n, p: F.pad(p[:, :8].bool(), (0, 4), value=True)[:, None, None], 4),
    "joined": (lambda n, p: torch.cat([torch.ones(2, 4, dtype=torch.long), p[:, :8]], 1)[:, None, None].bool(), 4),
    "text first": (lambda n, p: torch.cat([p[:, :8].bool(), torch.ones(2, 4, dtype=torch.bool)], 1)[:, None, None], 4),
    "around": (
        lambda n, p: torch.cat([torch.ones(2, 3, dtype=torch.bool), p[:, :7].bool(), torch.ones(2, 2).bool()], 1)[
            :, None, None
        ],
        5,
    ),
    "not": (lambda n, p: (~F.pad(p[:, :8] == 0, (4, 0), value=False))[:, None, None], 4),
    "and with all": (lambda n, p: p[:, None, None].bool() & torch.ones(1, 1, 1, KEYS, dtype=torch.bool), 0),
    "or with none": (lambda n, p: ~(p[:, None, None].bool() | torch.zeros(2, 1, 1, 1, dtype=torch.bool)), 0),
    "expanded": (lambda n, p: p.bool()[:, None, None].expand(-1, HEADS, QUERIES, -1), 0),
    "a suffix": (lambda n, p: (arange() >= n[:, None])[:, None, None], 0),
    "two numbers": (lambda n, p: ((arange() < n[:, None]) ^ (arange() < 3))[:, None, None], 0),
    "aligned": (lambda n, p: F.pad(bias(p.bool()), (0, 4))[..., :KEYS][:, None, None], 0),
    "two choices": (lambda n, p: p[:, None, None].bool() & (arange() < n[:, None])[:, None, None], 0),
    "two choices behind others": (
        lambda n, p: (
            F.pad(p[:, :8].bool(), (4, 0), value=True)[:, None, None]
            & F.pad(p[:, 1:8].flip(1).bool(), (4, 1), value=True)[:, None, None]
        ),
        4,
    ),
    "multiplied": (lambda n, p: p[:, None, None].bool() * (arange() < n[:, None])[:, None, None], 0),
    "transposed": (lambda n, p: p.t().contiguous().t()[:, None, None].bool(), 0),
    "samples last": (lambda n, p: (p.t() != 0).permute(1, 0)[:, None, None], 0),
}


@pytest.mark.parametrize("name", FORMS)
def test_choices_of_keys(name):
    build, sure = FORMS[name]
    some = torch.tensor([[1, 0, 0, 1] * 3, [0] * 12])
    calls = ((torch.tensor([4, 9]), some), (torch.tensor([0, 12]), 1 - some), (torch.tensor([4, 9]), some * 5))
    found = same(build, *calls)
    assert found.sure == sure and not found.queries


@pytest.mark.parametrize("name", SPELLINGS)
def test_numbers_of_keys_are_choices_too(name):
    """Any mask that `key_lengths` proves could be read as a choice, of keys that need no order."""
    p = torch.tensor([[1] * 6 + [0] * 6, [1] * 12])
    same(SPELLINGS[name], (torch.tensor([4, 9]), p), (torch.tensor([1, 12]), p))


@pytest.mark.parametrize("before", [0, 5])
def test_queries_that_ask_for_no_key(before):
    some = torch.tensor([[1, 0, 0, 1] * 3, [0] * 12])[:, before:]
    found = same(lambda n, p: both_sides(p, before), (some, some), (some, 1 - some), queries=KEYS)
    assert found.queries == found.keys and found.sure == before


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_flags(data):
    before, after = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    flags = st.lists(st.booleans(), min_size=KEYS - before - after, max_size=KEYS - before - after)
    p = torch.tensor([data.draw(flags), data.draw(flags)])
    negated, as_bias = data.draw(st.booleans()), data.draw(st.booleans())

    def build(n, p):
        taken = F.pad(~p if negated else p, (before, after), value=not negated)
        taken = ~taken if negated else taken
        return (bias(taken) if as_bias else taken)[:, None, None]

    assert same(build, (p, p)).sure == before + after if not negated else True


NEAR_MISSES = {
    "a bias that is an input": (lambda n, p: p.float()[:, None, None], "says nothing", None),
    "finite": (
        lambda n, p: torch.where(p[:, None, None] != 0, 0.0, torch.finfo(torch.float32).min),
        "only 0 and -inf",
        "mask_values",
    ),
    "minus 10000": (lambda n, p: (1 - p.float())[:, None, None] * -10000.0, "mul", None),
    "chosen keys biased": (lambda n, p: torch.where(p[:, None, None] != 0, 1.0, INF), "only 0 and -inf", None),
    "per head": (lambda n, p: (p[0, :HEADS, None, None] != 0).expand(2, HEADS, 1, KEYS), "head", None),
    "causal": (lambda n, p: arange()[None, None, None] <= arange(3)[None, None, :, None], "at once", None),
    "causal and chosen": (
        lambda n, p: p[:, None, None].bool() & (arange()[None, None, None] <= arange(3)[None, None, :, None]),
        "at once",
        None,
    ),
    "or of both sides": (
        lambda n, p: p[:, None, None].bool() | p[:, None, :3, None].bool(),
        "at once",
        None,
    ),
    "queries alone": (lambda n, p: p[:, None, :3, None].bool(), "chooses no keys", None),
    "all keys": (lambda n, p: (n > 3)[:, None, None, None].expand(-1, 1, 1, KEYS), "the same for every key", None),
    "a number without flags": (lambda n, p: p[:, None, None] * 2, "int64", None),
    "other samples": (lambda n, p: p.repeat(2, 1)[:, None, None].bool(), "samples", None),
    "fewer keys": (lambda n, p: p[:, None, None, :11].bool(), "11 flags", None),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_is_no_choice_says_why(name):
    build, said, code = NEAR_MISSES[name]
    with pytest.raises(Unproved, match=said) as why:
        chosen(build, torch.tensor([4, 9]), torch.ones(2, KEYS, dtype=torch.long))
    assert code is None or why.value.code == code


# -- the rewrite -------------------------------------------------------------------------------------------------------


def masked(p, q, k, v):
    taken = p.bool()[:, None, None]
    return sdpa(q, k, v, attn_mask=taken) + sdpa(q * 2, k, v, attn_mask=bias(taken))


def padded_text(p, q, k, v):
    """Of keys of which the last may not take part, nor as queries."""
    taken = F.pad(p, (10 - p.shape[1], 0), value=True).bool()
    across = taken.view(-1, 1, 1, 10).repeat(1, 1, 10, 1)
    return sdpa(q, k, v, attn_mask=across & across.transpose(2, 3)) + sdpa(q * 2, k, v, attn_mask=taken[:, None, None])


@pytest.mark.parametrize("function", [masked, padded_text])
@pytest.mark.parametrize("batch", [1, 2])
def test_attentions_are_rewritten_and_share_their_order(batch, function):
    p = PADDING[:batch] if function is masked else PADDING[:batch, 3:]
    inputs = p, Q[:batch], K[:batch], V[:batch]
    module = on_cpu(function, *inputs)
    sites = seams.run(module.graph, Settings(target="sm90", attention="fa4"))
    assert [(s.status, s.kernel, s.op) for s in sites] == [(Status.FUSED, "fa4", "dkfuse::attention")] * 2
    assert sites[0].shapes["keys"][-1] == p.shape[1] and sites[0].shapes["mask"][-1] == 10
    module.graph.eliminate_dead_code()
    module.recompile()
    found = targets(module)
    assert [found.count(t) for t in ("dkfuse.attention.default", "aten.index.Tensor")] == [2, 4]
    for call in module.graph.find_nodes(op="call_function", target=OP):
        assert all(call.args[i].meta["val"].transpose(1, 2).is_contiguous() for i in (1, 2))
    assert found.count("aten.sort.stable") == 1 and found.count("aten.where.self") == (function is padded_text)
    for flags in (p, 1 - p, torch.ones_like(p)):
        given = flags, *inputs[1:]
        some = flags.any(1) | (p.shape[1] < 10)  # a sample without a key is defined by no one
        torch.testing.assert_close(module(*given)[0][some], function(*given)[some], atol=2e-2, rtol=2e-2)


def test_a_query_without_keys_is_zero():
    inputs = PADDING[:, 3:] * 0, Q, K, V
    module = on_cpu(padded_text, *inputs)
    seams.run(module.graph, Settings(target="sm90", attention="fa4"))
    (where,) = module.graph.find_nodes(op="call_function", target=aten.where.self)
    (output,) = module.graph.find_nodes(op="output")
    output.args = ((where,),)
    module.graph.eliminate_dead_code()
    module.recompile()
    (out,) = module(*inputs)
    assert not out[:, :, 3:].any() and out[:, :, :3].abs().amax(-1).all()


def test_cudnn_takes_a_choice_among_the_last_keys():
    """In two parts, of which the order makes the sure keys the first one, wherever they are."""

    def behind(p, q, k, v):
        return sdpa(q, k, v, attn_mask=torch.cat([p[:, :1].bool(), torch.ones(2, 9).bool()], 1)[:, None, None])

    module = on_cpu(behind, PADDING, Q, K, V)
    site = rewritten(module, attention="cudnn")
    assert (site.status, site.kernel) == (Status.FUSED, "cudnn"), site.reason
    (call,) = module.graph.find_nodes(op="call_function", target=OP)
    assert call.kwargs["sure"] == 9 and call.kwargs["bounded"]
    site, _ = seams.run(on_cpu(masked, PADDING, Q, K, V).graph, Settings(target="sm90", attention="cudnn"))
    assert (site.status, site.reason.code) == (Status.REJECTED, "key_lengths")


def test_symbolic_tokens_and_samples():
    k, p, q, v = (t.clone() for t in (K, PADDING, Q, V))
    for tensor in (k, q, v, p):
        torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(tensor, 1)

    def attend(k, p, q, v):
        return sdpa(q, k, v, attn_mask=p[:, None, None] != 0)

    seen = []

    def hook(graph: fx.Graph) -> None:
        seen.extend(seams.run(graph, Settings(target="sm90", attention="fa4")))

    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(attend, options={"post_grad_custom_pre_pass": compat.graph_pass(hook, None)})
        torch.testing.assert_close(compiled(k, p, q, v), attend(k, p, q, v), atol=2e-2, rtol=2e-2)
        with torch._dynamo.config.patch(error_on_recompile=True):
            fewer = [t[:, :7].repeat(2, 1, 1, 1) if t.dim() == 4 else t[:, :7].repeat(2, 1) for t in (k, p, q, v)]
            torch.testing.assert_close(compiled(*fewer), attend(*fewer), atol=2e-2, rtol=2e-2)
    assert [s.kernel for s in seen] == ["fa4"]


def test_hunyuan_video_15_is_rewritten_whole():
    model, inputs = zoo.build("hunyuan-video-15", layers=1)
    inputs["encoder_attention_mask"][:, 3:] = 0
    options = {"dkfuse.remainder": "eager", "dkfuse.target": "sm90", "dkfuse.attention": "fa4"}
    torch.compiler.reset()
    with torch.no_grad(), dkfuse.record() as coverage:
        out = torch.compile(model, backend="dkfuse", options=options, dynamic=False)(**inputs)[0]
        eager = model(**inputs)[0]
        exact = model.double()(**in_fp64(inputs))[0]
    found = [s for s in coverage.seams if s.family == "attention"]
    assert found and [s.kernel for s in found] == ["fa4"] * len(found)
    ours, theirs = ((t.double() - exact).square().mean().sqrt().item() for t in (out, eager))
    assert ours <= 1.1 * theirs


# -- the choice of a kernel --------------------------------------------------------------------------------------------

SLOW = Row(90, 64, 4, 10, 10, {"cudnn": 1e-6, "fa4": 3e-6}, {DENSE: 1e-6, "cudnn": 2e-6, "fa4": 1.5e-6})


def test_bringing_keys_in_order_counts(monkeypatch):
    unhurried(monkeypatch)
    inputs = PADDING[:1], Q[:1], K[:1], V[:1]
    use_rows(monkeypatch, (SLOW,))
    module = on_cpu(masked, *inputs)
    assert {s.kernel for s in seams.run(module.graph, Settings(target="sm90"))} == {"fa4"}
    took = 4e-6 * 4 * 10 * 10 * 64 / 1.5e-6
    moved = 2 * 2 * (10 * 4 * 64 * 2)
    monkeypatch.setattr("dkfuse.seams.attention_table.COPY", moved / took)  # as long as the attention itself
    site, _ = seams.run(on_cpu(masked, *inputs).graph, Settings(target="sm90"))
    assert site.kernel is None and site.reason.code == "fastest", site.reason
    assert COPY > 1e6


def test_reordering_is_timed(monkeypatch, tmp_path):
    given = []

    def call(operands, causal, kernel, sure, order=None):
        given.append((kernel, None if order is None else order.tolist()))
        raise RuntimeError("no GPU")

    monkeypatch.setattr(attention_measure, "_call", call)
    monkeypatch.setattr(attention_measure, "_known", {})
    q, k = (t.transpose(1, 2) for t in (Q, K[:, :3]))
    attention_measure.times([q, k, k], False, [DENSE, "fa4"], str(tmp_path), True, 0, True)
    assert given == [(DENSE, None), ("fa4", [0, 1, 2])]
    monkeypatch.undo()
    operands = [q, k, k, None, torch.tensor([2, 3])]
    made = attention_measure._call(operands, False, "fa4", 0, torch.tensor([2, 1, 0]))
    expected = F.scaled_dot_product_attention(q[1:], k[1:], k[1:])
    torch.testing.assert_close(made[1:], expected, atol=2e-2, rtol=2e-2)


def test_max_autotune_times_what_is_reordered(monkeypatch):
    unhurried(monkeypatch)
    asked = []
    monkeypatch.setattr(attention_choice, "_measures", lambda call: call.choice is not None)

    def times(tensors, causal, kernels, folder, lengths, sure, reorders):
        asked.append((kernels, lengths, sure, reorders, tensors[1].transpose(1, 2).is_contiguous()))
        return dict.fromkeys(kernels, 900.0) | {"fa4": 400.0}

    monkeypatch.setattr(attention_measure, "times", times)
    module = on_cpu(masked, PADDING, *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (Q, K, V)))
    assert {s.kernel for s in seams.run(module.graph, Settings(target="sm90"))} == {"fa4"}
    assert asked[0] == ([DENSE, "flash", "fa4"], True, 0, True, True)
