"""Graphs with operands that few models have: tensors of one value, sizes that data decide, an eps that is an input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dkfuse

from .harness import compiled, counts, run

Function = Callable[[Tensor], Tensor]
BF16 = torch.bfloat16


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=BF16)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=BF16)


def written_in_place(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., 0::2], out[..., 1::2] = zeros(2, 8, 32), x[..., ::2]
    return out


def rotated(x: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = ones(2, 8, 32), zeros(2, 8, 32)
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)


CONSTANTS: dict[str, Function] = {
    "product with zeros on the left": lambda x: torch.bmm(zeros(2, 4, 8), x),
    "product with zeros on the right": lambda x: torch.bmm(x, zeros(2, 64, 4)),
    "product of pairs": lambda x: torch.bmm(x.reshape(2, 256, 2), zeros(2, 2, 2)),
    "product of matrices of pairs": lambda x: torch.bmm(ones(2, 2, 2), x.reshape(2, 2, 256)),
    "matmul": lambda x: torch.matmul(zeros(2, 4, 8), x),
    "einsum": lambda x: torch.einsum("bnij,bnj->bni", zeros(2, 8, 2, 2), x[..., :2]),
    "sum of pairs": lambda x: x + zeros(2, 8, 2).sum(-1, keepdim=True),
    "product and sum of pairs": lambda x: (zeros(2, 8, 2, 2) * x[..., None, :2]).sum(-1),
    "norm of zeros": lambda x: x + F.layer_norm(zeros(2, 8, 64), (64,)),
    "norm of ones": lambda x: x + F.rms_norm(ones(2, 8, 64), (64,)),
    "norm by hand": lambda x: x * torch.rsqrt(ones(2, 8, 64).float().pow(2).mean(-1, keepdim=True)).to(BF16),
    "norm of a sum with nothing": lambda x: F.layer_norm(x + zeros(2, 1, 64) * x, (64,)),
    "norm of an expanded scalar": lambda x: F.layer_norm(torch.zeros((), dtype=BF16).expand(2, 8, 64) + x, (64,)),
    "modulation by parts": lambda x: F.layer_norm(x, (64,)) * (1 + torch.cat([zeros(2, 4, 64), x[:, :4]], 1)),
    "gate of ones": lambda x: x + ones(2, 1, 64) * x.relu(),
    "stack": lambda x: torch.stack([zeros(2, 8, 64), x], -1).flatten(2),
    "cat": lambda x: torch.cat([zeros(2, 8, 64), x], -1),
    "unbind": lambda x: x + zeros(2, 8, 64, 2).unbind(-1)[1],
    "chunk": lambda x: x + zeros(2, 8, 128).chunk(2, -1)[1],
    "select": lambda x: x + zeros(2, 3, 8, 64)[:, 1],
    "written in place": written_in_place,
    "rotated": rotated,
}


@pytest.mark.parametrize("function", CONSTANTS.values(), ids=CONSTANTS.keys())
def test_tensors_of_one_value(function: Function) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 64).to(BF16)
    torch.compiler.reset()
    with torch.no_grad():
        found = compiled(function, target="sm90")(x)
    torch.testing.assert_close(found, function(x), rtol=2e-2, atol=2e-2)


# -- sizes that data decide --------------------------------------------------------------------------------------------

S, T = torch.linspace(-1, 1, 64).to(BF16), torch.linspace(1, 0, 64).to(BF16)
COS, SIN = torch.randn(16, 1, 32, generator=torch.Generator().manual_seed(1)).chunk(2, -1)
W = torch.eye(64, dtype=BF16)


def modulated(x: Tensor) -> Tensor:
    return (F.layer_norm(x, (64,)) * (1 + S) + T) @ W


def residual(x: Tensor) -> Tensor:
    h = x + S * (x @ W)
    return (F.rms_norm(h, (64,)) * (1 + S) + T) @ W + h


def merged_heads(x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, 32)).transpose(1, 2).reshape(x.shape[0], 2, -1, 32).transpose(1, 2)
    return modulated(heads.flatten(2))


def queries(x: Tensor) -> Tensor:
    q = x.unflatten(-1, (2, 32)).float()
    q = (q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-6)).to(BF16)  # torch's rms_norm asks for the size itself
    a, b = q.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = COS[: x.shape[1]], SIN[: x.shape[1]]
    return (torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2).to(BF16).flatten(2)) @ W


@pytest.mark.parametrize(
    ("function", "fused"),
    [(modulated, {"norm_modulate": 1}), (merged_heads, {"norm_modulate": 1}), (residual, None), (queries, None)],
)
def test_a_number_of_tokens_that_data_decide(function: Function, fused: dict[str, int] | None) -> None:
    """FramePack and Wan-Animate, with ``torch._dynamo.config.capture_scalar_outputs``."""

    def program(x: Tensor, n: Tensor) -> Tensor:
        return function(x[:, : n.item()])

    torch.manual_seed(0)
    x, n = torch.randn(2, 16, 64).to(BF16), torch.tensor(9)
    torch.compiler.reset()
    with torch.no_grad(), dkfuse.record() as coverage, torch._dynamo.config.patch(capture_scalar_outputs=True):
        found = compiled(program, target="sm90")(x, n)
    assert len(coverage.graphs) == 1
    torch.testing.assert_close(found, program(x, n), rtol=2e-2, atol=4e-2)
    if fused is not None:
        assert counts(coverage) == fused, str(coverage)


# -- floats that Dynamo makes inputs -----------------------------------------------------------------------------------


class Normed(nn.Module):
    """A norm by hand, as diffusers writes it, beside a number that is no eps."""

    def __init__(self, root: str = "rsqrt") -> None:
        super().__init__()
        self.eps, self.strength, self.root = 1e-6, 0.5, root
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 64).to(BF16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        factor = torch.rsqrt(variance + self.eps) if self.root == "rsqrt" else (variance + self.eps).pow(-0.5)
        return (self.strength * x) @ W + ((x * factor).to(BF16) * self.weight) @ W


@pytest.mark.parametrize("root", ["rsqrt", "pow"])
def test_an_eps_is_a_constant_with_dynamic_shapes_too(root: str) -> None:
    torch.manual_seed(0)
    module = Normed(root)
    function = torch.compile(module, backend="dkfuse", dynamic=True, options={"dkfuse.remainder": "eager"})
    torch.compiler.reset()

    def check(tokens: int) -> None:
        x = torch.randn(2, tokens, 64).to(BF16)
        torch.testing.assert_close(function(x), module(x), rtol=2e-2, atol=4e-2)

    with torch.no_grad(), dkfuse.record() as coverage:
        for tokens in (8, 12, 20):
            check(tokens)
        assert [counts(coverage), len(coverage.graphs)] == [{"norm": 1}, 1], str(coverage)
        module.strength = 0.25
        check(8)
        assert len(coverage.graphs) == 1, "a number that is no eps is still an input"
        module.eps = 0.5
        check(8)
        assert [counts(coverage), len(coverage.graphs)] == [{"norm": 2}, 2], "guarded"


def test_an_eps_that_is_an_argument_stays_one() -> None:
    def function(x: Tensor, eps: float) -> Tensor:
        return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps).to(BF16) @ W

    torch.compiler.reset()
    call = compiled(function, dynamic=True)
    x = torch.randn(2, 8, 64).to(BF16)
    with torch.no_grad(), dkfuse.record() as coverage:
        for eps in (1e-6, 0.1, 0.5):
            torch.testing.assert_close(call(x, eps), function(x, eps), rtol=2e-2, atol=4e-2)
    assert len(coverage.graphs) == 1


@pytest.mark.parametrize("rows", [64, 300])
def test_a_unit_matrix_of_any_size(rows: int) -> None:
    """torch.eye, as DoRA multiplies by it, counts in numbers that eager mode has not."""

    def function(x: Tensor) -> Tensor:
        return F.layer_norm(x, (64,)) @ (torch.eye(64, dtype=BF16) @ torch.eye(rows, dtype=BF16)[:64, :64])

    x = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)).to(BF16)
    (result,), coverage = run(function, [x])
    assert counts(coverage) == {"norm": 1}
    torch.testing.assert_close(result, function(x))


class Divided(nn.Module):
    """diffusers' attention divides its result by a number that is 1 in most models."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number, self.inner, self.outer = number, nn.Linear(64, 64, dtype=BF16), nn.Linear(64, 64, dtype=BF16)
        self.requires_grad_(False)

    def forward(self, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        x = x + gate * (self.inner(x) / self.number)
        return x, self.outer(F.layer_norm(x, (64,)) * (1 + gate))


@pytest.mark.parametrize(("number", "fused"), [(1.0, 2), (2.0, 1)])
def test_a_division_by_one_is_none_with_dynamic_shapes_too(number: float, fused: int) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    module, gate = Divided(number), torch.randn(1, 1, 64).to(BF16)
    options = {"dkfuse.remainder": "eager", "dkfuse.target": "sm90"}
    compiled = torch.compile(module, backend="dkfuse", dynamic=True, options=options)
    with torch.no_grad(), dkfuse.record() as coverage:
        for tokens in (8, 9):
            x = torch.randn(1, tokens, 64).to(BF16)
            for ours, eager in zip(compiled(x, gate), module(x, gate), strict=True):
                torch.testing.assert_close(ours, eager, rtol=2e-2, atol=4e-2)
        assert coverage.totals["fused"] == fused and len(coverage.graphs) == 1
        module.number = 4.0
        torch.testing.assert_close(compiled(x, gate)[0], module(x, gate)[0], rtol=2e-2, atol=4e-2)


# -- results that the caller may write to ------------------------------------------------------------------------------


def a_sum_and_its_clone(x: Tensor) -> tuple[Tensor, ...]:
    h = x + S * (x @ W)
    return h, h.clone(), modulated(h)


def halves_and_the_whole(x: Tensor) -> tuple[Tensor, ...]:
    n = F.layer_norm(x, (64,)) * (1 + S) + T
    return torch.cat([n[:, :3], n[:, 3:]], 1), n.view(-1, 64), n @ W


def computed_twice(x: Tensor) -> tuple[Tensor, ...]:
    first, second = (F.layer_norm(x, (64,)) * (1 + S) + T for _ in range(2))
    return first[:, 1:], second.unflatten(-1, (2, -1)), first @ W


def queries_and_a_copy(x: Tensor) -> tuple[Tensor, ...]:
    q = F.rms_norm(x.unflatten(-1, (2, 32)), (32,), eps=1e-6).float()
    a, b = q.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = COS[: x.shape[1]], SIN[: x.shape[1]]
    q = torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2).to(BF16).transpose(1, 2)
    return q.contiguous(), q.contiguous().flatten(1, 2)


@pytest.mark.parametrize("remainder", ["eager", "inductor"])
@pytest.mark.parametrize("function", [a_sum_and_its_clone, halves_and_the_whole, computed_twice, queries_and_a_copy])
def test_results_share_no_memory(function: Callable[[Tensor], tuple[Tensor, ...]], remainder: str) -> None:
    x = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)).to(BF16)
    results, coverage = run(function, [x], target="sm90", remainder=remainder)
    assert coverage.totals["fused"] >= 1, str(coverage)
    assert len({result.untyped_storage().data_ptr() for result in results}) == len(results)
    for ours, eager in zip(results, function(x), strict=True):
        torch.testing.assert_close(ours, eager, rtol=2e-2, atol=4e-2)
