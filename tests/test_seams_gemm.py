"""Seams to GEMMs: tanh-GELUs that go into the linear before them, and linears of a cat that become two products."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dkfuse
from dkfuse import Settings, Status, fuse, zoo
from dkfuse.kernels import linear_ops
from dkfuse.seams import common, split

from .harness import BF16, FP16, FP32, check_numerics, compiled, exact, rms, run, spell, tally

FAMILIES = ("gelu_epilogue", "split_projection")
GELU_INPUTS = "x:BLI w:QI b:Q"
C = math.sqrt(2 / math.pi)


def of_gemms(coverage: dkfuse.Coverage) -> list[dkfuse.Site]:
    """The seams under test: the same linears may be seams to packed projections too."""
    return [s for s in coverage.seams if s.family in FAMILIES]


def counts(coverage: dkfuse.Coverage) -> dict[str, int]:
    return tally([*coverage.sites, *of_gemms(coverage)])


# -- tanh-GELU in the epilogue -----------------------------------------------------------------------------------------


def functional(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w, b), approximate="tanh")


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


@pytest.fixture
def one_sm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that the results of small tests fill."""
    monkeypatch.setattr(common, "SMS", {"sm90": 1})


# -- a linear of a cat -------------------------------------------------------------------------------------------------


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


# -- in the pass -------------------------------------------------------------------------------------------------------

# seams of the tiny models: their products are too narrow to be split, their attention too short to be measured
ZOO = {
    "flux": {
        ("attention", "unmeasured"): 4,
        ("packed_projection", "not_packed"): 6,
        ("split_projection", "no_gain"): 2,
        ("gelu_epilogue", "fused"): 6,
    },
    "sd3-medium": {
        ("attention", "unmeasured"): 2,
        ("packed_projection", "not_packed"): 4,
        ("gelu_epilogue", "fused"): 3,
    },
    "wan21-1.3b": {
        ("attention", "unmeasured"): 4,
        ("packed_projection", "not_packed"): 4,
        ("split_projection", "dtype"): 1,
        ("gelu_epilogue", "fused"): 3,
    },
}


@pytest.mark.parametrize("name", list(ZOO))
def test_seams_of_real_models(name: str) -> None:
    pytest.importorskip("diffusers")
    module, kwargs = zoo.build(name)
    coverage = dkfuse.coverage(module, settings=Settings(target="sm90"), **kwargs)
    found = coverage.seams
    assert Counter((s.family, s.reason.code if s.reason else "fused") for s in found) == ZOO[name], str(coverage)
    every = [s.id for s in (*coverage.sites, *coverage.seams)]
    assert len(set(every)) == len(every)
    assert all(s.source and s.module for s in found)


def test_planning_alone_changes_nothing() -> None:
    graphs: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        def inner(module: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(module)
            return module.forward

        return dkfuse.compat.lower_with(gm, inputs, inner, {})

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(functional, backend=backend, dynamic=False)(*spell(GELU_INPUTS))
    graph, settings = graphs[0].graph, Settings(target="sm90")
    before = str(graph)
    assert fuse.plan(graph, settings).record.seams == [] and str(graph) == before
    assert [s.status for s in fuse.decided(graph, settings).record.seams] == [Status.FUSED]
    assert "dkfuse.linear_gelu" in str(graph) and "tanh" not in str(graph)


# -- the ops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP32, torch.float64])
def test_ops_are_what_they_say(dtype: torch.dtype) -> None:
    x, w, b = spell("x:LI w:QI b:Q", dtype)
    wide, narrow = x.repeat(1, 2), torch.randn(192, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    calls = [
        (torch.ops.dkfuse.linear_gelu.default, (x, w, b)),
        (torch.ops.dkfuse.split_linear.default, ([x, wide[:, 64:]], narrow, b)),
        (torch.ops.dkfuse.split_linear.default, ([x, x, x], torch.cat([w] * 3, 1), None)),
    ]
    for op, args in calls:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    rows = F.linear(x.double(), w.double(), b.double())
    tolerance = {"rtol": 0, "atol": {BF16: 0.15, FP32: 1e-4}.get(dtype, 1e-12)}
    torch.testing.assert_close(calls[0][0](*calls[0][1]).double(), F.gelu(rows, approximate="tanh"), **tolerance)
    both = F.linear(wide.double(), narrow.double(), b.double())
    torch.testing.assert_close(calls[1][0](*calls[1][1]).double(), both, **tolerance)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.ones(2, 3)], torch.ones(4, 5), None), "parts have 3 columns together, but weight 5"),
        (([], torch.ones(4, 5), None), "at least one part"),
        (([torch.ones(2, 3)], torch.ones(4, 3).bfloat16(), None), "one floating dtype"),
        (([torch.ones(2, 3)], torch.ones(4, 3), torch.ones(5)), r"bias has shape \(5,\), it must be \[4\]"),
    ],
)
def test_calls_without_a_meaning(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_ops.split_linear(*arguments)
