"""The dkfuse ops in plain torch: what they compute, in which roundings, what they refuse."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dkfuse.kernels import ops, reference
from dkfuse.kernels.rounding import Rounding
from dkfuse.kernels.support import OPERANDS

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LIMIT = {BF16: 3e-3, FP16: 4e-4, FP32: 1e-6}
SHAPE = (2, 5, 96)


def random(*size: int, dtype: torch.dtype = BF16, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + 31 * len(size))).to(dtype)


def arguments_of(op: str, dtype: torch.dtype = BF16, parameters: torch.dtype = FP32, **more: Any) -> dict[str, Any]:
    """A call of `op` with every operand, gate, scale and shift as chunks of one modulation vector."""
    full, broadcast, outputs = OPERANDS[op]
    vectors = random(2, 1, 6 * SHAPE[-1], dtype=parameters).chunk(6, dim=-1)
    slices = {"gate": 0, "scale": 1, "shift": 2, "scale2": 3, "shift2": 4}
    arguments: dict[str, Any] = {name: random(*SHAPE, dtype=dtype, seed=i) for i, name in enumerate(full)}
    for name in broadcast:
        arguments[name] = vectors[slices[name]] if name in slices else random(96, dtype=parameters, seed=len(name))
    if "weight" in broadcast:
        arguments.update(norm="layer", eps=1e-6, weight_offset=0.0)
    if "branch_weight" in broadcast:
        arguments.update(branch_norm="rms", branch_eps=1e-5, branch_weight_offset=0.0)
    if "scale" in broadcast:
        arguments["scale_offset"] = 1.0
    if "sum" in outputs:
        arguments["sum_dtype"] = dtype
    return {**arguments, "out_dtype": dtype, "roundings": 0, **more}


def call(op: str, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    results = getattr(torch.ops.dkfuse, op)(**arguments)
    results = results if isinstance(results, tuple) else (results,)
    return dict(zip(OPERANDS[op][2], results, strict=True))


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
        torch.testing.assert_close(expected["sum"], h + g * x)
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


# -- roundings: eager's bits --


def flags(*names: str) -> int:
    return int(sum((Rounding[name] for name in names), Rounding.NONE))


def norm32(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The fp32 normalised row as PyTorch's own kernels give it, before eager rounds it."""
    x = x.float()
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def tail(n: torch.Tensor, roundings: int, w: Any = None, b: Any = None, s: Any = None, t: Any = None) -> torch.Tensor:
    """Everything of norm_modulate behind the reduction, with an output in bf16."""
    return reference.modulate(reference.affine(n, w, b, 0.0, roundings, BF16), s, t, 1.0, roundings, BF16).to(BF16)


