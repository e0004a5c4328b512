"""dkfuse::norm_rope with norm_last, a norm behind the rotation: what `test_rope_op` does not say of both orders."""

from __future__ import annotations

import pytest
import torch

from dkfuse.kernels.rounding import Rounding

from .rope_calls import tables
from .tensors import random
from .test_rope_op import BF16, FP32, FP64, B, D, H, S, call, formula


def test_roundings_reproduce_eager() -> None:
    """Q2b, then R0, in bf16 arithmetic."""
    x, w = random(2, S, H, D), random(D, seed=1)
    cos, sin = random(S, 1, D, seed=2), random(S, 1, D, seed=3)
    first, second = x.chunk(2, -1)
    y = x * cos + torch.cat((-second, first), -1) * sin
    eager = (y.float() * torch.rsqrt(y.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(BF16) * w
    flags = Rounding.ROTATION | Rounding.ROTATED | Rounding.NORM | Rounding.WEIGHTED
    rope = {"cos": cos, "sin": sin, "rotation": "half", "tables": "full"}
    more = {"weight": w, "norm": "rms", "eps": 1e-6, "norm_last": True, **rope}
    assert torch.equal(call(x, **more, roundings=int(flags)), eager)
    assert not torch.equal(call(x, **more, roundings=int(flags & ~Rounding.ROTATED)), eager)


def test_alone_it_is_what_it_is_without() -> None:
    """Without a rotation or without a norm there is no order of the two."""
    x, rope = random(B, S, H, D), tables("half", D, S, 1)
    assert torch.equal(call(x, norm="rms", norm_last=True), call(x, norm="rms"))
    assert torch.equal(call(x, **rope, norm_last=True), call(x, **rope))


def test_fp64_tables_rotate_in_fp64() -> None:
    """The statistics are of the rotated row in fp32."""
    x = random(2, S, H, D, dtype=FP32)
    more = {**tables("complex", D, S, 1, dtype=FP64), "norm": "none"}
    y = formula(x, more).to(FP32)
    expected = y * torch.rsqrt(y.square().mean(-1, keepdim=True))
    assert torch.equal(call(x, **{**more, "norm": "rms"}, norm_last=True), expected)


@pytest.mark.parametrize("rotation", ["interleaved", "half"])
def test_columns_behind_the_rotation_count_in_the_norm(rotation: str) -> None:
    x = random(2, S, H, D, dtype=FP32)
    more = {**tables("half", 12, S, 1), "rotation": rotation, "norm": "none"}
    y = formula(x, more)
    expected = y * torch.rsqrt(y.square().mean(-1, keepdim=True))
    ours = call(x, **{**more, "norm": "rms"}, norm_last=True)
    torch.testing.assert_close(ours, expected.to(FP32), rtol=1e-5, atol=1e-6)


def test_the_order_matters() -> None:
    """Where tables do not keep lengths, or weights differ by column."""
    x, more = random(2, S, H, D), {**tables("half", D, S, 1), "norm": "rms", "weight": random(D, seed=4)}
    assert not torch.allclose(call(x, **more, norm_last=True), call(x, **more), rtol=0.1, atol=0.1)


def test_nan_spreads_over_its_row() -> None:
    x = random(B, S, H, D, dtype=FP32)
    x[1, 2, 0, 3] = float("nan")
    assert call(x, norm="rms", norm_last=True, **tables("half", D, S, 1)).isnan().sum() == D
