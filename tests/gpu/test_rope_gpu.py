"""norm_rope on a GPU: against fp64 and never worse than eager, every head dim, long rows, offsets beyond 2^31."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from .. import rope_calls, tensors
from ..rope_calls import call_of

pytestmark = pytest.mark.gpu

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LIMIT = {BF16: 2.4e-3, FP16: 3e-4, FP32: 1e-6}
DEVICE = "cuda"
HEAD_DIMS = (2, 16, 40, 64, 72, 88, 96, 112, 128, 256, 512, 1024)


@pytest.fixture(autouse=True)
def _ops() -> None:
    import dkfuse.kernels.ops  # noqa: F401  (registers torch.ops.dkfuse)


random = functools.partial(tensors.random, device=DEVICE)
tables = functools.partial(rope_calls.tables, device=DEVICE)


def expected_of(arguments: dict[str, Any]) -> torch.Tensor:
    from dkfuse.kernels.ops import reference_outputs

    return reference_outputs("norm_rope", arguments, compute=FP64)["out"]


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


def compare(arguments: dict[str, Any]) -> torch.Tensor:
    """By the kernel, within one rounding of fp64."""
    from dkfuse.kernels.rope_support import supports_rope

    assert supports_rope(arguments) is None
    out = torch.ops.dkfuse.norm_rope(**arguments)
    error = relative(out, expected_of(arguments))
    assert error < LIMIT[out.dtype], (error, {k: v for k, v in arguments.items() if not isinstance(v, torch.Tensor)})
    return out


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("rotation", ["none", "interleaved", "half"])
def test_head_dims(d: int, rotation: str) -> None:
    x, weight, rope, part = random(2, 7, 10, d), random(d), {}, {}
    if rotation != "none":
        rope, part = (tables("half", r, 7, 1, rotation=rotation) for r in (d, max(2, 2 * (d // 4))))
    compare(call_of(x, **part))
    compare(call_of(x, norm="rms", eps=1e-6, weight=weight, **rope))
    compare(call_of(x, norm="rms", eps=1e-6, weight=random(10, d, dtype=FP32), across=2, **rope))
    if d > 2:  # two elements may be almost equal, and their difference rounding noise
        compare(call_of(x, norm="layer", eps=1e-5, weight=weight, bias=random(d, seed=3), **rope))


@pytest.mark.parametrize("rotation", ["interleaved", "half"])
@pytest.mark.parametrize("kind", ["half", "full", "complex", "matrix"])
def test_tables_and_dtypes(rotation: str, kind: str) -> None:
    for dtype, table in ((BF16, FP32), (BF16, BF16), (FP16, FP32), (FP32, FP32), (BF16, FP64), (FP32, FP64)):
        rope = tables(kind, 96, 33, 1, dtype=table, rotation=rotation)
        compare(call_of(random(2, 33, 12, 128, dtype=dtype), norm="rms", eps=1e-6, weight=random(128), **rope))
        per_head = tables(kind, 64, 2, 12, 33, dtype=table, rotation=rotation)
        x = random(2, 33, 12, 64, dtype=dtype).transpose(1, 2)
        compare(call_of(x, norm="rms", eps=1e-6, order=[0, 2, 1, 3], **per_head))


@pytest.mark.parametrize("heads", [1, 3, 12, 20, 24, 30, 38, 40, 64, 96, 128])
def test_across_heads(heads: int) -> None:
    x, weight = random(2, 9, heads * 128).unflatten(-1, (heads, 128)), random(heads, 128)
    for norm, rotation in (("rms", "none"), ("rms", "interleaved"), ("rms", "half"), ("layer", "interleaved")):
        rope = tables("half", 128, 1, 9, 1, rotation=rotation) if rotation != "none" else {}
        compare(call_of(x, norm=norm, eps=1e-6, weight=weight, across=2, **rope))
    heads_first = {"across": 1, "weight": weight[:, None], **tables("half", 128, 9)}
    compare(call_of(x.transpose(1, 2), norm="rms", eps=1e-6, **heads_first))


@pytest.mark.parametrize("d", [1280, 2048, 3072, 4096, 16384])
def test_flat_rows(d: int) -> None:
    x = random(2, 33, d)
    for rotation, kind in itertools.product(("interleaved", "half"), ("half", "full")):
        compare(call_of(x, norm="rms", eps=1e-5, weight=random(d), **tables(kind, d, 1, 33, rotation=rotation)))
    compare(call_of(x, norm="layer", eps=1e-5, weight=random(d), bias=random(d, seed=1)))


@pytest.mark.parametrize("rotation", ["interleaved", "half"])
@pytest.mark.parametrize("d", [16, 72, 128, 512])
def test_norm_last(d: int, rotation: str) -> None:
    """The norm of rotated rows: partly rotated ones, fp64 tables, across heads, long rows that are cut."""
    weight, part = random(d), tables("full", d // 4 * 2, 7, 1, rotation=rotation)
    for kind, table in (("half", FP32), ("full", BF16), ("complex", FP64), ("matrix", FP32)):
        rope = tables(kind, d, 7, 1, dtype=table, rotation=rotation)
        last = {"eps": 1e-6, "weight": weight, "norm_last": True, **rope}
        compare(call_of(random(2, 7, 10, d), norm="rms", **last))
        compare(call_of(random(2, 7, 10, d), norm="layer", bias=random(d, seed=3), **last))
        compare(call_of(random(2, 7, 10, d), norm="rms", across=2, **{**last, "weight": random(10, d)}))
        compare(call_of(random(2, 7, 10, d, dtype=FP32), norm="rms", **last))
    compare(call_of(random(2, 7, 10, d), norm="rms", eps=1e-6, norm_last=True, **part))
    flat = tables("full", 16 * d, 1, 33, rotation=rotation)
    compare(call_of(random(2, 33, 16 * d), norm="rms", eps=1e-6, norm_last=True, weight=random(16 * d), **flat))


def test_the_roundings_of_a_rotated_row() -> None:
    """The norm reads eager's bits of Q2b: the statistics are those of the rounded row."""
    from dkfuse.kernels.rounding import Rounding

    x, cos, sin = random(2, 33, 12, 128), random(33, 1, 128, seed=1), random(33, 1, 128, seed=2)
    first, second = x.chunk(2, -1)
    y = x * cos + torch.cat((-second, first), -1) * sin
    rope = {"cos": cos, "sin": sin, "rotation": "half", "tables": "full"}
    flags = int(Rounding.ROTATION | Rounding.ROTATED)
    arguments = call_of(x, norm="rms", eps=1e-6, norm_last=True, **rope, roundings=flags)
    arguments["out_dtype"] = FP32
    expected = y.double() * torch.rsqrt(y.double().square().mean(-1, keepdim=True) + 1e-6)
    assert relative(torch.ops.dkfuse.norm_rope(**arguments), expected) < LIMIT[FP32]