def spellings() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Spelling (see the table of spellings) -> (eager in bf16, ours from the same fp32 norm)."""
    x, w, b = random(*SHAPE), random(96, seed=1), random(96, seed=2)
    s, t = random(2, 1, 96, seed=3), random(2, 1, 96, seed=4)
    s32, t32 = s.float() * 1.01, t.float() * 1.01
    ln, rms = norm32(x, "layer"), norm32(x, "rms")
    n1 = (ln * w.float() + b.float()).to(BF16)
    r0 = rms.to(BF16) * w
    r1 = (rms * w.float()).to(BF16)
    modulation = ("ONE_PLUS", "PRODUCT")
    return {
        "A1": (ln.to(BF16) * (1 + s) + t, tail(ln, flags("NORM", *modulation), s=s, t=t)),
        "A1 commuted": ((1 + s) * ln.to(BF16) + t, tail(ln, flags("NORM", *modulation), s=s, t=t)),
        "A1a": (n1 * (1 + s) + t, tail(ln, flags("AFFINE", *modulation), w, b, s, t)),
        "A1r R2": (rms.to(BF16) * (1 + s) + t, tail(rms, flags("NORM", *modulation), s=s, t=t)),
        "A1r R1": (r1 * (1 + s) + t, tail(rms, flags("WEIGHTED", *modulation), w, s=s, t=t)),
        "A2": (r0 * (1.0 + s), tail(rms, flags("NORM", "WEIGHTED", "ONE_PLUS"), w, s=s)),
        "A2L": (ln.to(BF16) * (1 + s), tail(ln, flags("NORM", "ONE_PLUS"), s=s)),
        "A4": ((ln * (1 + s32) + t32).to(BF16), tail(ln, 0, s=s32, t=t32)),
        "A5": ((rms * (1 + s.float())).to(BF16), tail(rms, 0, s=s)),
        "A6": ((r0.float() * (1 + s.float()) + t.float()).to(BF16), tail(rms, flags("NORM", "WEIGHTED"), w, s=s, t=t)),
        "A8": (ln.to(BF16) + t, tail(ln, flags("NORM"), t=t)),
        "N1": (n1, tail(ln, 0, w, b)),
        "R0": (r0, tail(rms, flags("NORM"), w)),
        "R1": (r1, tail(rms, 0, w)),
        "R2": (rms.to(BF16), tail(rms, 0)),
    }


@pytest.mark.parametrize("name", list(spellings()))
def test_roundings_reproduce_eager(name: str) -> None:
    eager, ours = spellings()[name]
    assert eager.dtype == BF16
    assert torch.equal(eager, ours)


def test_residual_roundings_reproduce_eager() -> None:
    y, h, g = random(*SHAPE), random(*SHAPE, seed=1), random(2, 1, 96, seed=2)
    ours = torch.ops.dkfuse.gated_residual
    both = flags("GATE_PRODUCT", "SUM")
    for eager in (h + g * y, y * g + h, h + (g.float() * y.float()).to(BF16)):  # G1 in its operand orders, G5
        assert torch.equal(ours(y, h, g, out_dtype=BF16, roundings=both), eager)
    g32 = g.float() * 1.01
    assert torch.equal(ours(y, h, g32, out_dtype=BF16), (h.float() + y * g32).to(BF16))  # G4
    assert torch.equal(ours(y, h, None, out_dtype=BF16), h + y)  # G7
    assert torch.equal(ours(y, h, g, out_dtype=BF16), torch.addcmul(h.float(), g.float(), y.float()).to(BF16))
    b = random(96, seed=3)
    biased = flags("BRANCH_BIAS", "GATE_PRODUCT", "SUM")
    assert torch.equal(ours(y, h, g, b, out_dtype=BF16, roundings=biased), h + g * (y + b))
    assert torch.equal(ours(y, h, None, b, out_dtype=BF16, roundings=biased), h + (y + b))
    assert not torch.equal(ours(y, h, g, b, out_dtype=BF16, roundings=both), h + g * (y + b))


def test_sandwich_roundings_reproduce_eager() -> None:
    """G3, then A2: Z-Image's `x = x + gate.tanh() * norm2(y)`, `norm1(x) * scale`, both norms R0."""
    y, h, g, s = random(*SHAPE), random(*SHAPE, seed=1), random(2, 1, 96, seed=2).tanh(), random(2, 1, 96, seed=3)
    w2, w1 = random(96, seed=4), random(96, seed=5)
    eager = h + g * (norm32(y, "rms").to(BF16) * w2)
    next_norm = (norm32(eager, "rms").to(BF16) * w1) * (1.0 + s)
    names = ("BRANCH", "BRANCH_WEIGHTED", "GATE_PRODUCT", "SUM", "NORM", "WEIGHTED", "ONE_PLUS")
    dtypes = {"sum_dtype": BF16, "out_dtype": BF16}
    both = {"norm": "rms", "eps": 1e-6, "branch_norm": "rms", "branch_eps": 1e-6}
    ours = torch.ops.dkfuse.residual_norm_modulate
    total, out = ours(y, h, g, w2, w1, None, s, None, **both, **dtypes, roundings=flags(*names))
    assert torch.equal(total, eager)
    assert torch.equal(out, next_norm)
    # R1, one rounding behind the weight, and R2, no weight, each differ from R0.
    r1 = h + g * (norm32(y, "rms") * w2.float()).to(BF16)
    total, _ = ours(y, h, g, w2, w1, None, s, None, **both, **dtypes, roundings=flags(*names[1:]))
    assert torch.equal(total, r1)
    assert not torch.equal(r1, eager)
    total, _ = ours(y, h, g, None, w1, None, s, None, **both, **dtypes, roundings=flags(*names))
    assert torch.equal(total, h + g * norm32(y, "rms").to(BF16))
    # the projection's own bias, read rounded by the branch norm
    b = random(96, seed=6)
    total, _ = ours(y, h, g, w2, w1, None, s, None, b, **both, **dtypes, roundings=flags("BRANCH_BIAS", *names))
    assert torch.equal(total, h + g * (norm32(y + b, "rms").to(BF16) * w2))
    # G3m: Mochi's norm and gate share one rounding.
    total, _ = ours(y, h, g, None, w1, None, s, None, **both, **dtypes, roundings=flags("GATE_PRODUCT", "SUM"))
    assert torch.equal(total, h + (norm32(y, "rms") * g.float()).to(BF16))


