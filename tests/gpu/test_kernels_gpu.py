"""The Triton kernels on a GPU: against fp64, at real widths, beyond 2^31 elements, and inside compiled programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .on_device import random

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDTHS = (1, 64, 72, 1152, 1408, 1536, 1920, 2240, 2432, 3072, 3840, 5120, 6144, 8192, 12288, 16384)
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _ops() -> None:
    import dkfuse.kernels.ops  # noqa: F401  (registers torch.ops.dkfuse)


def results_of(op: str, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The op through the dispatcher, by output name."""
    from dkfuse.kernels.support import OPERANDS, supports

    assert supports(op, arguments) is None
    results = getattr(torch.ops.dkfuse, op)(**arguments)
    results = results if isinstance(results, tuple) else (results,)
    return dict(zip(OPERANDS[op][2], results, strict=True))


def compare(op: str, arguments: dict[str, Any]) -> None:
    """Relative error against fp64 below one rounding of the output's dtype."""
    from dkfuse.kernels.ops import reference_outputs

    defaults = {a.name: a.default_value for a in getattr(torch.ops.dkfuse, op).default._schema.arguments}
    expected = reference_outputs(op, {**defaults, **arguments}, compute=torch.float64)
    for name, value in results_of(op, arguments).items():
        if value.numel() == 0:
            continue
        error = ((value.double() - expected[name]).norm() / expected[name].norm()).item()
        limit = {BF16: 3e-3, FP16: 4e-4, FP32: 2e-6}[value.dtype]
        assert error < limit, (name, error, limit)


def norm_arguments(shape: tuple[int, ...], dtype: torch.dtype, parameters: torch.dtype, **more: Any) -> dict[str, Any]:
    width = shape[-1]
    vectors = random(shape[0], 1, 6 * width, dtype=parameters).chunk(6, dim=-1)
    arguments = {
        "x": random(*shape, dtype=dtype),
        "weight": random(width, dtype=parameters, seed=1),
        "bias": random(width, dtype=parameters, seed=2),
        "scale": vectors[1],
        "shift": vectors[2],
        "norm": "layer",
        "eps": 1e-6,
        "out_dtype": dtype,
    }
    return {**arguments, **more}


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(width: int) -> None:
    shape = (2, 5, width)
    norm = "rms" if width == 1 else "layer"
    arguments = norm_arguments(shape, BF16, FP32, norm=norm)
    compare("norm_modulate", arguments)
    gate = random(2, 1, 6 * width, seed=9).chunk(6, dim=-1)[0]
    residual = random(*shape, seed=7)
    arguments.update(residual=residual, gate=gate, branch_weight=None, sum_dtype=BF16)
    compare("residual_norm_modulate", arguments)
    for bias in (random(width, seed=11), random(seed=11)):
        compare("residual_norm_modulate", {**arguments, "branch_bias": bias})
    second = {"x2": random(*shape, seed=12)}
    for gate2 in (None, random(2, 1, width, seed=13), random(seed=13)):
        compare("residual_norm_modulate", {**arguments, **second, "gate2": gate2})
    compare("residual_norm_modulate", {**arguments, "limit": 0.5})


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("parameters", [BF16, FP32])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_dtypes(dtype: torch.dtype, parameters: torch.dtype, norm: str) -> None:
    arguments = norm_arguments((2, 33, 1536), dtype, parameters, norm=norm, weight_offset=1.0)
    second = {"scale2": arguments["shift"], "shift2": arguments["scale"]}
    residual = {"residual": random(2, 33, 1536, seed=3), "gate": arguments["shift"], "sum_dtype": FP32}
    residual["branch_weight"] = None
    compare("norm_modulate", arguments)
    compare("norm_modulate_dual", {**arguments, **second})
    compare("residual_norm_modulate", {**arguments, **residual})
    compare("residual_norm_modulate_dual", {**arguments, **second, **residual})
    pointwise = {"x": arguments["x"], "out_dtype": dtype}
    compare("gated_residual", {**pointwise, "residual": residual["residual"], "gate": residual["gate"]})
    biased = {"branch_bias": random(1536, dtype=parameters, seed=5)}
    compare("gated_residual", {**pointwise, "residual": residual["residual"], "gate": residual["gate"], **biased})
    compare("residual_norm_modulate_dual", {**arguments, **second, **residual, **biased})
    compare("scale_shift", {**pointwise, "scale": arguments["scale"], "shift": arguments["shift"]})


@pytest.mark.parametrize("width", [72, 1003, 1536, 2304, 3072, 3840, 16384])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("branch_norm", ["layer", "rms"])
def test_branch_norms(width: int, dtype: torch.dtype, branch_norm: str) -> None:
    shape = (2, 33, width)
    arguments = norm_arguments(shape, dtype, BF16, norm="rms", bias=None, branch_norm=branch_norm, branch_eps=1e-5)
    gate = random(2, 1, 6 * width, seed=9).chunk(6, dim=-1)[3].tanh()
    arguments.update(residual=random(*shape, dtype=dtype, seed=7), gate=gate, sum_dtype=dtype)
    compare("residual_norm_modulate", {**arguments, "branch_weight": random(width, seed=4)})
    second = {"scale2": arguments["shift"], "shift2": arguments["scale"], "branch_weight_offset": 1.0}
    compare("residual_norm_modulate_dual", {**arguments, **second, "branch_weight": random(width, dtype=FP32, seed=4)})
    compare("residual_norm_modulate", {**arguments, "branch_weight": None, "gate": None})
    compare("residual_norm_modulate", {**arguments, "branch_weight": None, "branch_bias": random(width, seed=5)})


