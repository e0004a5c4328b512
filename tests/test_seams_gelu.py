"""The seam of a tanh-GELU that goes into the linear before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dkfuse

from .harness import BF16, FP16, FP32, check_numerics, compiled, exact, rms, run, spell
from .linears import GELU_INPUTS, counts, functional, of_gemms

C = math.sqrt(2 / math.pi)


def flat(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(F.linear(x.flatten(0, 1), w, b), approximate="tanh")


def by_hand(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    return 0.5 * h * (1 + torch.tanh(C * (h + 0.044715 * h**3)))


def factored(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    return h * (torch.tanh((0.044715 * (h * h) + 1.0) * (0.7978845608 * h)) + 1) / 2


def distributed(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    half = 0.5 * h
    return half + half * torch.tanh(h * C - -0.044715 * C * torch.pow(h, 3))


def in_fp32(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w, b).float(), approximate="tanh").to(x.dtype)


def heads_between(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = F.linear(x, w, b).reshape(-1, w.shape[0])
    return F.gelu(h, approximate="tanh").reshape(x.shape[0], x.shape[1], -1)


def bias_apart(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(x @ w.mT + b, approximate="tanh")


def slice_of_a_sum(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The slice cuts a batch of two into rows that do not lie together, but it is computed, not read."""
    return F.gelu(F.linear((x * 2)[:, 1:] + 1, w, b), approximate="tanh")


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    "function",
    [functional, flat, by_hand, factored, distributed, in_fp32, heads_between, bias_apart, slice_of_a_sum],
    ids=lambda f: f.__name__,
)
def test_gelu_moves_into_the_linear(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    args = spell(GELU_INPUTS, dtype)
    results, coverage = run(function, args, target="sm90")
    assert counts(coverage) == {"gelu_epilogue": 1}
    check_numerics(function, args, results)


def test_it_rounds_once_less_than_eager() -> None:
    x, w, b = spell(GELU_INPUTS)
    args = [x, w * 0.05, b]  # GELU is a straight line for large values: nothing is lost in rounding its input too
    results, _ = run(functional, args, target="sm90")
    (reference,) = exact(functional, args)
    assert rms(results[0] - reference) < 0.9 * rms(functional(*args) - reference)


def erf(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w, b))