def test_layouts() -> None:
    rope = tables("half", 128, 33, 1)
    packed = random(2, 33, 3, 24, 128)
    for part in packed.unbind(2):
        compare(call_of(part, norm="rms", eps=1e-6, weight=random(128), **rope))
    first = tables("half", 128, 33)
    compare(call_of(random(2, 24, 33, 128), norm="rms", **first))
    out = compare(call_of(random(2, 33, 24, 128).transpose(1, 2), norm="rms", **first, order=[0, 2, 1, 3]))
    assert out.transpose(1, 2).is_contiguous()
    compare(call_of(random(2, 33, 24, 129)[..., 1:], norm="rms", **rope))  # rows off 16-byte boundaries
    compare(
        call_of(
            random(2, 33, 24, 128),
            norm="rms",
            cos=rope["cos"][..., ::1],
            sin=random(33, 1, 128)[..., ::2],
            rotation="interleaved",
        )
    )


def eager(x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """K1 and Q1 with full tables, as Flux spells them."""
    n = F.rms_norm(x, (x.shape[-1],), weight, 1e-6)
    even, odd = n.reshape(*n.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack((-odd, even), -1).flatten(-2)
    return (n.float() * cos + turned.float() * sin).to(x.dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_never_less_accurate_than_eager(dtype: torch.dtype) -> None:
    x, weight = random(1, 512, 24, 128, dtype=dtype), random(128, dtype=dtype)
    angles = torch.outer(torch.arange(512, device=DEVICE).float(), 1e4 ** -torch.linspace(0, 1, 64, device=DEVICE))
    cos, sin = (t.repeat_interleave(2, -1)[:, None] for t in (angles.cos(), angles.sin()))
    rope = {"cos": cos, "sin": sin, "rotation": "interleaved", "tables": "full"}
    arguments = call_of(x, norm="rms", eps=1e-6, weight=weight, **rope)
    expected = expected_of(arguments)
    assert relative(compare(arguments), expected) <= relative(eager(x, weight, cos, sin), expected)


def test_fp64_tables_keep_their_digits() -> None:
    x = random(2, 33, 12, 64, dtype=FP32)
    for kind, rotation in itertools.product(("half", "complex"), ("interleaved", "half")):
        arguments = call_of(x, **tables(kind, 64, 33, 1, dtype=FP64, rotation=rotation))
        assert torch.equal(compare(arguments), expected_of(arguments).to(FP32))


def test_the_roundings_of_a_rotation() -> None:
    """Q2b in bf16: eager's bits."""
    from dkfuse.kernels.rounding import Rounding

    x, cos, sin = random(2, 33, 12, 128), random(33, 1, 128, seed=1), random(33, 1, 128, seed=2)
    first, second = x.chunk(2, -1)
    rope = {"cos": cos, "sin": sin, "rotation": "half", "tables": "full"}
    ours = torch.ops.dkfuse.norm_rope(**call_of(x, **rope, roundings=int(Rounding.ROTATION)))
    assert torch.equal(ours, x * cos + torch.cat((-second, first), -1) * sin)


def test_a_group_writes_joint_tensors() -> None:
    from dkfuse.bench.rope_cases import RopeCase

    case = RopeCase("joint", (77, 500), 24, 128, projections=2, batch=2)
    operands = case.inputs(0)
    results = case.launcher(operands)()
    expected = [t.double() for t in case.eager()({n: t.double() for n, t in operands.items()})]
    for value, wanted in zip(results, expected, strict=True):
        assert relative(value, wanted) < 6e-3  # the spelling itself rounds to float in places
    for value, wanted in zip(results, case.eager()(operands), strict=True):
        torch.testing.assert_close(value, wanted, rtol=2e-2, atol=2e-2)


def test_nan_stays_in_its_row() -> None:
    x = random(2, 33, 24, 128)
    x[1, 2, 3, 4] = float("nan")
    out = torch.ops.dkfuse.norm_rope(**call_of(x, norm="rms", **tables("half", 128, 33, 1)))
    assert out[1, 2, 3].isnan().all()
    assert out.isnan().sum() == 128
    x[1, 2, 3, 4] = float("inf")
    out = torch.ops.dkfuse.norm_rope(**call_of(x, **tables("half", 4, 33, 1)))
    assert torch.equal(out[..., 4:], x[..., 4:])


def test_nothing_to_do_and_layouts_that_fall_back() -> None:
    rope = tables("half", 128, 1, 1)
    assert torch.ops.dkfuse.norm_rope(**call_of(random(2, 0, 24, 128), norm="rms", **rope)).shape == (2, 0, 24, 128)
    x = random(2, 5, 128, 24).transpose(2, 3)
    plain = torch.ops.dkfuse.norm_rope(**call_of(x.contiguous(), norm="rms", **rope))
    torch.testing.assert_close(
        torch.ops.dkfuse.norm_rope(**call_of(x, norm="rms", **rope)), plain, rtol=2e-2, atol=2e-2
    )


def test_more_than_2_31_elements() -> None:
    step = 2**31 - 2**31 % 3072
    storage = torch.empty(step + 4 * 3072, dtype=BF16, device=DEVICE)
    x = storage.as_strided((2, 3, 24, 128), (step, 3072, 128, 1))
    x.copy_(random(2, 3, 24, 128))
    compare(call_of(x, norm="rms", eps=1e-6, weight=random(128), **tables("half", 128, 3, 1)))


def test_many_rows_beyond_2_31_elements() -> None:
    """Tokens repeat every 16, and so must results, on both sides of the boundary."""
    tokens = 2**19 + 16 * 33
    x = random(16, 32, 128).repeat(tokens // 16, 1, 1)
    assert x.numel() > 2**31
    rope = tables("half", 128, 1, 1)
    out = torch.ops.dkfuse.norm_rope(**call_of(x, norm="rms", eps=1e-6, **rope))
    few = torch.ops.dkfuse.norm_rope(**call_of(x[:16], norm="rms", eps=1e-6, **rope))
    assert torch.equal(out[-16:], few)
    assert torch.equal(out[2**18 : 2**18 + 16], few)
