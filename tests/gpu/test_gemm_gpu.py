"""quack's GEMM on a GPU: as accurate as torch's, within its memory, on any stream, in CUDA graphs and compiled code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dkfuse
from dkfuse import Status
from dkfuse.kernels import gemm, gemm_kernels, gemm_quack
from dkfuse.seams import gemm_measure
from dkfuse.seams.gemm_measure import Product

from .on_device import capability, random

BF16, FP16 = torch.bfloat16, torch.float16
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gemm_kernels.version() is None, reason="quack is not installed"),
    pytest.mark.skipif(not torch.cuda.is_available() or capability() != 90, reason="no sm90"),
]
linear = torch.ops.dkfuse.linear


def operands(rows: int, columns: int, k: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor, Tensor]:
    weight = random(columns, k, dtype=torch.float32, seed=1) * k**-0.5
    return random(rows, k, dtype=dtype), weight.to(dtype), random(columns, dtype=dtype, seed=2)


def exactly(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    return gemm.activated(F.linear(x.double(), weight.double(), bias.double() if bias is not None else None), act)


def error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


def check(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, tiles: str = gemm_kernels.DEFAULT_TILES) -> None:
    exact = exactly(x, weight, bias, act)
    eager = gemm.activated(F.linear(x, weight, bias), act)
    found = linear(x, weight, bias, act=act, using="quack", tiles=tiles)
    assert (found.dtype, found.shape, found.is_contiguous()) == (x.dtype, eager.shape, True)
    assert error(found, exact) <= 1.02 * error(eager, exact)
    worst = (found.double() - exact).abs().max(), (eager.double() - exact).abs().max()
    assert worst[0] <= 1.5 * worst[1], worst


# every kernel with the default tiles; with others, each of which takes seconds to compile, the ones that models need
KINDS = [("128x192", act, bias) for act in gemm_kernels.ACTIVATIONS for bias in (True, False)]
KINDS += [("128x160", act, act not in gemm_kernels.GATED) for act in gemm_kernels.ACTIVATIONS]


@pytest.mark.parametrize(("tiles", "act", "bias"), KINDS)
def test_as_accurate_as_torch(tiles: str, act: str, bias: bool) -> None:
    for rows, columns, k in ((4128, 3072, 1024), (4097, 3088, 264), (333, 16, 8), (1, 1040, 520)):
        x, weight, added = operands(rows, columns, k)
        check(x, weight, added if bias else None, act, tiles)


@pytest.mark.parametrize("act", ["none", "silu_first"])
def test_fp16(act: str) -> None:
    check(*operands(4128, 1536, 512, FP16), act)


@pytest.mark.parametrize("act", ["silu_first", "silu_second", "gelu"])
def test_large_and_tiny_values(act: str) -> None:
    x, weight, bias = operands(512, 512, 256)
    for scale in (30.0, 1e-3):
        check(x * scale, weight, bias * scale, act)


def test_strided_and_unaligned_operands() -> None:
    x, weight, bias = operands(777, 1024, 512)
    wide, long = random(777, 1024), random(777 * 512 + 8)
    for rows in (wide[:, :512], wide[:, 512:], wide[:, 1:513], wide[:, ::2], long[1 : 1 + 777 * 512].view(777, 512)):
        check(rows, weight, bias, "none")
        check(rows, weight, bias, "silu_first")
    check(x, torch.cat([weight, weight])[512:1536], torch.cat([bias, bias])[3:1027], "gelu")
    check(x, weight.t().contiguous().t(), bias, "none")
    assert linear(x[:0], weight, bias, act="silu_first", using="quack").shape == (0, 512)


@pytest.mark.parametrize(("tiles", "act", "bias"), KINDS)
def test_nothing_is_written_beside_the_result(tiles: str, act: str, bias: bool) -> None:
    for rows, columns, k in ((1, 16, 8), (129, 208, 40), (4097, 1040, 72)):
        x, weight, added = operands(rows, columns, k)
        width, guard = gemm.columns(weight, act), 4096
        memory = torch.full((rows * width + 2 * guard,), 7.0, device="cuda", dtype=BF16)
        out = memory[guard : guard + rows * width].view(rows, width)
        # what lies around the operands is never taken into the sums
        padded = torch.full((rows + 256, k), float("nan"), device="cuda", dtype=BF16)
        padded[128 : 128 + rows] = x
        gemm_quack.run(padded[128 : 128 + rows], weight, added if bias else None, act, out, tiles)
        assert (memory[:guard] == 7).all() and (memory[guard + rows * width :] == 7).all()
        assert error(out, exactly(x, weight, added if bias else None, act)) < 0.01


def test_more_elements_than_32_bits_count() -> None:
    x, weight, bias = operands(140_000, 16384, 64)
    out = linear(x, weight, bias, act="none", using="quack")
    assert out.numel() > 2**31
    last = slice(-300, None)
    assert error(out[last], exactly(x[last], weight, bias, "none")) < 0.01
    gated = linear(x, weight, None, act="silu_first", using="quack")
    assert error(gated[last], exactly(x[last], weight, None, "silu_first")) < 0.01


def test_streams_and_cuda_graphs() -> None:
    x, weight, bias = operands(2048, 2048, 1024)
    expected = {act: linear(x, weight, bias, act=act, using="quack") for act in gemm_kernels.ACTIVATIONS}
    streams = [torch.cuda.Stream() for _ in range(2)]
    for act, right in expected.items():
        results = []
        torch.cuda.synchronize()
        for stream in streams:
            with torch.cuda.stream(stream):
                y = x.clone()
                torch.cuda._sleep(2_000_000)  # on another stream than this one the GEMM would not wait
                y.copy_(x * 2)
                results.append(linear(y, weight, bias, act=act, using="quack"))
        torch.cuda.synchronize()
        twice = linear(x * 2, weight, bias, act=act, using="quack")
        assert all(torch.equal(r, twice) for r in results) and not torch.equal(twice, right)
        graph, static = torch.cuda.CUDAGraph(), x.clone()
        with torch.cuda.graph(graph):
            captured = linear(static, weight, bias, act=act, using="quack")
        for factor, answer in ((2, twice), (1, right)):
            static.copy_(x * factor)
            graph.replay()
            assert torch.equal(captured, answer)


def test_clusters_that_fit() -> None:
    """What is counted for clusters of two is what a kernel compiled for the question says."""
    from quack.cute_dsl_utils import get_max_active_clusters

    torch.zeros(1, device="cuda")
    device = torch.device("cuda", torch.cuda.current_device())
    for size in {t.cluster[0] * t.cluster[1] for t in gemm_kernels.TILES.values()} | {1, 2}:
        assert gemm_quack.clusters(size, device) == get_max_active_clusters(size)


def test_opcheck() -> None:
    x, weight, bias = operands(256, 512, 128)
    for act in gemm_kernels.ACTIVATIONS:
        for using in gemm_kernels.NAMES:
            tests = ("test_schema", "test_faketensor")
            torch.library.opcheck(linear.default, (x, weight, bias), {"act": act, "using": using}, test_utils=tests)


def test_trying_and_timing() -> None:
    product = Product(4096, 4096, 1024, "silu_second", False, BF16, torch.device("cuda", 0))
    assert gemm_measure.failure(product, "128x192") is None
    found = gemm_measure.timed(product, ["cublas", *gemm_kernels.TILES])
    assert set(found) == {"cublas", *gemm_kernels.TILES} and all(10 < time < 10_000 for time in found.values())


# -- compiled ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """One of every kind: a SwiGLU of one linear, one of two, a tanh-GELU, and what is left."""

    def __init__(self, width: int = 1024):
        super().__init__()
        self.joint, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)
        self.w1, self.w3 = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.w2 = nn.Linear(2 * width, width, bias=False)
        self.up, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.joint(x).chunk(2, -1)
        x = x + self.down(up * F.silu(gate))
        x = x + self.w2(F.silu(self.w1(x)) * self.w3(x))
        return x + self.out(F.gelu(self.up(x), approximate="tanh"))


@pytest.mark.parametrize("way", ["plain", "reduce-overhead", "dynamic", "max-autotune"])
def test_compiled(way: str) -> None:
    torch.manual_seed(0)
    model = Block().to("cuda", BF16).requires_grad_(False)
    dkfuse.pack(model)
    options: dict[str, object] = {"dkfuse.gemm": "quack"}
    if way == "reduce-overhead":
        options["mode"] = way
    if way == "max-autotune":
        options = {"max_autotune": True, "max_autotune_gemm_backends": "ATEN"}
    torch.compiler.reset()
    with torch.no_grad(), dkfuse.record() as coverage:
        compiled = torch.compile(model, backend="dkfuse", dynamic=way == "dynamic", options=options)
        for tokens in (4128, 4097) if way == "dynamic" else (4128, 4128, 4128):
            x = random(1, tokens, 1024, seed=tokens)
            found, eager = compiled(x).clone(), model(x)
            exact = Block().to("cuda", torch.float64)
            exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
            assert error(found, exact(x.double())) <= 1.02 * error(eager, exact(x.double()))
    taken = sorted(s.family for s in coverage.seams if s.status is Status.FUSED)
    if way == "max-autotune":
        decided = [s for s in coverage.seams if s.family in ("gemm_kernel", "swiglu_epilogue")]
        assert decided and all(
            s.status is Status.FUSED or s.reason.code in ("not_faster", "launch_bound") for s in decided
        )
    else:
        assert taken == ["gelu_epilogue", *["gemm_kernel"] * 4, *["swiglu_epilogue"] * 2], str(coverage)
    assert len(coverage.graphs) == 1


def test_a_measured_size_is_taken_unasked() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3072, 9216).to("cuda", BF16).requires_grad_(False)
    x = random(1, 4096, 3072)
    torch.compiler.reset()
    with torch.no_grad(), dkfuse.record() as coverage:
        found = torch.compile(lambda x: torch.tanh(module(x)), backend="dkfuse", dynamic=False)(x)
    (site,) = [s for s in coverage.seams if s.family == "gemm_kernel"]
    assert (site.status, site.kernel) == (Status.FUSED, "quack")
    assert error(found, torch.tanh(module(x)).double()) < 5e-3
