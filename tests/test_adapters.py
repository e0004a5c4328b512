"""Linears with unmerged LoRAs: the op, which sums are one, what comes behind them, and what is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dkfuse
from dkfuse.kernels import adapted_linear

from .gemms import install
from .harness import BF16, FP32, exact, rms, run, tally

OP = torch.ops.dkfuse.adapted_linear
WIDTH, HEADS = 256, 2


class Adapted(nn.Module):
    """A linear and its adapters, as peft computes them."""

    def __init__(self, ranks: tuple[int, ...] = (16,), bias: bool = True, dtype: torch.dtype = BF16, out: int = WIDTH):
        super().__init__()
        self.base = nn.Linear(WIDTH, out, bias=bias, dtype=BF16)
        self.down = nn.ModuleList(nn.Linear(WIDTH, r, bias=False, dtype=dtype) for r in ranks)
        self.up = nn.ModuleList(nn.Linear(r, out, bias=False, dtype=dtype) for r in ranks)
        self.scaling: list[Any] = [0.5 + i for i in range(len(ranks))]

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        for down, up, scaling in zip(self.down, self.up, self.scaling, strict=True):
            result = result + up(down(x.to(down.weight.dtype))) * scaling
        return result.to(x.dtype)


def rotated(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (x.float() * c + torch.stack([-b, a], -1).flatten(-2).float() * s).to(x.dtype)


class Attention(nn.Module):
    """FLUX.1's queries and keys."""

    def __init__(self, **how: Any):
        super().__init__()
        self.q, self.k, self.v = (Adapted(**how) for _ in range(3))
        self.norms = nn.ParameterList(torch.rand(WIDTH // HEADS, dtype=BF16) + 0.5 for _ in range(2))

    def forward(self, x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)) for f in (self.q, self.k, self.v))
        q, k = (F.rms_norm(y, (WIDTH // HEADS,), w, 1e-6) for y, w in zip((q, k), self.norms, strict=True))
        q, k, v = (y.transpose(1, 2) for y in (rotated(q, c, s), rotated(k, c, s), v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def tokens(batch: int = 2, count: int = 32, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(batch, count, WIDTH).to(dtype)


def seams(coverage: dkfuse.Coverage) -> dict[str, int]:
    return tally([s for s in coverage.seams if s.family == "adapted_linear"])


def check_error(module: nn.Module, args: list[Tensor], result: Tensor) -> None:
    """One site may have 1.25 of eager's RMS error; this one rounds less."""
    (reference,) = exact(module, args)
    assert rms(result - reference) <= 1.02 * rms(module(*args) - reference)


# -- the op ------------------------------------------------------------------------------------------------------------


def operands(dtype: torch.dtype = BF16, updates: int = 2) -> tuple[Any, ...]:
    x, w, b = torch.randn(40, WIDTH), torch.randn(64, WIDTH), torch.randn(64)
    downs, ups = ([torch.randn(n, 8 * (i + 1)).to(dtype) for i in range(updates)] for n in (40, 64))
    return x.to(dtype), w.to(dtype), b.to(dtype), downs, ups, [0.5, -2.0][:updates]


@pytest.mark.parametrize("dtype", [BF16, FP32, torch.float64])
@pytest.mark.parametrize("updates", [0, 1, 2])
def test_the_op(dtype: torch.dtype, updates: int) -> None:
    x, w, b, downs, ups, alphas = operands(dtype, updates)
    expected = F.linear(x.double(), w.double(), b.double())
    for down, up, alpha in zip(downs, ups, alphas, strict=True):
        expected = expected + alpha * (down.double() @ up.double().t())
    found = OP(x, w, b, downs, ups, alphas)
    assert found.dtype == dtype and found.is_contiguous()
    tolerance = {BF16: 2e-2, FP32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=10 * tolerance)
    out = torch.empty_like(found)
    adapted_linear.into(x, w, *downs, *ups, b, alphas=alphas, tiles="", out=out)
    assert torch.equal(out, found)
    torch.library.opcheck(OP.default, (x, w, None, downs, ups, alphas), {"tiles": "128x192"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"alphas": [1.0]}, "2 downs, 2 ups, 1 alphas; one of each is needed"),
        ({"downs": [torch.ones(39, 8).to(BF16)] * 2}, r"an update is \[39, 8\] and \[64, 8\] .* must be \[40, R\]"),
        ({"ups": [torch.ones(64, 7).to(BF16)] * 2}, "parts have 8 columns together, but weight 7"),
        ({"ups": [torch.ones(64, 8)] * 2}, "dtypes are torch.bfloat16, torch.float32"),
        ({"tiles": "1x1"}, "there are no tiles '1x1'; known: 128x192"),
        ({"bias": torch.ones(63).to(BF16)}, r"bias has shape \(63,\)"),
    ],
)
def test_errors_name_the_value(change: dict[str, Any], words: str) -> None:
    names = ("x", "weight", "bias", "downs", "ups", "alphas")
    with pytest.raises(ValueError, match=words):
        OP(**{**dict(zip(names, operands(), strict=True)), **change})


# -- which sums are one ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [(16,), (8, 64)])
def test_a_linear_and_its_adapters(ranks: tuple[int, ...], bias: bool, dynamic: bool) -> None:
    module, x = Adapted(ranks, bias).requires_grad_(False), tokens()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    results, coverage = run(module, [x], target="sm90", dynamic=None if dynamic else False)
    assert seams(coverage) == {"adapted_linear": 1}, str(coverage)
    check_error(module, [x], results[0])


@pytest.mark.parametrize("ranks", [(16,), (8, 64)])
def test_norm_and_rotation_behind_adapters_are_one_kernel(ranks: tuple[int, ...]) -> None:
    """As without adapters; a sum that Inductor would have to write is none."""
    module, x = Attention(ranks=ranks).requires_grad_(False), tokens()
    args = [x, torch.randn(1, 32, 1, WIDTH // HEADS), torch.randn(1, 32, 1, WIDTH // HEADS)]
    results, coverage = run(module, args, target="sm90")
    assert tally(coverage.sites) == {"norm_rope": 2, "absorbed": 2} and seams(coverage) == {"adapted_linear": 3}
    torch.testing.assert_close(results[0], module(*args), atol=0.05, rtol=0.05)
    results, coverage = run(module, args, target="sm90", rules="-adapted_linear")
    assert tally(coverage.sites) != {"norm_rope": 2, "absorbed": 2}
    assert seams(coverage) == {"rejected:disabled": 3}


def test_a_factor_that_is_a_tensor() -> None:
    """Of an adapter that is exchanged without a compilation."""
    module, x = Adapted().requires_grad_(False), tokens()
    module.scaling[0] = torch.tensor(0.5)
    compiled = torch.compile(
        module, backend="dkfuse", options={"dkfuse.remainder": "eager", "dkfuse.target": "sm90"}, dynamic=False
    )
    with torch.no_grad(), dkfuse.record() as coverage:
        for value in (0.5, 3.0):
            module.scaling[0].fill_(value)
            torch.testing.assert_close(compiled(x), module(x), atol=0.05, rtol=0.02)
    assert seams(coverage) == {"adapted_linear": 1} and len(coverage.graphs) == 1


class ReadTwice(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        return (result + self.up[0](self.down[0](x))) * result.sigmoid()


class Broadcast(Adapted):
    """An update for one sample of two."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up[0](self.down[0](x[:1]))


class InHalves(Adapted):
    """An update of each half of a row: as many elements as the linear has, in rows of their own."""

    def forward(self, x: Tensor) -> Tensor:
        half = WIDTH // 2
        down, up = self.down[0].weight[:, :half], self.up[0].weight[:half]
        return self.base(x) + F.linear(F.linear(x.unflatten(-1, (2, -1)), down), up).flatten(-2)


class Activated(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x), approximate="tanh") @ self.base.weight


class GatedUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = Adapted(), Adapted()

    def forward(self, x: Tensor) -> Tensor:
        return (F.silu(self.gate(x)) * self.up(x)) @ self.up.base.weight


@pytest.mark.parametrize(
    ("module", "options", "expected"),
    [
        (GatedUnit(), {}, {"left:no_gain": 2}),
        (Activated(), {}, {"left:no_gain": 1}),
        (Adapted(), {"roundings": "eager"}, {"rejected:rounding": 1}),
        (Adapted((12,)), {}, {"left:layout": 1}),
        (Adapted((160,)), {}, {}),
        (Adapted(dtype=FP32), {}, {"left:dtype": 1}),
        (ReadTwice(), {}, {}),
        (Broadcast(), {}, {}),
        (InHalves(), {}, {}),
    ],
    ids=[
        "of a SwiGLU",
        "before a GELU",
        "eager roundings",
        "rank of 12",
        "rank of 160",
        "in fp32",
        "read twice",
        "of one sample",
        "of half rows",
    ],
)
def test_what_is_left(module: nn.Module, options: dict[str, Any], expected: dict[str, int]) -> None:
    module, x = module.requires_grad_(False), tokens()
    results, coverage = run(module, [x], **{"target": "sm90", **options})
    assert seams(coverage) == expected, str(coverage)
    torch.testing.assert_close(results[0], module(x), atol=0.02, rtol=0.02)


def test_a_symbolic_size_that_is_added_is_no_update() -> None:
    """HunyuanVideo's number of keys of a dynamic length: ``mask.sum() + image tokens``."""

    def function(x: Tensor) -> Tensor:
        return (x[..., 0].sum(1) + x.shape[1])[:, None] * torch.arange(4)

    given = tokens()
    torch._dynamo.mark_dynamic(given, 1)
    results, coverage = run(function, [given], target="sm90", dynamic=None)
    assert seams(coverage) == {}
    torch.testing.assert_close(results[0], function(given), atol=0.05, rtol=0.02)


def test_a_modulation_is_left() -> None:
    module = Adapted(out=4 * WIDTH).requires_grad_(False)
    _, coverage = run(module, [tokens(1, 2)], target="sm90")
    assert seams(coverage) == {"left:no_gain": 1}
    assert "2 rows: with fewer than 16" in coverage.seams[0].reason.message


def test_the_linear_may_be_quacks(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    module, x = Adapted().requires_grad_(False), tokens(1, 64)
    results, coverage = run(module, [x], target="sm90", gemm="quack")
    (seam,) = (s for s in coverage.seams if s.family == "adapted_linear")
    assert (seam.kernel, seam.status) == ("quack", dkfuse.Status.FUSED)
    check_error(module, [x], results[0])
