"""Calls of the norm ops without memory, and their launch plans."""

from __future__ import annotations

from typing import Any

import torch

from dkfuse.kernels.launch import Launch, plan

BF16 = torch.bfloat16


def meta(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def norm_call(x: torch.Tensor, **operands: Any) -> dict[str, Any]:
    return {"x": x, "norm": "layer", "eps": 1e-6, "out_dtype": BF16, **operands}


def planned(arguments: dict[str, Any], op: str = "norm_modulate", **more: Any) -> Launch:
    x = arguments["x"]
    out = more.pop("out", None)
    outputs = {"out": out if out is not None else torch.empty(x.shape, dtype=BF16, device=x.device)}
    if "residual" in arguments:
        outputs["sum"] = torch.empty(x.shape, dtype=BF16, device=x.device)
    return plan(op, arguments, outputs, sm_count=132, **more)


def branch_call(x: torch.Tensor, **operands: Any) -> dict[str, Any]:
    width = x.shape[-1]
    more = {"residual": x, "gate": meta(1, 1, width), "branch_weight": meta(width), "weight": meta(width)}
    more.update(scale=meta(1, 1, width), norm="rms", branch_norm="rms", branch_eps=1e-5, sum_dtype=BF16)
    return norm_call(x, **{**more, **operands})