@pytest.mark.parametrize("branch_norm", ["none", "rms"])
@pytest.mark.parametrize("table", [BF16, FP32])
@pytest.mark.parametrize("width", [1536, 3072])
def test_tables(branch_norm: str, table: torch.dtype, width: int) -> None:
    """Gate, scale and shift of each token as parts of one tensor, and a row that is added to each."""
    names = ("gate", "scale", "shift", "scale2", "shift2")
    tokens = dict(zip(names, random(2, 33, 6, width).unbind(2), strict=False))
    rows = {f"{name}_table": random(width, dtype=table, seed=i) for i, name in enumerate(names)}
    arguments = norm_arguments((2, 33, width), BF16, FP32, residual=random(2, 33, width, seed=7), sum_dtype=BF16)
    arguments.update(branch_weight=None, branch_norm=branch_norm, branch_eps=1e-5, **tokens, **rows)
    compare("residual_norm_modulate_dual", arguments)
    pointwise = {name: arguments[name] for name in ("x", "out_dtype")}
    gate = {name: arguments[name] for name in ("residual", "gate", "gate_table")}
    compare("gated_residual", {**pointwise, **gate})
    modulation = {name: arguments[name] for name in ("scale", "shift", "scale_table", "shift_table")}
    compare("scale_shift", {**pointwise, **modulation})
    norm = {name: arguments[name] for name in ("weight", "bias", "norm", "eps")}
    compare("norm_modulate", {**pointwise, **modulation, **norm})


@pytest.mark.parametrize("branch_norm", ["none", "rms"])
@pytest.mark.parametrize("parameters", [BF16, FP32])
def test_rows_picked_per_token(branch_norm: str, parameters: torch.dtype) -> None:
    """Gate, scale and shift as two rows of each sample, and a mask of the tokens that take the first."""
    vectors = random(4, 1, 6 * 1536, dtype=parameters).reshape(2, 2, 1, 6 * 1536).chunk(6, dim=-1)
    pairs = dict(zip(("gate", "scale", "shift", "scale2", "shift2"), vectors, strict=False))
    arguments = norm_arguments((2, 33, 1536), BF16, parameters, pick=random(2, 33, 1, seed=8) > 0)
    arguments.update(residual=random(2, 33, 1536, seed=7), branch_weight=None, sum_dtype=BF16)
    compare("residual_norm_modulate_dual", {**arguments, **pairs, "branch_norm": branch_norm, "branch_eps": 1e-6})
    pointwise = {name: arguments[name] for name in ("x", "residual", "pick", "out_dtype")}
    compare("gated_residual", {**pointwise, "gate": pairs["gate"]})


@pytest.mark.parametrize("branch_norm", ["none", "rms"])
def test_rows_picked_by_number(branch_norm: str) -> None:
    """Gate, scale and shift of three timesteps and modalities, and the number of each token's."""
    vectors = random(3, 6 * 5376).unsqueeze(1).chunk(6, dim=-1)
    rows = dict(zip(("gate", "scale", "shift", "scale2", "shift2"), vectors, strict=False))
    numbers = torch.arange(100, device="cuda").unsqueeze(1) % 3
    arguments = norm_arguments((100, 5376), BF16, BF16, pick=numbers)
    arguments.update(residual=random(100, 5376, seed=7), branch_weight=None, sum_dtype=BF16)
    compare("residual_norm_modulate_dual", {**arguments, **rows, "branch_norm": branch_norm, "branch_eps": 1e-6})
    pointwise = {name: arguments[name] for name in ("x", "residual", "out_dtype")}
    compare("gated_residual", {**pointwise, "pick": numbers.int(), "gate": rows["gate"]})


