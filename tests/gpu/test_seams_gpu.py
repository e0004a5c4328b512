"""Seams to GEMMs on the device: what cuBLAS computes, which kernels run, and the whole way through Inductor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dkfuse
from dkfuse.kernels import linear_ops
from dkfuse.seams import split

pytestmark = pytest.mark.gpu
aten = torch.ops.aten


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(s, device="cuda", generator=generator).to(dtype) for s in shapes]


def error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def kernels(call) -> list[str]:
    """Names of the kernels and copies that `call` runs on the device, after a warm-up."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def is_gemm(name: str) -> bool:
    return any(part in name.lower() for part in ("gemm", "nvjet", "cutlass", "splitk", "cublas"))


def test_the_activation_of_cublaslt_is_the_tanh_form() -> None:
    x, w, b = tensors((512, 64), (128, 64), (128,), dtype=torch.float32)
    w = w / 4
    rows = F.linear(x.double(), w.double(), b.double())
    ours = aten._addmm_activation.default(b, x, w.t(), use_gelu=True).double()
    assert (ours - F.gelu(rows, approximate="tanh")).abs().max() < 5e-5
    assert (ours - F.gelu(rows)).abs().max() > 2e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 256, 1024), (77, 256, 1024), (4096, 1536, 6144), (333, 2432, 9728)])
def test_linear_gelu(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    x, w, b = tensors((m, 2 * k), (n, k), (n,), dtype=dtype)
    w = w / k**0.5
    for rows in (x[:, :k], x[:, k:], x[:, :k].contiguous()):
        exact = linear_ops.linear_gelu(rows.float(), w.float(), b.float())
        eager = F.gelu(F.linear(rows, w, b), approximate="tanh")
        assert error(torch.ops.dkfuse.linear_gelu(rows, w, b), exact) <= 1.02 * error(eager, exact) + 1e-5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(3072, 12288), (2048, 1024)])
def test_split_linear(widths: tuple[int, ...], bias: bool) -> None:
    w, b, *parts = tensors((3072, sum(widths)), (3072,), *((4608, k) for k in widths))
    w = w / sum(widths) ** 0.5
    addend = b if bias else None
    exact = F.linear(torch.cat(parts, 1).float(), w.float(), addend.float() if bias else None)
    eager = error(F.linear(torch.cat(parts, 1), w, addend), exact)
    # alone it is over what a site may have (1.25): that is why it is only taken with a GELU epilogue
    limit = 1.02 * split.expected_error(widths, 0)
    assert error(torch.ops.dkfuse.split_linear(parts, w, addend), exact) <= limit * eager


def test_no_pass_of_its_own() -> None:
    """One GEMM with the GELU in it; one GEMM a part, nothing copied."""
    linear_gelu, split_linear = torch.ops.dkfuse.linear_gelu, torch.ops.dkfuse.split_linear
    x, w, b, c = tensors((4096, 1024), (4096, 1024), (4096,), (4096, 2048))
    wide = torch.cat([w, w, w], 1)
    for count, call in ((1, lambda: linear_gelu(x, w, b)), (2, lambda: split_linear([x, c], wide, b))):
        # cublasLt clears counters of its workspace for some of its kernels
        launched = [name for name in kernels(call) if "Memset" not in name]
        assert len(launched) == count
        assert all(map(is_gemm, launched))


def taken(coverage: dkfuse.Coverage) -> list[str]:
    return sorted(s.family for s in coverage.seams if s.status is dkfuse.Status.FUSED)


class SingleStream(nn.Module):
    def __init__(self, width: int = 1024):
        super().__init__()
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(5 * width, width)

    def forward(self, x: Tensor, attention: Tensor) -> Tensor:
        mlp = F.gelu(self.proj_mlp(x), approximate="tanh")
        return torch.sigmoid(self.proj_out(torch.cat([attention, mlp], 2))) + x


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("batch", [1, 2])
def test_compiled(batch: int, mode: str | None) -> None:
    torch.manual_seed(0)
    module = SingleStream().to("cuda", torch.bfloat16).requires_grad_(False)
    x, attention = tensors((batch, 4608, 1024), (batch, 4608, 1024))
    torch.compiler.reset()
    with torch.no_grad(), dkfuse.record() as coverage:
        options = {"dkfuse.gemm": "cublas", **({"mode": mode} if mode else {})}
        compiled = torch.compile(module, backend="dkfuse", dynamic=False, options=options)
        for _ in range(3):
            result = compiled(x, attention).clone()
        names = kernels(lambda: compiled(x, attention))
        eager = module(x, attention)
        exact = module.float()(x.float(), attention.float())
    assert taken(coverage) == ["gelu_epilogue", "split_projection"]
    assert error(result, exact) <= 1.25 * error(eager, exact)
    assert not any("cat" in n or "tanh" in n for n in names), names


def test_symbolic_tokens() -> None:
    torch.manual_seed(0)
    module = SingleStream().to("cuda", torch.bfloat16).requires_grad_(False)
    torch.compiler.reset()
    with torch.no_grad(), dkfuse.record() as coverage:
        compiled = torch.compile(module, backend="dkfuse", dynamic=True, options={"dkfuse.gemm": "cublas"})
        for tokens in (4608, 5000, 77):
            x, attention = tensors((1, tokens, 1024), (1, tokens, 1024))
            eager = module(x, attention)
            assert error(compiled(x, attention), eager) < 1e-2
    assert taken(coverage) == ["gelu_epilogue", "split_projection"]
    assert len(coverage.graphs) == 1


class Adapted(nn.Module):
    """A linear with an unmerged LoRA, and what reads its result."""

    def __init__(self, width: int = 3072, rank: int = 16):
        super().__init__()
        self.base, self.up = nn.Linear(width, width), nn.Linear(rank, width, bias=False)
        self.down = nn.Linear(width, rank, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x) + self.up(self.down(x)) * 0.5
        return F.rms_norm(y.unflatten(-1, (-1, 128)), (128,), None, 1e-6).flatten(2)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("gemm", ["cublas", "auto"])
def test_adapters_compiled(gemm: str, mode: str | None) -> None:
    """The update is added by a GEMM: nothing but the norm reads its result, and there is no sum."""
    torch.manual_seed(0)
    module = Adapted().to("cuda", torch.bfloat16).requires_grad_(False)
    (x,) = tensors((1, 4096, 3072))
    torch.compiler.reset()
    with torch.no_grad(), dkfuse.record() as coverage:
        options = {"dkfuse.gemm": gemm, **({"mode": mode} if mode else {})}
        compiled = torch.compile(module, backend="dkfuse", dynamic=False, options=options)
        for _ in range(3):
            result = compiled(x).clone()
        names = kernels(lambda: compiled(x))
        eager, exact = module(x), module.float()(x.float())
    assert "adapted_linear" in taken(coverage), str(coverage)
    assert error(result, exact) <= 1.02 * error(eager, exact)
    assert len([n for n in names if "triton" in n or "dkfuse" in n]) == 1, names
