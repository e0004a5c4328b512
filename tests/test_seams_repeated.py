"""Linears of rows that were repeated for all tokens: computed for one row, and what reads one then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import dkfuse

from .harness import BF16, FP32, check_numerics, run, tally

FAMILY = "repeated_rows"
D, TOKENS = 64, 10
aten = torch.ops.aten
LINEARS = (aten.mm.default, aten.addmm.default, aten.bmm.default)


class Modulated(nn.Module):
    """A block whose shift, scale and gate are made for each token, of one row of each sample."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embed, self.mod = nn.Linear(D, D, bias=bias), nn.Linear(D, 3 * D, bias=bias)
        self.out = nn.Linear(D, D)

    def conditioned(self, h: Tensor, e: Tensor) -> Tensor:
        return self.mod(F.silu(e.unsqueeze(1).expand(-1, h.shape[1], -1)))

    def forward(self, h: Tensor, y: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.conditioned(h, e).chunk(3, dim=-1)
        h = h + gate * self.out(y)
        return h, self.out(F.layer_norm(h, (D,)) * (1 + scale) + shift)


class Twice(Modulated):
    """Repeated before the embedding's own linear, with a number and another row added on the way."""

    def conditioned(self, h: Tensor, e: Tensor) -> Tensor:
        e = self.embed(e[:, None].expand(-1, h.shape[1], -1) * 2)
        return self.mod(F.silu(e + self.embed.weight[0]))


class TwoRows(Modulated):
    """The sum of two rows that were repeated apart (a flow map's two timesteps)."""

    def conditioned(self, h: Tensor, e: Tensor) -> Tensor:
        one, other = (row[:, None].expand(-1, h.shape[1], -1) for row in (e, e.flip(-1)))
        return self.mod(one + other)


class ReadElsewhere(Modulated):
    def forward(self, h: Tensor, y: Tensor, e: Tensor) -> tuple[Tensor, ...]:
        more = self.conditioned(h, e)
        return (*super().forward(h, y, e), more.flatten(0, 1) @ self.mod.weight, more.cumsum(1))


def inputs(batch: int = 2, dtype: torch.dtype = BF16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, TOKENS, D), (batch, TOKENS, D), (batch, D))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def built(kind: type[nn.Module], dtype: torch.dtype = BF16, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(**config).to(dtype).requires_grad_(False)


def seams(coverage: dkfuse.Coverage) -> list[dkfuse.Site]:
    return [site for site in coverage.seams if site.family == FAMILY]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("kind", "config", "count"),
    [(Modulated, {}, 1), (Modulated, {"bias": False}, 1), (Twice, {}, 2), (TwoRows, {}, 1), (ReadElsewhere, {}, 2)],
)
def test_computed_for_one_row(
    kind: type[nn.Module], config: dict[str, Any], count: int, batch: int, fused_graphs: list[fx.Graph]
) -> None:
    module, args = built(kind, **config), inputs(batch)
    results, coverage = run(module, args, target="sm90")
    assert tally(seams(coverage)) == {FAMILY: count}
    assert tally(coverage.sites)["residual_gate_norm_modulate"] == 1, str(coverage)
    (graph,) = fused_graphs
    products = [n for n in graph.nodes if n.target in LINEARS and n.meta["val"].shape[-1] == 3 * D]
    assert {n.meta["val"].shape[0] for n in products} == {batch}
    check_numerics(module, args, results)


def test_kernels_read_one_row(fused_graphs: list[fx.Graph]) -> None:
    run(built(Modulated), inputs(), target="sm90")
    (graph,) = fused_graphs
    (call,) = graph.find_nodes(op="call_function", target=torch.ops.dkfuse.residual_norm_modulate.default)
    shapes = [tuple(n.meta["val"].shape) for n in call.all_input_nodes]
    assert shapes.count((2, 1, D)) == 3, "shift, scale and gate"


def test_any_number_of_tokens() -> None:
    module, args = built(Twice), inputs()
    for tensor in args[:2]:
        torch._dynamo.mark_dynamic(tensor, 1)
    results, coverage = run(module, args, target="sm90", dynamic=None)
    assert tally(seams(coverage)) == {FAMILY: 2}
    check_numerics(module, args, results)


class OfTokens(Modulated):
    """Every token has its own: nothing is repeated."""

    def conditioned(self, h: Tensor, e: Tensor) -> Tensor:
        return self.mod(F.silu(e[:, None] * h[..., :1]))


class OfColumns(Modulated):
    """Repeated, but along the columns."""

    def conditioned(self, h: Tensor, e: Tensor) -> Tensor:
        return self.mod(h[..., :1].expand(-1, -1, D))


class OfSamples(Modulated):
    """Repeated for samples; each token has its own."""

    def conditioned(self, h: Tensor, e: Tensor) -> Tensor:
        return self.mod(h[:1].expand(h.shape[0], -1, -1))


class Moved(Modulated):
    """Tokens are mixed with something of their own on the way."""

    def conditioned(self, h: Tensor, e: Tensor) -> Tensor:
        return self.mod(e[:, None].expand(-1, h.shape[1], -1) + h)


@pytest.mark.parametrize("kind", [OfTokens, OfColumns, OfSamples, Moved])
def test_what_is_not_repeated(kind: type[nn.Module]) -> None:
    module, args = built(kind), inputs()
    results, coverage = run(module, args, target="sm90")
    assert seams(coverage) == []
    check_numerics(module, args, results)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rules": "-repeated_rows"}, {"rejected:disabled": 1}),
        ({"roundings": "eager"}, {"rejected:rounding": 1}),
        ({"dtype": FP32}, {"left:dtype": 1}),
        ({"target": "cpu"}, {}),
    ],
)
def test_left_as_it_is(options: dict[str, Any], expected: dict[str, int]) -> None:
    options = {"target": "sm90", **options}
    dtype = options.pop("dtype", BF16)
    _, coverage = run(built(Modulated, dtype), inputs(dtype=dtype), **options)
    assert tally(seams(coverage)) == expected


def test_rows_that_are_returned_lie_apart() -> None:
    """The caller may write into one of them."""
    module, (_, _, e) = built(Modulated), inputs()

    def function(e: Tensor) -> Tensor:
        return module.mod(e[:, None].expand(-1, TOKENS, -1))

    (result,), coverage = run(function, [e], target="sm90")
    assert tally(seams(coverage)) == {FAMILY: 1}
    result[:, 0] = 0
    assert result[:, 1:].any()
    torch.testing.assert_close(result[:, 1:], function(e)[:, 1:], rtol=0.02, atol=0.02)
