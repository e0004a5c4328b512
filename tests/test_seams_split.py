"""The seam of a linear of a cat that becomes two products, and of the GELU that moves with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkfuse.seams import common, split

from .harness import BF16, FP32, exact, rms, run, spell
from .linears import GELU_INPUTS, counts, of_gemms


@pytest.fixture
def one_sm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that the results of small tests fill."""
    monkeypatch.setattr(common, "SMS", {"sm90": 1})


def cat_args(
    *widths: int, n: int = 256, batch: int = 2, rows: int = 50, dtype: torch.dtype = BF16, weights: bool = True
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(n, sum(widths)), (n,)] * weights + [(batch, rows, k) for k in widths]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def of_a_cat(w: Tensor, bias: Tensor, *parts: Tensor) -> Tensor:
    return F.linear(torch.cat(parts, -1), w, bias)


class SingleStream(nn.Module):
    """What attention and the MLP of a single-stream block end in."""

    def __init__(self, width: int = 1024, out: int = 512, bias: bool = True):
        super().__init__()
        self.proj_mlp = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(3 * width, out, bias=bias)

    def forward(self, x: Tensor, attention: Tensor) -> Tensor:
        mlp = F.gelu(self.proj_mlp(x), approximate="tanh")
        return self.proj_out(torch.cat([attention, mlp], 2))


@pytest.mark.usefixtures("one_sm")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_cat_is_not_written(batch: int, bias: bool, dynamic: bool) -> None:
    torch.manual_seed(0)
    module = SingleStream(bias=bias).to(BF16).requires_grad_(False)
    parts = cat_args(1024, 1024, batch=batch, weights=False)
    if dynamic:
        for part in parts:
            torch._dynamo.mark_dynamic(part, 1)
    results, coverage = run(module, parts, target="sm90", dynamic=None if dynamic else False)
    assert counts(coverage) == {"split_projection": 1, "gelu_epilogue": 1}
    assert dynamic == isinstance(of_gemms(coverage)[0].shapes["x"][0], str)
    (reference,) = exact(module, parts)
    assert rms(results[0] - reference) <= 1.25 * rms(module(*parts) - reference)


