"""The seam of a SwiGLU that goes into the GEMM before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dkfuse
from dkfuse import Status, zoo
from dkfuse.memory import UnpackedWarning

from .gemms import TESTED, calls, counts, install, of_gemms, on_gpu, rewritten
from .harness import BF16, FP16, FP32, check_numerics, compiled, exact, rms, run, spell

INPUTS = "x:BLI w:QI b:Q"
pytestmark = pytest.mark.usefixtures("quack")


@pytest.fixture
def quack(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def gated(function: Callable[..., Any], args: Any, **options: Any) -> tuple[tuple[Tensor, ...], dkfuse.Coverage]:
    return run(function, args, **{"target": "sm90", "gemm": "quack", **options})


# -- spellings ---------------------------------------------------------------------------------------------------------


def chunked(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = F.linear(x, w).chunk(2, -1)
    return F.silu(gate) * up


def up_first(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    up, gate = F.linear(x, w, b).chunk(2, -1)
    return up * F.silu(gate)


def split(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = F.linear(x, w, b).split([96, 96], dim=2)
    return up * F.silu(gate)


def sliced(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    return F.silu(h[..., : h.shape[-1] // 2]) * h[..., h.shape[-1] // 2 :]


def by_sigmoid(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = F.linear(x, w)
    return h[..., :96] * (h[..., 96:] * torch.sigmoid(h[..., :96]))


def by_exp(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = F.linear(x, w, b).chunk(2, -1)
    return up * gate * torch.reciprocal(torch.exp(-gate) + 1)


def quotient(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = F.linear(x, w, b).chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def in_fp32(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = F.linear(x, w).chunk(2, -1)
    return F.silu(gate.float()).to(x.dtype) * up


def all_in_fp32(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = F.linear(x, w, b).float().chunk(2, -1)
    return (F.silu(gate) * up).to(x.dtype)


def flat(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = F.linear(x.flatten(0, 1), w, b).chunk(2, -1)
    return (F.silu(gate) * up).unflatten(0, x.shape[:2])


def bias_apart(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = (x @ w.mT + b).chunk(2, -1)
    return F.silu(gate) * up


def slice_of_a_sum(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = F.linear((x * 2)[:, 1:] + 1, w, b).chunk(2, -1)
    return F.silu(gate) * up


SPELLINGS = (
    chunked, up_first, split, sliced, by_sigmoid, by_exp, quotient, in_fp32, all_in_fp32, flat, bias_apart,
    slice_of_a_sum,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("function", SPELLINGS, ids=lambda f: f.__name__)
def test_swiglu_moves_into_the_linear(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    args = spell(INPUTS, dtype)
    results, coverage = gated(function, args)
    assert counts(coverage) == {"swiglu_epilogue": 1}
    (site,) = of_gemms(coverage)
    assert (site.op, site.kernel, site.shapes["weight"]) == ("dkfuse::linear", "quack", [192, 64])
    assert site.bytes_before is not None and site.bytes_after is not None and site.bytes_before > site.bytes_after
    check_numerics(function, args, results)


@pytest.mark.parametrize(
    ("function", "act"), [(chunked, "silu_first"), (up_first, "silu_second"), (quotient, "silu_first")]
)
def test_a_graph_of_a_gpu_at_a_measured_size(function: Callable[..., Tensor], act: str) -> None:
    module = on_gpu(function, (1, 4352, 3072), (16384, 3072), (16384,))
    (site,) = rewritten(module)
    assert (site.family, site.status, calls(module)) == ("swiglu_epilogue", Status.FUSED, [(act, "quack", "128x192")])
    assert not any(part in str(module.graph) for part in ("exp", "mul", "aten.mm", "aten.addmm"))


def test_it_rounds_less_than_eager() -> None:
    x, w, b = spell(INPUTS)
    args = [x, w * 0.1, b]
    results, _ = gated(sliced, args)
    (reference,) = exact(sliced, args)
    assert rms(results[0] - reference) < 0.7 * rms(sliced(*args) - reference)


def test_symbolic_tokens() -> None:
    class FeedForward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(64, 192), nn.Linear(96, 64)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.inner(x).chunk(2, -1)
            return self.out(F.silu(gate) * up)

    module = FeedForward().to(BF16).requires_grad_(False)
    torch.compiler.reset()
    with torch.no_grad(), dkfuse.record() as coverage:
        function = compiled(module, dynamic=True, target="sm90", gemm="quack")
        for length in (6, 5, 9):
            x = torch.randn(3, length, 64).to(BF16)
            check_numerics(module, [x], (function(x),))
    assert counts(coverage) == {"swiglu_epilogue": 1, "gemm_kernel": 1}


# -- what it must leave ------------------------------------------------------------------------------------------------


def gelu_gate(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = F.linear(x, w, b).chunk(2, -1)
    return F.gelu(gate) * up


def scaled_sigmoid(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = F.linear(x, w, b).chunk(2, -1)
    return gate * torch.sigmoid(1.702 * gate) * up


def glu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.glu(F.linear(x, w, b), -1)


def gate_of_another(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    a, c = F.linear(x, w, b).chunk(2, -1)
    return F.silu(a) * (x[..., :1] * c)


def dropout_between(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = F.linear(x, w, b).chunk(2, -1)
    return F.silu(F.dropout(gate, 0.5)) * up


def two_plus_exp(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = F.linear(x, w, b).chunk(2, -1)
    return gate / (2 + torch.exp(-gate)) * up


def positive_exp(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = F.linear(x, w, b).chunk(2, -1)
    return gate / (1 + torch.exp(gate)) * up


def rows_apart(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    return F.silu(h[:1]) * h[1:]


def every_row_with_every_other(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = F.linear(x, w, b).chunk(2, -1)
    return F.silu(gate).reshape(12, 1, 96) * up.reshape(1, 12, 96)


def one_row_for_all(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = F.linear(x[:1, :1], w, b).chunk(2, -1)
    return F.silu(gate.expand(2, 6, 96)) * up


def itself(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    return F.silu(h) * h


def of_two_inputs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.silu(F.linear(x, w, b)) * F.linear(x + 1, w, b)


@pytest.mark.parametrize(
    "function",
    [
        gelu_gate, scaled_sigmoid, glu, gate_of_another, dropout_between, two_plus_exp, positive_exp, rows_apart,
        every_row_with_every_other, one_row_for_all, itself, of_two_inputs,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_what_is_no_swiglu(function: Callable[..., Tensor]) -> None:
    args = spell(INPUTS)
    torch.manual_seed(0)
    results, coverage = gated(function, args, gemm="auto")
    assert counts(coverage) == {}
    if function is not dropout_between:
        check_numerics(function, args, results)


def gate_read(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = F.linear(x, w, b).chunk(2, -1)
    return F.silu(gate) * up, gate * 2


def linear_returned(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    h = F.linear(x, w, b)
    return F.silu(h[..., :96]) * h[..., 96:], h


def silu_read(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = F.linear(x, w, b).chunk(2, -1)
    silu = F.silu(gate)
    return silu * up, silu + 1


def kept_in_fp32(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = F.linear(x, w, b).float().chunk(2, -1)
    return F.silu(gate) * up


def through_fp16(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = F.linear(x, w, b).chunk(2, -1)
    return (F.silu(gate.half()) * up.half()).to(x.dtype)


def three_parts(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up, _ = F.linear(x, w, b).chunk(3, -1)
    return F.silu(gate) * up


def slice_of_an_input(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    gate, up = F.linear(x[:, 1:], w, b).chunk(2, -1)
    return F.silu(gate) * up


def strided_bias(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return sliced(x, w, b.repeat_interleave(2)[::2])


def two_weights(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.silu(F.linear(x, w)) * F.linear(x, w + 1)


def one_bias(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.silu(F.linear(x, w, b)) * F.linear(x, w + 1)


@pytest.mark.parametrize(
    ("function", "options", "expected"),
    [
        (gate_read, {}, "rejected:escapes"),
        (linear_returned, {}, "rejected:escapes"),
        (silu_read, {}, "rejected:escapes"),
        (kept_in_fp32, {}, "rejected:dtype"),
        (through_fp16, {}, "rejected:dtype"),
        (three_parts, {}, "left:columns"),
        (slice_of_an_input, {}, "left:layout"),
        (strided_bias, {}, "left:layout"),
        (two_weights, {}, "left:computed"),
        (one_bias, {}, "left:one_bias"),
        (sliced, {"roundings": "eager"}, "rejected:rounding"),
        (sliced, {"rules": "-swiglu_epilogue"}, "rejected:disabled"),
        (sliced, {"gemm": "cublas"}, "left:disabled"),
        (sliced, {"gemm": "auto"}, "left:not_faster"),
        (sliced, {"fuel": 0}, "rejected:fuel"),
        (sliced, {"target": "sm80"}, "left:arch"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_left_and_why(function: Callable[..., Any], options: dict[str, Any], expected: str) -> None:
    args = spell(INPUTS)
    results, coverage = gated(function, args, **options)
    sites = [s for s in of_gemms(coverage) if s.family == "swiglu_epilogue"]
    (seam,) = sites
    status = "left" if seam.status is Status.LEFT_TO_INDUCTOR else seam.status.value
    assert seam.reason is not None and f"{status}:{seam.reason.code}" == expected, seam.reason.message
    with torch.no_grad():
        eager = function(*args)
    for ours, theirs in zip(results, eager if isinstance(eager, tuple) else (eager,), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.03 * rms(theirs))


@pytest.mark.parametrize(
    ("inputs", "dtype", "expected"),
    [(INPUTS, FP32, "dtype"), ("x:BLD w:QD b:Q", BF16, "alignment"), ("x:BLI w:8I b:8", BF16, "alignment")],
)
def test_dtypes_and_sizes_that_quack_does_not_take(inputs: str, dtype: torch.dtype, expected: str) -> None:
    _, coverage = gated(sliced if "Q" in inputs else up_first, spell(inputs, dtype), rules="swiglu_epilogue")
    assert counts(coverage) == {f"left:{expected}": 1} or counts(coverage)[f"left:{expected}"] >= 1


# -- two linears -------------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """w1 is the gate's; `order` is that of definition, which `dkfuse.pack` keeps in memory."""

    def __init__(self, order: str = "w1 w3", bias: bool = False):
        super().__init__()
        for name in order.split():
            setattr(self, name, nn.Linear(64, 96, bias=bias))
        self.w2 = nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Model(nn.Module):
    def __init__(self, **options: Any):
        super().__init__()
        self.feed_forward = Gated(**options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.feed_forward(x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("order", ["w1 w3", "w3 w1"])
def test_two_packed_linears(order: str, bias: bool) -> None:
    torch.manual_seed(0)
    model = Model(order=order, bias=bias).to(BF16).requires_grad_(False)
    args = [torch.randn(2, 6, 64).to(BF16)]
    _, before = gated(model, args)
    assert [(s.reason.code, s.family) for s in of_gemms(before) if s.reason] == [("not_packed", "swiglu_epilogue")]
    dkfuse.pack(model)
    results, after = gated(model, args)
    sites = {s.family: s for s in after.seams}
    assert sites["swiglu_epilogue"].status is Status.FUSED and "packed_projection" not in sites
    assert sites["swiglu_epilogue"].shapes["weight2"] == [96, 64]
    check_numerics(model, args, results)


def test_without_quack_packed_linears_stay_one_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    model = Model().to(BF16).requires_grad_(False)
    dkfuse.pack(model)
    _, coverage = run(model, [torch.randn(2, 6, 64).to(BF16)], target="sm90")
    found = {s.family: s.reason.code if s.reason else "fused" for s in coverage.seams}
    assert found == {"packed_projection": "fused", "swiglu_epilogue": "not_faster"}


def test_weights_that_moved_are_noticed() -> None:
    torch.manual_seed(0)
    model = Model().to(BF16).requires_grad_(False)
    dkfuse.pack(model)
    x = torch.randn(2, 6, 64).to(BF16)
    torch.compiler.reset()
    with torch.no_grad():
        function = compiled(model, target="sm90", gemm="quack")
        check_numerics(model, [x], (function(x),))
        model.feed_forward.w3.weight.data = model.feed_forward.w3.weight.data.clone() * 2
        with pytest.warns(UnpackedWarning, match="w1.weight and .*w3.weight"):
            results = (function(x),)
        check_numerics(model, [x], results)


# -- models ------------------------------------------------------------------------------------------------------------

# tiny z-image's feed-forwards are 682 wide, which no vector divides
ZOO = {
    "auraflow": {"fused": 3},
    "lumina2": {"fused": 3},
    "flux2": {"fused": 2, "escapes": 1},
    "z-image": {"alignment": 3},
}


@pytest.mark.parametrize("name", list(ZOO))
def test_real_models(name: str) -> None:
    pytest.importorskip("diffusers")
    module, kwargs = zoo.build(name, layers=1)
    dkfuse.pack(module)
    coverage = dkfuse.coverage(module, settings=dkfuse.Settings(target="sm90", gemm="quack"), **kwargs)
    found: dict[str, int] = {}
    for site in (s for s in coverage.seams if s.family == "swiglu_epilogue"):
        code = site.reason.code if site.reason else "fused"
        found[code] = found.get(code, 0) + 1
    assert found == ZOO[name], str(coverage)


def test_the_version_that_is_tested_is_pretended() -> None:
    from dkfuse.kernels import gemm_kernels

    assert gemm_kernels.version() == TESTED and gemm_kernels.untested() is None
