"""Direct calls of FlashAttention 4's compiled kernels on a GPU: bit for bit what its own function gives."""

from __future__ import annotations

import pytest
import torch

import dkfuse.kernels.attention  # noqa: F401  (registers the op)
from dkfuse.kernels import attention_fa4, attention_kept, attention_lengths, attention_run
from dkfuse.kernels.attention_kernels import version_of

from .on_device import random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(version_of("fa4") not in attention_kept.VERSIONS, reason="FlashAttention 4 is not there"),
]
BF16, FP16 = torch.bfloat16, torch.float16
OP = torch.ops.dkfuse.attention

# (batch, heads, heads of k and v, queries, keys, head_dim), dtype, how they lie in memory, options
CASES = {
    "plain": ((1, 4, 4, 300, 300, 128), BF16, "tokens", {}),
    "fp16": ((2, 4, 4, 300, 300, 64), FP16, "tokens", {}),
    "d72": ((1, 16, 16, 512, 300, 72), BF16, "tokens", {}),
    "d256": ((1, 2, 2, 200, 200, 256), BF16, "tokens", {}),
    "text": ((2, 4, 4, 300, 77, 128), BF16, "heads", {}),
    "grouped": ((2, 8, 2, 300, 300, 128), BF16, "tokens", {"gqa": True}),
    "causal": ((2, 4, 4, 300, 300, 64), BF16, "packed", {"causal": True}),
    "grouped and causal": ((1, 8, 4, 400, 400, 64), BF16, "tokens", {"gqa": True, "causal": True}),
    "scaled": ((1, 4, 4, 64, 64, 96), BF16, "packed", {"scale": 0.3}),
    "a part": ((2, 4, 4, 300, 300, 128), BF16, "part", {}),
    "lengths": ((3, 4, 4, 300, 300, 128), BF16, "packed", {"key_lengths": (7, 300, 128)}),
    "long": ((1, 8, 8, 4096, 4096, 128), BF16, "tokens", {}),
}


def operands(case: str, seed: int = 0) -> tuple[list[torch.Tensor], dict]:
    (batch, heads, groups, queries, keys, dim), dtype, layout, options = CASES[case]
    options = dict(options)
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor(options["key_lengths"], dtype=torch.int32, device="cuda")
    sizes = ((queries, heads), (keys, groups), (keys, groups))
    if layout == "packed":
        made = list(random(batch, queries, 3, heads, dim, dtype=dtype, seed=seed).unbind(2))
    else:
        more = 24 if layout == "part" else 0
        made = [random(batch, s + more, h, dim, dtype=dtype, seed=3 * seed + i) for i, (s, h) in enumerate(sizes)]
        made = [t[:, 8 : 8 + s] if more else t for t, (s, _) in zip(made, sizes, strict=True)]
    made = [t.transpose(1, 2) for t in made]
    return [t.contiguous() for t in made] if layout == "heads" else made, options


def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict) -> torch.Tensor:
    if "key_lengths" in options:
        return attention_lengths.fa4(q, k, v, options["key_lengths"], options.get("scale"))
    return attention_run.fa4(q, k, v, options.get("causal", False), options.get("scale"))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.stride() == b.stride() and torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(attention_fa4, "_direct", {})


@pytest.fixture
def direct(monkeypatch):
    """Fail where their function is called."""

    def forbid() -> None:
        def called(*_, **__):
            raise AssertionError("FlashAttention's own function is called")

        monkeypatch.setattr(attention_fa4, "_theirs", called)

    return forbid


@pytest.mark.parametrize("case", CASES)
def test_bit_for_bit_what_their_function_gives(case, direct):
    (q, k, v), options = operands(case)
    OP(q, k, v, None, **options, using="fa4")
    assert None not in attention_fa4._direct.values()
    direct()
    for seed in (1, 2):
        (q, k, v), options = operands(case, seed)
        expected = theirs(q, k, v, options)
        assert expected.float().std() > 0
        assert same(OP(q, k, v, None, **options, using="fa4"), expected)
        if "key_lengths" in options:
            assert same(OP(q, k, v, None, **options, using="fa4", bounded=True), expected)
        with torch.inference_mode():
            assert same(OP(q, k, v, None, **options, using="fa4"), expected)


def test_the_current_stream_is_used(direct):
    """A long kernel on another stream is waited for there: what is read is what it wrote."""
    (q, k, v), _ = operands("long")
    OP(q, k, v, None, using="fa4")
    direct()
    (q2, k2, v2), _ = operands("long", 1)
    expected = theirs(q, k, v, {}), theirs(q2, k2, v2, {})
    held = torch.zeros_like(q), torch.zeros_like(q2)
    torch.cuda.synchronize()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    found = []
    for stream, into, (a, b, c) in zip(streams, held, ((q, k, v), (q2, k2, v2)), strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # some 10 ms in which `into` is still zero
            into.copy_(a)
            found.append(OP(into, b, c, None, using="fa4"))
    torch.cuda.synchronize()
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_in_a_cuda_graph(direct):
    (q, k, v), options = operands("lengths")
    plain, _ = operands("plain")
    for _ in range(2):
        OP(q, k, v, None, **options, using="fa4")
        OP(*plain, None, using="fa4")
    direct()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = OP(q, k, v, None, **options, using="fa4")
        second = OP(*plain, None, using="fa4")
    for seed, numbers in ((1, (1, 2, 3)), (2, (300, 200, 100))):
        new, _ = operands("lengths", seed)
        for tensor, value in zip((q, k, v), new, strict=True):
            tensor.copy_(value)
        for tensor, value in zip(plain, operands("plain", seed)[0], strict=True):
            tensor.copy_(value)
        options["key_lengths"].copy_(torch.tensor(numbers, dtype=torch.int32))
        graph.replay()
        assert same(first, theirs(q, k, v, options)) and same(second, theirs(*plain, {}))


def test_nothing_is_learned_in_a_capture():
    (q, k, v), _ = operands("d256")
    attention_run.fa4(q, k, v, False, None)  # compiled
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OP(q, k, v, None, using="fa4")
    graph.replay()
    assert not attention_fa4._direct and same(out, attention_run.fa4(q, k, v, False, None))


def test_no_host_synchronisation(direct):
    (q, k, v), options = operands("lengths")
    OP(q, k, v, None, **options, using="fa4")
    direct()
    torch.cuda.set_sync_debug_mode("error")
    try:
        OP(q, k, v, None, **options, using="fa4")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graphs_of_inductor():
    """Its pool of graphs minds memory that a call keeps for itself."""
    (q, k, v), _ = operands("a part")

    def attend(q, k, v):
        return OP(q * 2, k, v, None, using="fa4") + 1

    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(attend, mode="reduce-overhead", dynamic=False)
        for _ in range(4):
            assert torch.equal(compiled(q, k, v), attend(q, k, v))