def test_branch_roundings_on_the_gpu() -> None:
    """Z-Image's sandwich: all but sums on the other side of a tie are eager's bits."""
    from dkfuse.kernels.rounding import Rounding

    y, h = random(2, 33, 3840), random(2, 33, 3840, seed=1)
    gate, scale = random(2, 1, 2 * 3840, seed=2).tanh().chunk(2, dim=-1)
    w2, w1 = random(3840, seed=3), random(3840, seed=4)
    n = (y.float() * torch.rsqrt(y.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(BF16)
    flags = Rounding.BRANCH | Rounding.BRANCH_WEIGHTED | Rounding.GATE_PRODUCT | Rounding.SUM
    values = {"norm": "rms", "eps": 1e-5, "branch_norm": "rms", "branch_eps": 1e-5, "roundings": int(flags)}
    total, _ = torch.ops.dkfuse.residual_norm_modulate(
        y, h, gate, w2, w1, None, scale, None, **values, sum_dtype=BF16, out_dtype=BF16
    )
    assert (total == h + gate * (n * w2)).float().mean().item() > 0.999


def test_layouts() -> None:
    """Permuted rows, padded rows, per-token, per-frame, interleaved and scalar operands, all read in place."""
    width = 1152
    x = random(7, 2, width).transpose(0, 1)
    base = norm_arguments((2, 7, width), BF16, FP32, x=x)
    compare("norm_modulate", base)
    compare("norm_modulate", {**base, "x": random(2, 7, 2 * width)[..., width:]})
    compare("norm_modulate", {**base, "scale": random(2, 7, width), "shift": random(2, 7, 1)})
    compare("norm_modulate", {**base, "scale": random(2, 1, width, 6)[..., 3], "shift": random()})
    frames = {"x": random(2, 3, 5, width), "scale": random(2, 3, 1, width), "shift": random(2, 3, 1, width, seed=1)}
    compare("norm_modulate", {**base, **frames})
    heads = random(2, 7, 3, 64).transpose(1, 2)
    compare("norm_modulate", {**base, "x": heads, "weight": random(64), "bias": None, "scale": None, "shift": None})


def test_more_than_2_31_elements() -> None:
    width = 3072
    step = 2**31 - 2**31 % width
    storage = torch.empty(step + 4 * width, dtype=BF16, device=DEVICE)
    x = storage.as_strided((2, 3, width), (step, width, 1))
    x.copy_(random(2, 3, width))
    compare("norm_modulate", norm_arguments((2, 3, width), BF16, BF16, x=x))


def test_many_rows_beyond_2_31_elements() -> None:
    rows, width = 2**19 + 3, 4096
    x = torch.randn(16, width, device=DEVICE).to(BF16).repeat(rows // 16 + 1, 1)[:rows]
    assert x.numel() > 2**31
    arguments = {"scale": random(1, width), "shift": random(1, width, seed=1), "norm": "rms", "eps": 1e-6}
    arguments.update(weight=None, bias=None, out_dtype=BF16)
    out = results_of("norm_modulate", {"x": x, **arguments})["out"]
    few = results_of("norm_modulate", {"x": x[:16], **arguments})["out"]
    assert torch.equal(out[-16:], few.roll(-(rows % 16), 0))


def test_nothing_to_do() -> None:
    arguments = norm_arguments((2, 7, 64), BF16, BF16)
    arguments["x"] = arguments["x"][:, :0]
    out = torch.ops.dkfuse.norm_modulate(**arguments)
    assert out.shape == (2, 0, 64)


def test_unsupported_layout_falls_back() -> None:
    arguments = norm_arguments((2, 7, 64), BF16, BF16)
    plain = torch.ops.dkfuse.norm_modulate(**arguments)
    arguments["x"] = arguments["x"].transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(torch.ops.dkfuse.norm_modulate(**arguments), plain, rtol=2e-2, atol=2e-2)


def test_roundings_on_the_gpu() -> None:
    """Pointwise roundings agree with eager bit for bit."""
    from dkfuse.kernels.rounding import Rounding

    x, h = random(2, 33, 1152), random(2, 33, 1152, seed=1)
    gate, scale, shift = random(2, 1, 3 * 1152, seed=2).chunk(3, dim=-1)
    both = int(Rounding.GATE_PRODUCT | Rounding.SUM)
    ours = torch.ops.dkfuse.gated_residual(x, h, gate, out_dtype=BF16, roundings=both)
    assert torch.equal(ours, h + gate * x)
    bias = random(1152, seed=3)
    biased = {"branch_bias": bias, "roundings": both | int(Rounding.BRANCH_BIAS)}
    assert torch.equal(torch.ops.dkfuse.gated_residual(x, h, gate, out_dtype=BF16, **biased), h + gate * (x + bias))
    both = int(Rounding.ONE_PLUS | Rounding.PRODUCT)
    ours = torch.ops.dkfuse.scale_shift(x, scale, shift, out_dtype=BF16, roundings=both)
    assert torch.equal(ours, x * (1 + scale) + shift)


def test_kernel_node_in_a_compiled_program() -> None:
    """As a Triton kernel node Inductor launches it itself, and sees that it writes `out` only."""
    from torch._inductor.utils import run_and_get_code

    from dkfuse.bench.launch import eager, kernel_node

    x, scale, shift = random(2, 33, 1152), random(2, 1, 1152), random(2, 1, 1152, seed=1)
    norm = kernel_node()
    compiled = torch.compile(lambda x, scale, shift: norm(x + 1, scale, shift) * 2, dynamic=False)
    out, (code, *_) = run_and_get_code(compiled, x, scale, shift)
    expected = eager(x.double() + 1, scale.double(), shift.double()) * 2
    assert ((out.double() - expected).norm() / expected.norm()).item() < 6e-3
    assert "row_norm" in code
    assert code.count("empty_strided_cuda(") <= 4  # x + 1, the output, the product: no copies
