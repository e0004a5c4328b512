"""Queries and keys through the whole backend on a GPU: one launch, the joint tensor, in place, and eager's values."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dkfuse
from dkfuse import Status

from .on_device import random

pytestmark = pytest.mark.gpu

BATCH, TEXT, IMAGE, HEADS, WIDTH = 2, 48, 256, 6, 64
D = HEADS * WIDTH


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def complex_rope(x: Tensor, table: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table[:, None]).flatten(-2).type_as(x)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def heads(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).unflatten(-1, (HEADS, -1))


def rms(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), w, 1e-6)


def joint_before_rope(image: Tensor, text: Tensor, w: Tensor, g: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """FLUX.1: both streams normed, joined, rotated."""
    q, k = (torch.cat([rms(heads(s, w[i]), g) for s in (text, image)], dim=1) for i in (0, 1))
    v = torch.cat([heads(s, w[2]) for s in (text, image)], dim=1)
    q, k = (interleaved(t, cos[:, None], sin[:, None]) for t in (q, k))
    return attention(q, k, v)


def joint_after_complex_rope(image: Tensor, text: Tensor, w: Tensor, g: Tensor, table: Tensor) -> Tensor:
    """Qwen-Image: both streams rotated as complex numbers, then joined."""
    starts = {TEXT: table[:TEXT], IMAGE: table[TEXT:]}
    q, k = (
        torch.cat([complex_rope(rms(heads(s, w[i]), g), starts[s.shape[1]]) for s in (text, image)], dim=1)
        for i in (0, 1)
    )
    v = torch.cat([heads(s, w[2]) for s in (text, image)], dim=1)
    return attention(q, k, v)


def across_heads(image: Tensor, w: Tensor, g: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Wan: one norm over all heads, then slice writes."""
    q, k = (F.rms_norm(image @ w[i], (D,), g, 1e-6).unflatten(-1, (HEADS, -1)) for i in (0, 1))

    def rotate(x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(x)
        out[..., 0::2] = even * cos[:, None] - odd * sin[:, None]
        out[..., 1::2] = even * sin[:, None] + odd * cos[:, None]
        return out

    return attention(rotate(q), rotate(k), heads(image, w[2]))


def image_only_in_place(joint: Tensor, w: Tensor, g: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """CogVideoX: LayerNorm of the heads, rotation of the image's part of the joint tensor in place."""
    q, k, v = (heads(joint, w[i]).transpose(1, 2) for i in range(3))
    q, k = (F.layer_norm(t, (WIDTH,), g, None, 1e-6) for t in (q, k))
    q[:, :, TEXT:] = interleaved(q[:, :, TEXT:], cos, sin)
    k[:, :, TEXT:] = interleaved(k[:, :, TEXT:], cos, sin)
    return F.scaled_dot_product_attention(q, k, v)


def packed_halves(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A packed projection, NeoX halves, no norm."""
    q, k, v = (x @ torch.cat([w[0], w[1], w[2]], dim=1)).unflatten(-1, (3, HEADS, WIDTH)).unbind(2)

    def rotate(t: Tensor) -> Tensor:
        a, b = t.float().chunk(2, dim=-1)
        return (t.float() * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]).to(t.dtype)

    return attention(rotate(q), rotate(k), v)


def tables(length: int) -> tuple[Tensor, Tensor]:
    angles = random(length, WIDTH // 2, dtype=torch.float32).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def streams() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        random(BATCH, IMAGE, D),
        random(BATCH, TEXT, D),
        random(3, D, D) / D**0.5,
        1 + random(WIDTH) * 0.1,
    )


def cases() -> list[tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]], str, int]]:
    """(function, its inputs, the kernel that must appear, fused sites of queries and keys)"""

    def half(length: int) -> tuple[Tensor, Tensor]:
        return tuple(t[:, ::2].contiguous() for t in tables(length))  # type: ignore[return-value]

    def polar() -> Tensor:
        return torch.polar(torch.ones(TEXT + IMAGE, WIDTH // 2, device="cuda"), half(TEXT + IMAGE)[0])

    def with_image() -> tuple[Tensor, Tensor]:
        image, _, w, _ = streams()
        return image, w

    return [
        (joint_before_rope, lambda: (*streams(), *tables(TEXT + IMAGE)), "dkfuse_norm_rope_x4", 6),
        (joint_after_complex_rope, lambda: (*streams(), polar()), "dkfuse_norm_rope_x4", 8),
        (across_heads, lambda: (*with_image(), 1 + random(D) * 0.1, *half(IMAGE)), "dkfuse_norm_rope_x2", 4),
        (
            image_only_in_place,
            lambda: (random(BATCH, TEXT + IMAGE, D), streams()[2], streams()[3], *tables(IMAGE)),
            "dkfuse_norm_rope_x4",
            4,
        ),
        (packed_halves, lambda: (*with_image(), *tables(IMAGE)), "dkfuse_norm_rope_x2", 2),
    ]


@pytest.mark.parametrize(
    "case", range(5), ids=lambda i: cases()[i][0].__name__ if torch.cuda.is_available() else str(i)
)
def test_through_the_backend(case: int) -> None:
    function, inputs, kernel, sites = cases()[case]
    args = inputs()
    torch.compiler.reset()
    exact = function(*(a.to(torch.complex128 if a.is_complex() else torch.float64) for a in args))
    with torch.no_grad(), dkfuse.record() as coverage:
        compiled = torch.compile(function, backend="dkfuse", dynamic=False)
        compiled(*args)
    ours, eager = compiled(*args), function(*args)
    fused = [s for s in coverage.sites if s.status is Status.FUSED and s.family in ("rotation", "qk_norm")]
    assert len(fused) == sites, str(coverage)

    def error(out: Tensor) -> float:
        return ((out.double() - exact).norm() / exact.norm()).item()

    assert error(ours) <= 1.05 * error(eager) + 1e-4
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        compiled(*args)
        torch.cuda.synchronize()
    names = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert names.count(kernel) == 1, names
    assert not any(re.search("complex|elementwise", n) for n in names), names


def test_in_place_needs_no_memory() -> None:
    """A rotated projection takes the memory of the projection."""
    image, _, w, _ = streams()
    cos, sin = tables(IMAGE)

    def function(x: Tensor, w: Tensor) -> Tensor:
        q, k, v = (heads(x, w[i]) for i in range(3))
        return attention(interleaved(q, cos[:, None], sin[:, None]), interleaved(k, cos[:, None], sin[:, None]), v)

    peaks = {}
    for backend in ("inductor", "dkfuse"):
        torch.compiler.reset()
        with torch.no_grad():
            compiled = torch.compile(function, backend=backend, dynamic=False)
            compiled(image, w)
            torch.cuda.reset_peak_memory_stats()
            compiled(image, w)
        peaks[backend] = torch.cuda.max_memory_allocated()
    assert peaks["dkfuse"] <= peaks["inductor"], peaks


@pytest.mark.parametrize("dynamic", [False, True])
def test_other_lengths(dynamic: bool) -> None:
    """Token counts as symbols, or compiled anew; the values stay eager's."""
    torch.compiler.reset()
    compiled = torch.compile(joint_before_rope, backend="dkfuse", dynamic=dynamic)
    image, text, w, g = streams()
    for length in (IMAGE, IMAGE // 2, IMAGE - 8):
        args = (image[:, :length].contiguous(), text, w, g, *tables(TEXT + length))
        with torch.no_grad():
            ours, eager = compiled(*args), joint_before_rope(*args)
        torch.testing.assert_close(ours, eager, rtol=0, atol=3e-2)
