"""sgl-kernel's and FlashInfer's kernels behind our ops, where the packages are installed: against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .on_device import random

pytestmark = pytest.mark.gpu

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LIMIT = {BF16: 2.4e-3, FP16: 3e-4}
PACKAGES = {"sgl": "sgl_kernel", "flashinfer": "flashinfer"}


def runner(provider: str, op: str, arguments: dict[str, Any]) -> Any:
    """The implementation, which takes the call."""
    pytest.importorskip(PACKAGES[provider])
    from dkfuse.kernels import provider_flashinfer, provider_sgl

    both = (*provider_sgl.IMPLEMENTATIONS, *provider_flashinfer.IMPLEMENTATIONS)
    (found,) = (i for i in both if (i.provider, i.op) == (provider, op))
    assert found.problem(arguments) is None
    return found.load()


def norm_call(x: torch.Tensor, **more: Any) -> dict[str, Any]:
    operands = dict.fromkeys(("bias", "scale", "shift", "pick"))
    values = {"norm": "rms", "eps": 1e-6, "weight_offset": 0.0, "scale_offset": 1.0, "roundings": 0}
    return {"x": x, "weight": random(x.shape[-1], dtype=x.dtype), **operands, **values, "out_dtype": x.dtype, **more}


def add_call(x: torch.Tensor) -> dict[str, Any]:
    branch = {"gate": None, "branch_bias": None, "branch_weight": None, "branch_norm": "none"}
    values = {"branch_eps": 0.0, "branch_weight_offset": 0.0, "sum_dtype": x.dtype}
    return norm_call(x, residual=random(*x.shape, dtype=x.dtype, seed=7), **branch, **values)


def check(provider: str, op: str, arguments: dict[str, Any], **outputs: torch.Tensor) -> None:
    """Within one rounding of fp64, also from a graph; operands are left alone."""
    from dkfuse.kernels.ops import reference_outputs

    run = runner(provider, op, arguments)
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    expected = reference_outputs(op, arguments, compute=FP64)
    run(arguments, outputs)
    for name, out in outputs.items():
        error = ((out.double() - expected[name]).norm() / expected[name].norm()).item()
        assert error < LIMIT[out.dtype], (name, error)
    assert all(torch.equal(arguments[name], value) for name, value in before.items())
    direct = {name: out.clone() for name, out in outputs.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(arguments, outputs)
    for out in outputs.values():
        out.zero_()
    graph.replay()
    assert all(torch.equal(out, direct[name]) for name, out in outputs.items())


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("provider", ["sgl", "flashinfer"])
def test_norms(provider: str, dtype: torch.dtype) -> None:
    for shape in ((1, 33, 3072), (7, 5120), (2, 3, 64)):
        x = random(*shape, dtype=dtype)
        check(provider, "norm_modulate", norm_call(x), out=torch.empty_like(x))
        check(provider, "residual_norm_modulate", add_call(x), out=torch.empty_like(x), sum=torch.empty_like(x))
        check(provider, "residual_norm_modulate", add_call(x), out=torch.empty_like(x))


@pytest.mark.parametrize("provider", ["sgl", "flashinfer"])
def test_any_address_and_any_result(provider: str) -> None:
    x = random(33 * 3072 + 1)[1:].view(1, 33, 3072)
    assert x.data_ptr() % 16 == 2
    joint = torch.zeros(1, 40, 3072, dtype=BF16, device="cuda")
    check(provider, "norm_modulate", norm_call(x), out=joint[:, 3:36])
    check(provider, "residual_norm_modulate", add_call(x), out=torch.empty_like(x), sum=joint[:, 3:36])


@pytest.mark.parametrize("provider", ["sgl", "flashinfer"])
def test_more_than_2_31_elements(provider: str) -> None:
    """Rows repeat every 16, and so must results, on both sides of the boundary."""
    x = random(16, 4096).repeat(2**15 + 3, 1)
    assert x.numel() > 2**31
    arguments, out = norm_call(x), torch.empty_like(x)
    run = runner(provider, "norm_modulate", arguments)
    run(arguments, {"out": out})
    few = torch.empty(16, 4096, dtype=BF16, device="cuda")
    run(norm_call(x[:16].clone(), weight=arguments["weight"]), {"out": few})
    assert torch.equal(out[-16:], few)
    assert torch.equal(out[2**18 : 2**18 + 16], few)


@pytest.mark.parametrize("rotation", ["interleaved", "half"])
@pytest.mark.parametrize("d", [64, 128, 256, 512])
def test_flashinfers_rotation(d: int, rotation: str) -> None:
    from dkfuse.kernels.rope_support import with_defaults

    for shape, r, dtype in (((2, 33, 24, d), d, BF16), ((77, 3, d), 32, FP16), ((1, 4096, 2, d), d, BF16)):
        x = random(*shape, dtype=dtype)
        cos, sin = (random(shape[-3], 1, r // 2, dtype=FP32, seed=i) for i in (1, 2))
        tables = {"cos": cos, "sin": sin, "rotation": rotation, "tables": "half"}
        arguments = with_defaults({"x": x, "out_dtype": dtype, **tables})
        check("flashinfer", "norm_rope", arguments, out=torch.empty_like(x))
