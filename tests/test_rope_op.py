"""dkfuse::norm_rope in plain torch: what it computes, in which roundings and layouts, what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dkfuse.kernels import ops
from dkfuse.kernels.rope_support import NORMS, TABLES, with_defaults
from dkfuse.kernels.rounding import Rounding

from .rope_calls import call_of, tables
from .tensors import random

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LIMIT = {BF16: 3e-3, FP16: 4e-4, FP32: 1e-6}
B, S, H, D = 2, 5, 3, 16


def call(x: torch.Tensor, **more: Any) -> torch.Tensor:
    return torch.ops.dkfuse.norm_rope(**call_of(x, **more))


def matrices(more: dict[str, Any], r: int) -> torch.Tensor:
    """The rotation as an [..., r, r] matrix, entry by entry: an independent way to say what the tables mean."""
    cos, sin = more["cos"].double(), more["sin"].double() if more["sin"] is not None else None
    result = torch.zeros(*cos.shape[:-1], r, r, dtype=FP64)
    for i in range(r // 2):
        a, b = (2 * i, 2 * i + 1) if more["rotation"] == "interleaved" else (i, i + r // 2)
        if more["tables"] == "half":
            entries = (cos[..., i], -sin[..., i], sin[..., i], cos[..., i])
        elif more["tables"] == "full":
            entries = (cos[..., a], -sin[..., a], sin[..., b], cos[..., b])
        elif more["tables"] == "complex":
            c, s = cos[..., 2 * i], cos[..., 2 * i + 1]
            entries = (c, -s, s, c)
        else:
            entries = tuple(cos[..., 4 * i + k] for k in range(4))
        result[..., a, a], result[..., a, b], result[..., b, a], result[..., b, b] = entries
    return result


def formula(x: torch.Tensor, more: dict[str, Any]) -> torch.Tensor:
    """The op in fp64 by matrix products."""
    if more.get("norm_last"):
        return normed(rotated(x.double(), more), more)
    return rotated(normed(x.double(), more), more)


def normed(a: torch.Tensor, more: dict[str, Any]) -> torch.Tensor:
    if more["norm"] != "none":
        across, shape = more.get("across"), a.shape
        flat = a if across is None else a.movedim(across, -2).flatten(-2)
        width = flat.shape[-1:]
        flat = F.layer_norm(flat, width, eps=1e-5) if more["norm"] == "layer" else F.rms_norm(flat, width, eps=1e-5)
        a = flat if across is None else flat.unflatten(-1, (shape[across], shape[-1])).movedim(-2, across)
    if more.get("weight") is not None:
        a = a * (more["weight_offset"] + more["weight"].double())
    return a if more.get("bias") is None else a + more["bias"].double()


def rotated(a: torch.Tensor, more: dict[str, Any]) -> torch.Tensor:
    if more["rotation"] == "none":
        return a
    times, per = TABLES[more["tables"]]
    r = more["cos"].shape[-1] * per // times
    return torch.cat(((matrices(more, r) @ a[..., :r, None]).squeeze(-1), a[..., r:]), -1)


SPACE = list(
    itertools.product(
        NORMS, ["none", "interleaved", "half"], TABLES, [16, 12], [None, 1, 2], [None, [0, 2, 1, 3], [2, 1, 0, 3]]
    )
)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_against_fp64(dtype: torch.dtype, last: bool) -> None:
    x = random(B, S, H, D, dtype=dtype)
    for norm, rotation, kind, r, across, order in SPACE:
        if (rotation == "none" and (kind, r) != ("half", 16)) or (norm == "none" and across is not None):
            continue
        more = {**tables(kind, r, S, 1), "rotation": rotation} if rotation != "none" else {"rotation": rotation}
        weight = random(*((H, D) if across == 2 else (D,)), dtype=FP32, seed=5)
        more.update(norm=norm, eps=1e-5, across=across, order=order, weight=weight, weight_offset=1.0, norm_last=last)
        more["bias"] = random(D, dtype=FP32, seed=6) if norm == "layer" else None
        out, expected = call(x, **more), formula(x, more)
        assert out.dtype == dtype
        assert out.shape == x.shape
        assert out.permute(order or [0, 1, 2, 3]).is_contiguous()
        error = (out.double() - expected).norm() / expected.norm()
        assert error < LIMIT[dtype], (norm, rotation, kind, r, across, order, error)


@pytest.mark.parametrize("outer", [(), (S, 1), (1, S, 1), (B, S, 1), (S, H), (B, S, H)])
@pytest.mark.parametrize("rotation", ["interleaved", "half"])
def test_tables_broadcast(outer: tuple[int, ...], rotation: str) -> None:
    x = random(B, S, H, D, dtype=FP32)
    more = {**tables("half", D, *outer), "rotation": rotation, "norm": "none"}
    torch.testing.assert_close(call(x, **more).double(), formula(x, more), rtol=1e-5, atol=1e-5)


def test_spellings_of_models() -> None:
    """Q1, Q2 and Q3 with K1, as models write them, from one table of angles."""
    x = random(1, S, H, D)
    angles = torch.outer(torch.arange(S).float(), 1000 ** -torch.linspace(0, 1, D // 2))
    n = F.rms_norm(x.float(), (D,), eps=1e-6)
    norm = {"norm": "rms", "eps": 1e-6}
    half = {"cos": angles.cos()[:, None], "sin": angles.sin()[:, None]}
    full = {k: t.repeat_interleave(2, -1) for k, t in half.items()}
    twice = {k: torch.cat((t, t), -1) for k, t in half.items()}
    complexes = torch.polar(torch.ones_like(angles), angles)[:, None]
    pairs = n.unflatten(-1, (-1, 2))
    expected = torch.view_as_real(torch.view_as_complex(pairs) * complexes).flatten(-2).to(BF16)
    rotate = torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2)
    torch.testing.assert_close((n * full["cos"] + rotate * full["sin"]).to(BF16), expected, rtol=8e-3, atol=1e-3)
    flat = torch.view_as_real(complexes).flatten(-2)
    for kind, given in (("half", half), ("full", full), ("complex", {"cos": flat, "sin": None})):
        ours = call(x, **norm, **given, rotation="interleaved", tables=kind)
        torch.testing.assert_close(ours, expected, rtol=8e-3, atol=1e-3)
    first, second = n.chunk(2, -1)
    expected = (n * twice["cos"] + torch.cat((-second, first), -1) * twice["sin"]).to(BF16)
    for kind, given in (("half", half), ("full", twice)):
        ours = call(x, **norm, **given, rotation="half", tables=kind)
        torch.testing.assert_close(ours, expected, rtol=8e-3, atol=1e-3)


def test_roundings_reproduce_eager() -> None:
    """Q2b, bf16 arithmetic, behind R0, two roundings in the norm."""
    x, w = random(2, S, H, D), random(D, seed=1)
    cos, sin = random(S, 1, D, seed=2), random(S, 1, D, seed=3)
    n = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(BF16) * w
    first, second = n.chunk(2, -1)
    eager = n * cos + torch.cat((-second, first), -1) * sin
    flags = int(Rounding.NORM | Rounding.WEIGHTED | Rounding.ROTATION)
    rope = {"cos": cos, "sin": sin, "rotation": "half", "tables": "full"}
    ours = call(x, weight=w, norm="rms", eps=1e-6, **rope, roundings=flags)
    assert torch.equal(ours, eager)
    assert not torch.equal(ours, call(x, weight=w, norm="rms", eps=1e-6, **rope))


def test_fp64_tables_rotate_in_fp64() -> None:
    """Positions whose angles fp32 cannot tell apart: the products keep the table's digits."""
    x = random(2, S, H, D, dtype=FP32)
    more = {**tables("complex", D, S, 1, dtype=FP64), "norm": "none"}
    expected = formula(x, more)
    assert torch.equal(call(x, **more), expected.to(FP32))
    assert ops.reference_outputs("norm_rope", with_defaults({"x": x, **more}))["out"].dtype == FP64