def test_the_norm_reads_the_rounded_sum_only_under_sum() -> None:
    y, h = random(*SHAPE), random(*SHAPE, seed=1)
    z = (h + y).float()
    common = {"norm": "layer", "eps": 1e-6, "sum_dtype": BF16, "out_dtype": FP32}
    arguments = (y, h, None, None, None, None, None, None)
    total, out = torch.ops.dkfuse.residual_norm_modulate(*arguments, **common, roundings=flags("SUM"))
    assert torch.equal(total, z.to(BF16))
    torch.testing.assert_close(out, norm32(z, "layer"))
    _, out = torch.ops.dkfuse.residual_norm_modulate(*arguments, **common)
    torch.testing.assert_close(out, norm32(h.float() + y.float(), "layer"))


# -- edges --


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
    for name in OPERANDS[op][0]:
        arguments[name] = arguments[name][:, :0]
    assert all(value.shape == (2, 0, 96) for value in call(op, arguments).values())


@pytest.mark.parametrize(
    ("op", "change", "words"),
    [
        ("norm_modulate", {"x": random(*SHAPE, dtype=FP64)}, "x has dtype torch.float64"),
        ("norm_modulate", {"scale": torch.ones(96, dtype=torch.int64)}, "scale has dtype torch.int64"),
        ("norm_modulate", {"out_dtype": FP64}, "out_dtype is torch.float64"),
        ("norm_modulate", {"norm": "batch"}, "norm is 'batch'"),
        ("norm_modulate", {"roundings": 1 << 12}, "roundings is 4096"),
        ("norm_modulate", {"shift": random(3, 1, 96)}, "shift of shape (3, 1, 96) does not broadcast"),
        ("norm_modulate", {"shift": random(2, 2, 5, 96)}, "does not broadcast"),
        ("norm_modulate", {"x": random().squeeze()}, "x has no dims"),
        ("gated_residual", {"residual": random(2, 4, 96)}, "residual has shape (2, 4, 96) but x (2, 5, 96)"),
        ("residual_norm_modulate", {"branch_norm": "none"}, "branch_weight is given but branch_norm is 'none'"),
        ("residual_norm_modulate", {"branch_norm": "group"}, "branch_norm is 'group'"),
        ("residual_norm_modulate_dual", {"branch_weight": random(95)}, "branch_weight of shape (95,) does not"),
        ("residual_norm_modulate_dual", {"branch_weight": random(96, dtype=FP64)}, "branch_weight has dtype"),
        ("residual_norm_modulate", {"branch_bias": random(95)}, "branch_bias of shape (95,) does not broadcast"),
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