@pytest.mark.parametrize(
    ("columns", "through_epilogue", "error"),
    [([3072, 12288], 12288, 1.157), ([3072, 12288], 0, 1.476), ([1024, 1024], 1024, 1.243)],
)
def test_the_error_that_a_split_may_have(columns: list[int], through_epilogue: int, error: float) -> None:
    """The first two were measured on an H100."""
    assert split.expected_error(columns, through_epilogue) == pytest.approx(error, abs=2e-3)
    assert split.MAX_ERROR <= 1.25


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("sms", "expected"), [(4, "left:rounding"), (5, "left:no_gain")])
def test_a_result_that_does_not_fill_the_gpu_keeps_the_cat(
    sms: int, expected: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[130, 384]: two tiles of 128 rows by two of 256 columns, for symbolic rows as in the example."""
    monkeypatch.setattr(common, "SMS", {"sm90": sms})
    args = cat_args(1024, 2048, n=384, batch=1, rows=130)
    if dynamic:
        for part in args[2:]:
            torch._dynamo.mark_dynamic(part, 1)
    _, coverage = run(of_a_cat, args, target="sm90", dynamic=None if dynamic else False)
    assert counts(coverage) == {expected: 1}
    (seam,) = of_gemms(coverage)
    assert ("4 tiles of 128 x 256 for 5 SMs" in seam.reason.message) == (sms == 5)


def test_the_limit_of_an_h100() -> None:
    assert common.SMS["sm90"] == 132
    assert common.tiles(1280, 3072) == 120 and common.tiles(1281, 3072) == 132
    _, coverage = run(of_a_cat, cat_args(1024, 2048), target="sm90")
    assert counts(coverage) == {"left:no_gain": 1}


def read_twice(w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cat([a, b], -1)
    return F.linear(both, w, bias), both + 1


def of_computed_parts(w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(torch.cat([torch.sigmoid(a), b * 2], -1), w, bias)


def of_slices(w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A batch of slices has to be copied, to be matrices."""
    return F.linear(torch.cat([a[:, 1:], b[:, 1:]], -1), w, bias)


@pytest.mark.usefixtures("one_sm")
@pytest.mark.parametrize(
    ("function", "sizes", "options", "expected"),
    [
        (read_twice, {}, {}, "left:escapes"),
        (of_a_cat, {"widths": (512, 2048)}, {}, "left:no_gain"),
        (of_a_cat, {}, {}, "left:rounding"),
        (of_a_cat, {"widths": (1024, 1024)}, {}, "left:rounding"),
        (of_a_cat, {"widths": (2048, 1024, 1024)}, {}, "left:rounding"),
        (of_computed_parts, {}, {}, "left:rounding"),
        (of_slices, {}, {}, "left:rounding"),
        (of_a_cat, {"widths": (1028, 2048)}, {}, "left:layout"),
        (of_a_cat, {"dtype": FP32}, {}, "left:dtype"),
        (of_a_cat, {}, {"roundings": "eager"}, "rejected:rounding"),
        (of_a_cat, {}, {"rules": "-split_projection"}, "rejected:disabled"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_when_the_cat_stays(function: Any, sizes: dict[str, Any], options: dict[str, Any], expected: str) -> None:
    widths = sizes.get("widths", (1024, 2048))
    args = cat_args(*widths, **{k: v for k, v in sizes.items() if k != "widths"})
    results, coverage = run(function, args, **{"target": "sm90", **options})
    assert counts(coverage) == {expected: 1}
    with torch.no_grad():
        eager = function(*args)
    for ours, theirs in zip(results, eager if isinstance(eager, tuple) else (eager,), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_cat_of_tokens_is_no_seam() -> None:
    def tokens(w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(torch.cat([a, b], 1), w[:, :1024], bias)

    _, coverage = run(tokens, cat_args(1024, 1024), target="sm90")
    assert counts(coverage) == {}


@pytest.fixture(scope="module")
def block() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return SingleStream().to(BF16).requires_grad_(False), [torch.randn(2, 7, 1024).to(BF16) for _ in range(2)]


def check_error(module: nn.Module, inputs: list[Tensor], results: tuple[Tensor, ...]) -> None:
    """At most 1.25 of eager's RMS error: what one site may have."""
    (reference,) = exact(module, inputs)
    assert results[0].shape == reference.shape
    assert rms(results[0] - reference) <= 1.25 * rms(module(*inputs) - reference)


@pytest.mark.usefixtures("one_sm")
def test_cat_and_gelu_vanish_together(block: tuple[nn.Module, list[Tensor]]) -> None:
    module, inputs = block
    results, coverage = run(module, inputs, target="sm90")
    assert counts(coverage) == {"split_projection": 1, "gelu_epilogue": 1}
    assert {s.module.split(".")[-1]: s.rule for s in of_gemms(coverage) if s.module} == {
        "proj_out": "split_projection",
        "proj_mlp": "gelu_epilogue",
    }
    projection, epilogue = of_gemms(coverage)
    rows, size = 14, 2
    assert (projection.bytes_before, projection.bytes_after) == (
        rows * size * (3 * 3072 + 512),
        rows * size * (3072 + 3 * 512),
    )
    assert epilogue.bytes_before - epilogue.bytes_after == 2 * rows * size * 2048  # type: ignore[operator]
    check_error(module, inputs, results)


@pytest.mark.usefixtures("one_sm")
def test_a_cat_stays_without_the_epilogue_or_with_a_wide_result(block: tuple[nn.Module, list[Tensor]]) -> None:
    """Without the epilogue the sum rounds too often; a wide result costs more to add up than the cat."""
    module, inputs = block
    _, coverage = run(module, inputs, target="sm90", rules="-gelu_epilogue")
    assert counts(coverage) == {"left:rounding": 1, "rejected:disabled": 1}
    torch.manual_seed(0)
    wide = SingleStream(out=2048).to(BF16).requires_grad_(False)
    _, coverage = run(wide, inputs, target="sm90")
    assert counts(coverage) == {"left:no_gain": 1, "gelu_epilogue": 1}


@pytest.mark.usefixtures("one_sm")
def test_fuel_counts_seams(block: tuple[nn.Module, list[Tensor]]) -> None:
    module, inputs = block
    _, coverage = run(module, inputs, target="sm90", fuel=1)
    assert counts(coverage) == {"split_projection": 1, "rejected:fuel": 1}

    def normed(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return F.gelu(F.linear(x, w, b), approximate="tanh"), F.rms_norm(x, (64,)) @ w.mT

    _, coverage = run(normed, spell(GELU_INPUTS), target="sm90", fuel=1)
    assert counts(coverage) == {"gelu_epilogue": 1, "rejected:fuel": 1}


@pytest.mark.usefixtures("one_sm")
def test_inductor_compiles_what_is_left(block: tuple[nn.Module, list[Tensor]]) -> None:
    module, inputs = block
    results, coverage = run(module, inputs, target="sm90", remainder="inductor")
    assert counts(coverage) == {"split_projection": 1, "gelu_epilogue": 1}
    check_error(module, inputs, results)
