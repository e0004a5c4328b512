"""Calls of norm_rope to test kernels with: random tables of each kind, and a call with its defaults."""

from __future__ import annotations

from typing import Any

import torch

from dkfuse.kernels.rope_support import TABLES, with_defaults

from .tensors import random


def tables(
    kind: str,
    r: int,
    *outer: int,
    dtype: torch.dtype = torch.float32,
    rotation: str = "interleaved",
    device: str = "cpu",
) -> dict[str, Any]:
    times, per = TABLES[kind]
    cos, sin = (random(*outer, r * times // per, dtype=dtype, seed=i, device=device) for i in (1, 2))
    return {"rotation": rotation, "tables": kind, "cos": cos, "sin": sin if kind in ("half", "full") else None}


def call_of(x: torch.Tensor, **more: Any) -> dict[str, Any]:
    return with_defaults({"x": x, "out_dtype": x.dtype, **more})
