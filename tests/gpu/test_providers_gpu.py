"""Providers on a GPU: ops of their own under Inductor, CUDA graphs and in eager mode, and kernels that do not build."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dkfuse
from dkfuse import lower
from dkfuse.errors import KernelFailedWarning
from dkfuse.example_calls import example
from dkfuse.kernels import failures, ops, provider_ops, registry
from dkfuse.kernels.registry import Implementation
from dkfuse.kernels.support import OPERANDS

pytestmark = pytest.mark.gpu
D = 256


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    registry.unregister("mine")
    failures.forget()
    provider_ops.reset()


def block(x, scale, shift, weight):
    return (F.layer_norm(x, (D,)) * (1 + scale[:, None]) + shift[:, None]) @ weight


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 64, D), (2, D), (2, D), (D, D))
    return [torch.randn(s, generator=generator).to("cuda", torch.bfloat16) for s in shapes]


class Kernel:
    def __init__(self, op):
        self.op, self.runs = op, 0
        registry.register(Implementation(op, "mine", (), self, devices=("cuda",)))

    def __call__(self, arguments, outputs):
        self.runs += 1
        for name, value in ops.reference_outputs(self.op, dict(arguments)).items():
            if name in outputs:
                outputs[name].copy_(value)


def check(options, provider):
    values = inputs()
    with torch.no_grad(), dkfuse.record() as coverage:
        program = torch.compile(block, backend="dkfuse", options=options, dynamic=False)
        for _ in range(4):
            result = program(*values).clone()
    exact = block(*(v.double() for v in values))
    eager = (block(*values).double() - exact).norm()
    assert (result.double() - exact).norm() <= 1.05 * eager
    assert [site.kernel for site in coverage.sites] == [provider]
    return coverage


@pytest.mark.parametrize("extra", [{}, {"mode": "reduce-overhead"}, {"dkfuse.remainder": "eager"}])
def test_a_provider_runs(extra):
    kernel = Kernel("norm_modulate")
    check({"dkfuse.kernels": "mine", **extra}, "mine")
    assert kernel.runs >= 1 and (extra.get("mode") is None or kernel.runs < 4), "captured, not called again"


@pytest.mark.parametrize("provider", ["triton", "native"])
@pytest.mark.parametrize("op", OPERANDS)
def test_opcheck(op, provider):
    provider_ops.define_all()
    shape = (2, 4, 2, 16) if op == "norm_rope" else (2, 4, 16)
    made = example(op, shape, torch.bfloat16).items()
    call = {k: torch.rand(v.shape).to("cuda", v.dtype) if isinstance(v, torch.Tensor) else v for k, v in made}
    schema = getattr(torch.ops.dkfuse, op).default._schema.arguments
    args = tuple(call.pop(a.name) for a in schema if not a.kwarg_only)
    torch.library.opcheck(getattr(getattr(torch.ops, f"dkfuse_{provider}"), op).default, args, call)


@pytest.mark.parametrize("kernels", [None, "triton,mine"])
def test_a_triton_kernel_that_does_not_compile(monkeypatch, kernels):
    """2048 threads: ptxas refuses. The next provider takes the site, or Inductor."""
    configured = lower._configured
    monkeypatch.setattr(lower, "_configured", lambda kernel, warps, stages: configured(kernel, 64, stages))
    if kernels:
        Kernel("norm_modulate")
    with pytest.warns(KernelFailedWarning, match="triton's kernel for norm_modulate could not be built"):
        values = inputs()
        options = {"dkfuse.kernels": kernels} if kernels else {}
        with torch.no_grad(), dkfuse.record() as coverage:
            result = torch.compile(block, backend="dkfuse", options=options, dynamic=False)(*values)
    torch.testing.assert_close(result, block(*values), atol=0.3, rtol=0.05)
    (site,) = coverage.sites
    if kernels:
        assert site.kernel == "mine" and site.passed_over[0].code == "kernel_failed"
    else:
        assert site.reason.code == "kernel_failed"


def test_an_eager_triton_launch_that_fails(monkeypatch):
    def broken(launch, tensors):
        raise RuntimeError("PTX version")

    x = torch.randn(4, 64, device="cuda")
    monkeypatch.setattr(ops, "run", broken)
    ops._plans.clear()
    with pytest.warns(KernelFailedWarning, match="PTX version"):
        out = torch.ops.dkfuse.scale_shift(x, x, None, out_dtype=torch.float32)
    ops._plans.clear()
    torch.testing.assert_close(out, x * (1 + x))
