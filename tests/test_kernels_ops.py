"""The dkfuse ops in plain torch: what they compute, in which roundings, what they refuse."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dkfuse.kernels import ops, reference
from dkfuse.kernels.support import OPERANDS

from .norm_calls import SHAPE, arguments_of, by_name, norm32
from .tensors import random

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LIMIT = {BF16: 3e-3, FP16: 4e-4, FP32: 1e-6}


def call(op: str, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    return by_name(op, getattr(torch.ops.dkfuse, op)(**arguments))


@pytest.mark.parametrize("op", ops.OPS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("parameters", [BF16, FP32])
def test_against_fp64(op: str, dtype: torch.dtype, parameters: torch.dtype) -> None:
    for norm in ("layer", "rms") if "norm" in op else (None,):
        more = {"norm": norm, "weight_offset": 1.0} if norm else {}
        arguments = arguments_of(op, dtype, parameters, **more)
        expected = ops.reference_outputs(op, arguments, compute=FP64)
        for name, value in call(op, arguments).items():
            assert value.dtype == dtype
            assert value.shape == SHAPE
            assert value.is_contiguous()
            assert (value.double() - expected[name]).norm() / expected[name].norm() < LIMIT[dtype]


@pytest.mark.parametrize("op", ["residual_norm_modulate", "residual_norm_modulate_dual"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("branch_norm", ["none", "layer", "rms"])
def test_branch_norms_against_fp64(op: str, dtype: torch.dtype, branch_norm: str) -> None:
    for norm in ("layer", "rms"):
        arguments = arguments_of(op, dtype, norm=norm, branch_norm=branch_norm, branch_weight_offset=1.0)
        arguments["branch_weight"] = arguments["branch_weight"] if branch_norm != "none" else None
        x, h, g, b = (arguments[name].double() for name in ("x", "residual", "gate", "branch_bias"))
        x = x + b
        if branch_norm == "layer":
            x = F.layer_norm(x, (96,), eps=1e-5) * (1 + arguments["branch_weight"].double())
        elif branch_norm == "rms":
            x = F.rms_norm(x, (96,), eps=1e-5) * (1 + arguments["branch_weight"].double())
        expected = ops.reference_outputs(op, arguments, compute=FP64)
        x2, g2 = (arguments[name].double() for name in ("x2", "gate2"))
        torch.testing.assert_close(expected["sum"], h + g * x + g2 * x2)
        for name, value in call(op, arguments).items():
            assert (value.double() - expected[name]).norm() / expected[name].norm() < LIMIT[dtype]


@pytest.mark.parametrize("op", ["residual_norm_modulate", "residual_norm_modulate_dual"])
def test_branch_arguments_have_defaults(op: str) -> None:
    """The compiler side hands over only what a site has."""
    nothing = {"branch_norm": "none", "branch_bias": None, "branch_weight": None, "branch_eps": 0.0}
    arguments = arguments_of(op, **nothing)
    few = {k: v for k, v in arguments.items() if not k.startswith("branch")}
    for name, value in ops.reference_outputs(op, few).items():
        assert torch.equal(value, ops.reference_outputs(op, arguments)[name])
        assert torch.equal(value.to(BF16), call(op, {**few, "branch_weight": None})[name])


def test_fp64_reference_is_the_formula() -> None:
    x, h, g, w, b, s, t = (random(*SHAPE, dtype=FP64, seed=i) for i in range(7))
    z = h + g * x
    n = F.layer_norm(z, (96,), eps=1e-5)
    values = {"norm": "layer", "eps": 1e-5, "weight_offset": 1.0, "scale_offset": 1.0, "roundings": 0}
    results = reference.residual_norm_modulate_dual(x, h, g, w, b, s, t, None, s, **values, compute=FP64)
    a = n * (1 + w) + b
    for ours, theirs in zip(results, (z, a * (1 + s) + t, a + s), strict=True):
        torch.testing.assert_close(ours, theirs)
    rms = reference.normalize(x, "rms", 1e-5)
    torch.testing.assert_close(rms, F.rms_norm(x, (96,), eps=1e-5))


@pytest.mark.parametrize(
    ("op", "change"),
    [
        *((op, {}) for op in ops.OPS),
        ("residual_norm_modulate", {"branch_norm": "none", "branch_weight": None}),
        ("residual_norm_modulate", {"branch_norm": "layer", "branch_weight": None}),
    ],
)
def test_opcheck(op: str, change: dict[str, Any]) -> None:
    schema = getattr(torch.ops.dkfuse, op).default._schema
    arguments = arguments_of(op, **change)
    args = tuple(arguments.get(a.name) for a in schema.arguments if not a.kwarg_only)
    kwargs = {a.name: arguments[a.name] for a in schema.arguments if a.kwarg_only}
    torch.library.opcheck(getattr(torch.ops.dkfuse, op).default, args, kwargs)


@pytest.mark.parametrize("op", ops.OPS)
def test_missing_operands(op: str) -> None:
    change = {"branch_norm": "none"} if op.startswith("residual") else {}
    arguments = {k: None if k in OPERANDS[op][1] else v for k, v in arguments_of(op, **change).items()}
    for name, value in call(op, arguments).items():
        z = arguments["x"].float() + (arguments["residual"].float() if "residual" in arguments else 0)
        expected = norm32(z, "layer") if "norm" in op and name != "sum" else z
        torch.testing.assert_close(value, expected.to(BF16), rtol=1e-2, atol=1e-2)


def test_a_sum_that_is_not_stored_is_empty() -> None:
    total, out = call("residual_norm_modulate", arguments_of("residual_norm_modulate", sum_dtype=None)).values()
    assert total.shape == (0,)
    assert out.shape == SHAPE


def test_nan_stays_in_its_row() -> None:
    arguments = arguments_of("norm_modulate")
    arguments["x"][1, 2, 3] = float("nan")
    out = torch.ops.dkfuse.norm_modulate(**arguments)
    assert out[1, 2].isnan().all()
    assert out.isnan().any(-1).sum() == 1


@pytest.mark.parametrize("op", ops.OPS)
def test_zero_tokens(op: str) -> None:
    arguments = arguments_of(op)
    for name in (*OPERANDS[op][0], "x2"):
        if name in arguments:
            arguments[name] = arguments[name][:, :0]
    assert all(value.shape == (2, 0, 96) for value in call(op, arguments).values())


@pytest.mark.parametrize(
    ("op", "change", "words"),
    [
        ("norm_modulate", {"x": random(*SHAPE, dtype=FP64)}, "x has dtype torch.float64"),
        ("norm_modulate", {"scale": torch.ones(96, dtype=torch.int64)}, "scale has dtype torch.int64"),
        ("norm_modulate", {"out_dtype": FP64}, "out_dtype is torch.float64"),
        ("norm_modulate", {"norm": "batch"}, "norm is 'batch'"),
        ("norm_modulate", {"roundings": 1 << 14}, "roundings is 16384"),
        ("norm_modulate", {"shift": random(3, 1, 96)}, "shift of shape (3, 1, 96) does not broadcast"),
        ("norm_modulate", {"shift": random(2, 2, 5, 96)}, "does not broadcast"),
        ("norm_modulate", {"x": random().squeeze()}, "x has no dims"),
        ("gated_residual", {"residual": random(2, 4, 96)}, "residual has shape (2, 4, 96) but x (2, 5, 96)"),
        ("residual_norm_modulate", {"branch_norm": "none"}, "branch_weight is given but branch_norm is 'none'"),
        ("residual_norm_modulate", {"branch_norm": "group"}, "branch_norm is 'group'"),
        ("residual_norm_modulate_dual", {"branch_weight": random(95)}, "branch_weight of shape (95,) does not"),
        ("residual_norm_modulate_dual", {"branch_weight": random(96, dtype=FP64)}, "branch_weight has dtype"),
        ("residual_norm_modulate", {"branch_bias": random(95)}, "branch_bias of shape (95,) does not broadcast"),
        ("residual_norm_modulate", {"x2": random(2, 6, 96)}, "x2 of shape (2, 6, 96) does not broadcast"),
        ("residual_norm_modulate", {"x2": None}, "gate2 is given but x2 is not"),
        ("residual_norm_modulate", {"limit": -1.0}, "limit is -1.0"),
        ("gated_residual", {"branch_bias": random(96, dtype=FP64)}, "branch_bias has dtype torch.float64"),
    ],
)
def test_errors_name_the_value(op: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        call(op, arguments_of(op, **change))
    assert words in str(error.value)


def test_importing_the_ops_does_not_import_triton(root: Any) -> None:
    code = "import sys, dkfuse.kernels.ops, dkfuse.kernels.launch; print([m for m in sys.modules if 'triton' in m][:3])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = eval(done.stdout)
    assert not [m for m in loaded if m == "triton" or m.startswith("triton.")]
