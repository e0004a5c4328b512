"""Providers on a GPU: ops of their own under Inductor, CUDA graphs and in eager mode, and kernels that do not build."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dkfuse
from dkfuse.choosing.example_calls import example
from dkfuse.errors import KernelFailedWarning, KernelLaunchError
from dkfuse.kernels import ops, provider_ops, registry
from dkfuse.kernels.registry import Implementation
from dkfuse.kernels.support import OPERANDS
from dkfuse.rewriting import lower

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_providers")]
D = 256


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


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("kernels", [None, "triton,mine"])
@pytest.mark.parametrize(
    ("warps", "stage"),
    [(64, "failed when it was launched: .*invalid argument"), (3, "(could not be built|failed when it was launched)")],
)
def test_a_triton_kernel_that_fails_at_launch_or_does_not_compile(monkeypatch, warps, stage, kernels, mode):
    """64 warps are compiled and refused by the driver, 3 are refused by Triton. The next provider runs, or Inductor."""
    configured = lower._configured
    monkeypatch.setattr(lower, "_configured", lambda kernel, _, stages: configured(kernel, warps, stages))
    if kernels:
        Kernel("norm_modulate")
    values = inputs()
    options = {**({"dkfuse.kernels": kernels} if kernels else {}), **({"mode": mode} if mode else {})}
    with torch.no_grad(), dkfuse.record() as coverage:
        program = torch.compile(block, backend="dkfuse", options=options, dynamic=False)
        with pytest.warns(KernelFailedWarning, match=f"triton's kernel for norm_modulate {stage}"):
            results = [program(*values).clone()]
        results += [program(*values).clone() for _ in range(3)]
    exact = block(*(v.double() for v in values))
    eager = (block(*values).double() - exact).norm()
    assert all((result.double() - exact).norm() <= 1.05 * eager for result in results)
    (site,) = coverage.sites
    if kernels:
        assert site.kernel == "mine" and site.passed_over[0].code == "kernel_failed"
    else:
        assert site.reason.code == "kernel_failed"


def test_inputs_are_not_written_twice_where_a_kernel_fails_at_launch(monkeypatch):
    configured = lower._configured
    monkeypatch.setattr(lower, "_configured", lambda kernel, _, stages: configured(kernel, 64, stages))

    def step(state, *values):
        state.add_(1)
        return block(*values)

    values, state = inputs(), torch.zeros(3, device="cuda")
    program = torch.compile(step, backend="dkfuse", dynamic=False)
    with torch.no_grad(), pytest.warns(KernelFailedWarning):
        with pytest.raises(KernelLaunchError, match="writes into its inputs"):
            program(state, *values)
        before = state.clone()
        result, eager = program(state, *values), block(*values)
    assert (result - eager).double().norm() <= 0.02 * eager.double().norm()
    assert before.max() <= 1 and torch.equal(state, before + 1)


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