def test_columns_behind_the_rotation_are_untouched() -> None:
    x = random(2, S, H, D)
    x[..., 12:] = float("inf")
    for rotation in ("interleaved", "half"):
        out = call(x, **{**tables("half", 12, S, 1), "rotation": rotation})
        assert torch.equal(out[..., 12:], x[..., 12:])
        assert not out.isnan().any()


def test_without_norm_and_rotation_it_is_a_copy() -> None:
    x = random(B, H, S, D)
    out = call(x, order=[0, 2, 1, 3])
    assert torch.equal(out, x)
    assert out.stride() == (S * H * D, D, H * D, 1)


def test_nan_spreads_as_in_eager() -> None:
    x = random(B, S, H, D, dtype=FP32)
    x[1, 2, 0, 3] = float("nan")
    rope = tables("half", D, S, 1)
    assert call(x, **rope).isnan().sum() == 2  # a pair
    assert call(x, **rope, norm="rms").isnan().sum() == D
    assert call(x, **rope, norm="layer", across=2).isnan().sum() == H * D


def test_zero_tokens() -> None:
    x = random(B, 0, H, D)
    assert call(x, norm="rms", **tables("half", D, 1, 1)).shape == (B, 0, H, D)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"across": 2, "order": [0, 2, 1, 3], **tables("complex", D, S, 1)},
        {"norm": "layer", "rotation": "half", "weight": random(D), "bias": random(D), "out_dtype": FP32},
        {"rotation": "none", "cos": None, "sin": None, "norm": "none"},
        {"norm_last": True, "weight": random(D), "across": 1},
    ],
)
def test_opcheck(change: dict[str, Any]) -> None:
    arguments = {"x": random(B, S, H, D), "norm": "rms", "eps": 1e-6, **tables("half", D, S, 1), "out_dtype": BF16}
    arguments = with_defaults({**arguments, **change})
    names = [a.name for a in torch.ops.dkfuse.norm_rope.default._schema.arguments if not a.kwarg_only]
    keywords = {k: v for k, v in arguments.items() if k not in names}
    torch.library.opcheck(torch.ops.dkfuse.norm_rope.default, tuple(arguments[n] for n in names), keywords)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": random(B, S, H, D, dtype=FP64)}, "x has dtype torch.float64"),
        (
            {"cos": torch.ones(S, 1, 8, dtype=torch.int32)},
            "cos has dtype torch.int32; use float16, bfloat16, float32 or",
        ),
        ({"out_dtype": FP64}, "out_dtype is torch.float64"),
        ({"x": random().squeeze()}, "x has no dims"),
        ({"norm": "batch"}, "norm is 'batch'"),
        ({"rotation": "neox"}, "rotation is 'neox'"),
        ({"tables": "split"}, "tables is 'split'"),
        ({"across": 3}, "across is 3"),
        ({"across": 1, "norm": "none"}, "across is 1 but norm is 'none'"),
        ({"order": [0, 1, 3, 2]}, "order is [0, 1, 3, 2]"),
        ({"order": [0, 1, 1, 3]}, "order is [0, 1, 1, 3]"),
        ({"roundings": 1 << 14}, "roundings is 16384"),
        ({"sin": None}, "sin is missing"),
        ({"tables": "complex"}, "sin is given"),
        ({"rotation": "none"}, "cos is given; rotation 'none'"),
        ({"sin": random(S, 1, 6)}, "cos has 8 columns but sin 6"),
        ({"cos": torch.ones(()), "sin": torch.ones(())}, "a table has no dims"),
        ({"tables": "full", "cos": random(S, 1, 7), "sin": random(S, 1, 7)}, "cos has 7 columns"),
        ({"cos": random(S, 1, 9), "sin": random(S, 1, 9)}, "rotate 18 columns but x has 16"),
        ({"cos": random(S - 1, 1, 8)}, "cos of shape (4, 1, 8) does not broadcast"),
        ({"cos": random(1, B, S, 1, 8)}, "does not broadcast"),
        ({"weight": random(H + 1, D)}, "weight of shape (4, 16) does not broadcast"),
    ],
)
def test_errors_name_the_value(change: dict[str, Any], words: str) -> None:
    arguments = {"x": random(B, S, H, D), "norm": "rms", **tables("half", D, S, 1), **change}
    with pytest.raises(ValueError) as error:
        call(arguments.pop("x"), **arguments)
    assert words in str(error.value)
