"""Calls of norm_rope without memory, and their launch plans."""

from __future__ import annotations

from typing import Any

import torch

from dkfuse.kernels.launch import Launch, plan

BF16, FP32 = torch.bfloat16, torch.float32


def meta(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def rope_call(x: Any, *outer: int, **more: Any) -> dict[str, Any]:
    """RMS norm with a weight and an interleaved rotation by half tables of these outer dims."""
    pairs = x.shape[-1] // 2
    tables = {"cos": meta(*outer, pairs, dtype=FP32), "sin": meta(*outer, pairs, dtype=FP32)}
    norm = {"norm": "rms", "eps": 1e-6, "weight": meta(x.shape[-1])}
    return {"x": x, **norm, **tables, "rotation": "interleaved", "out_dtype": BF16, **more}


def planned(arguments: dict[str, Any], out: Any = None, **more: Any) -> Launch:
    x = arguments["x"]
    out = torch.empty(x.shape, dtype=BF16, device=x.device) if out is None else out
    return plan("norm_rope", arguments, {"out": out}, sm_count=132, **more)
