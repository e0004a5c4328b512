"""FlashInfer's RMS norms and rotation as norm_modulate, residual_norm_modulate and norm_rope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from flashinfer.norm import fused_add_rmsnorm, rmsnorm
from flashinfer.rope import _apply_rope_pos_ids_cos_sin_cache as apply_rope

from .peer_norms import aligned, run_add_norm, run_norm

ALIGNMENT = 128  # what its kernels for contiguous rows are compiled for


def norm(arguments: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """out = x*rsqrt(mean(x^2) + eps)*weight."""
    run_norm(_norm, arguments, outputs, ALIGNMENT)


def add_norm(arguments: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """sum = residual + x and out = its norm; two copies more than the kernel alone."""
    run_add_norm(fused_add_rmsnorm, arguments, outputs, ALIGNMENT)


def _norm(x: Any, weight: Any, eps: float, out: Any) -> None:
    rmsnorm(x, weight, eps, out=out)


def rotate(arguments: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """out = rotate(x), by a cache [tokens, r] of cosines and sines that is built for the call.

    The kernel takes queries and keys of one position per row; half of the heads are handed over as each. It is the one
    behind `apply_rope_with_cos_sin_cache` and its in-place twin, which would cost a copy. It reads tables by vectors of
    which it may use half, so the cache has a row more than there are tokens.
    """
    x, out, cos, sin = aligned(arguments["x"], 16), outputs["out"], arguments["cos"], arguments["sin"]
    tokens, heads, d = x.shape[-3:]
    pairs, middle = cos.shape[-1], heads // 2
    cache = torch.empty(tokens + 1, 2 * pairs, dtype=torch.float32, device=x.device)
    cache[:tokens, :pairs].copy_(cos.reshape(tokens, pairs))
    cache[:tokens, pairs:].copy_(sin.reshape(tokens, pairs))
    positions = torch.arange(tokens, device=x.device).repeat(x.numel() // (tokens * heads * d))
    direct = out.is_contiguous() and out.data_ptr() % 16 == 0
    turned = out if direct else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, results = x.view(-1, heads, d), turned.view(-1, heads, d)
    apply_rope(
        q=rows[:, :middle],
        k=rows[:, middle:],
        q_rope=results[:, :middle],
        k_rope=results[:, middle:],
        cos_sin_cache=cache,
        pos_ids=positions,
        interleave=arguments["rotation"] == "interleaved",
    )
    if not direct:
        out.copy_(turned)