def quick(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    return h * torch.sigmoid(1.702 * h)


def another_constant(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    return 0.5 * h * (1 + torch.tanh(C * (h + 0.0448 * h**3)))


def another_result(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = F.linear(x, w, b)
    return 0.5 * h * (2 + torch.tanh(C * (h + 0.044715 * h**3)))


def of_another_value(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h, g = F.linear(x, w, b), F.linear(x, w, b + 1)
    return 0.5 * g * (1 + torch.tanh(C * (h + 0.044715 * h**3)))


def half_of_the_linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    a, g = F.linear(x, w, b).chunk(2, -1)
    return a * F.gelu(g, approximate="tanh")


def product_of_activations(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(x @ x.mT, approximate="tanh")


@pytest.mark.parametrize(
    "function",
    [erf, quick, another_constant, another_result, of_another_value, half_of_the_linear, product_of_activations],
    ids=lambda f: f.__name__,
)
def test_what_is_no_seam(function: Callable[..., Tensor]) -> None:
    args = spell(GELU_INPUTS)
    results, coverage = run(function, args, target="sm90")
    assert counts(coverage) == {}
    check_numerics(function, args, results)


def read_before(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    h = F.linear(x, w, b)
    return F.gelu(h, approximate="tanh"), h * 2


def no_bias(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w), approximate="tanh")


def slice_of_an_input(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(F.linear(x[:, 1:], w, b), approximate="tanh")


def kept_in_fp32(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w, b).float(), approximate="tanh")


def strided_bias(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w, b.repeat_interleave(2)[::2]), approximate="tanh")


@pytest.mark.parametrize(
    ("function", "options", "expected"),
    [
        (read_before, {}, "rejected:escapes"),
        (no_bias, {}, "left:no_bias"),
        (slice_of_an_input, {}, "left:layout"),
        (kept_in_fp32, {}, "rejected:dtype"),
        (strided_bias, {}, "left:layout"),
        (functional, {"roundings": "eager"}, "rejected:rounding"),
        (functional, {"rules": "-gelu_epilogue"}, "rejected:disabled"),
        (functional, {"fuel": 0}, "rejected:fuel"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_left_and_why(function: Callable[..., Any], options: dict[str, Any], expected: str) -> None:
    args = spell(GELU_INPUTS)
    results, coverage = run(function, args, **{"target": "sm90", **options})
    assert counts(coverage) == {expected: 1}
    (seam,) = of_gemms(coverage)
    assert seam.reason is not None and seam.reason.message
    with torch.no_grad():
        eager = function(*args)
    for ours, theirs in zip(results, eager if isinstance(eager, tuple) else (eager,), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * rms(theirs))


def test_on_a_cpu_no_seams_are_looked_for() -> None:
    _, coverage = run(functional, spell(GELU_INPUTS), target="cpu")
    assert coverage.sites == coverage.seams == []


@pytest.mark.parametrize(
    ("inputs", "dtype", "expected"), [(GELU_INPUTS, FP32, "dtype"), ("x:BLD w:QD b:Q", BF16, "layout")]
)
def test_dtypes_and_rows_that_tensor_cores_do_not_take(inputs: str, dtype: torch.dtype, expected: str) -> None:
    _, coverage = run(functional, spell(inputs, dtype), target="sm90")
    assert counts(coverage) == {f"left:{expected}": 1}


def test_symbolic_tokens() -> None:
    module = nn.Sequential(nn.Linear(64, 192), nn.GELU(approximate="tanh")).to(BF16).requires_grad_(False)
    torch.compiler.reset()
    with torch.no_grad(), dkfuse.record() as coverage:
        function = compiled(module, dynamic=True, target="sm90")
        for length in (6, 5, 9):
            x = torch.randn(3, length, 64).to(BF16)
            check_numerics(module, [x], (function(x),))
    assert counts(coverage) == {"gelu_epilogue": 1}


def test_symbolic_widths_are_left() -> None:
    _, coverage = run(functional, spell(GELU_INPUTS), target="sm90", dynamic=True)
    assert counts(coverage) == {"left:symbolic": 1}


@pytest.mark.parametrize("expected", [1, 0], ids=["parameters", "symbolic widths"])
def test_projections_of_symbolic_rows_are_siblings(expected: int) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * self.k(x)

    def functions(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return F.linear(x, w) * F.linear(x, v)

    module = Two().to(BF16).requires_grad_(False)
    args = spell("x:BLI") if expected else spell("x:BLI w:QI v:QI")
    _, coverage = run(module if expected else functions, args, target="sm90", dynamic=True)
    assert [s.family for s in coverage.seams] == ["packed_projection"] * expected


def test_training_passes_through() -> None:
    x, w, b = spell(GELU_INPUTS)
    torch.compiler.reset()
    with dkfuse.record() as coverage:
        compiled(functional, target="sm90")(x, w.requires_grad_(), b).sum().backward()
    assert coverage.sites == coverage.seams == [] and "training" in (coverage.graphs[0].note or "")
    assert w.grad is not None


def test_a_chain_of_linears() -> None:
    """The second linear reads the first one's GELU, which is another node by then."""

    def chain(x: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
        h = F.gelu(F.linear(x, w, b), approximate="tanh")
        return F.gelu(F.linear(h, v, c), approximate="tanh")

    for inputs in ("x:LI w:QI b:Q v:JQ c:J", "x:BLI w:QI b:Q v:JQ c:J"):
        args = spell(inputs)
        results, coverage = run(chain, args, target="sm90")
        assert counts(coverage) == {"gelu_epilogue": 2}
        check_numerics(chain, args, results)
