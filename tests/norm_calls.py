"""Calls of the norm ops with every operand, and results by name."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dkfuse.kernels.support import OPERANDS

from .tensors import random

SHAPE = (2, 5, 96)


def arguments_of(
    op: str, dtype: torch.dtype = torch.bfloat16, parameters: torch.dtype = torch.float32, **more: Any
) -> dict[str, Any]:
    """A call of `op` with every operand, gate, scale and shift as chunks of one modulation vector."""
    full, broadcast, outputs = OPERANDS[op]
    vectors = random(2, 1, 6 * SHAPE[-1], dtype=parameters).chunk(6, dim=-1)
    slices = {"gate": 0, "scale": 1, "shift": 2, "scale2": 3, "shift2": 4, "gate2": 5}
    arguments: dict[str, Any] = {name: random(*SHAPE, dtype=dtype, seed=i) for i, name in enumerate(full)}
    for name in broadcast:
        arguments[name] = vectors[slices[name]] if name in slices else random(96, dtype=parameters, seed=len(name))
    if "x2" in broadcast:
        arguments["x2"] = random(*SHAPE, dtype=dtype, seed=9)
    if "weight" in broadcast:
        arguments.update(norm="layer", eps=1e-6, weight_offset=0.0)
    if "branch_weight" in broadcast:
        arguments.update(branch_norm="rms", branch_eps=1e-5, branch_weight_offset=0.0, factor2=1.0, limit=0.0)
    if "scale" in broadcast:
        arguments["scale_offset"] = 1.0
    if "sum" in outputs:
        arguments["sum_dtype"] = dtype
    return {**arguments, "out_dtype": dtype, "roundings": 0, **more}


def by_name(op: str, results: torch.Tensor | tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """What an op returned, by the names of its outputs."""
    return dict(zip(OPERANDS[op][2], results if isinstance(results, tuple) else (results,), strict=True))


def norm32(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The fp32 normalised row as PyTorch's own kernels give it, before eager rounds it."""
    x = x.float()
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
