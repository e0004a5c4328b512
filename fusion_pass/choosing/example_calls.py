"""A call of an op as models make it, from the shape of x: tensors without memory, for asking who would run it."""

from __future__ import annotations

from typing import Any

import torch

from dkfuse.kernels.failures import defaults
from dkfuse.kernels.rope_support import TABLES
from dkfuse.kernels.support import OPERANDS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NORMS = ("layer", "rms", "none")
ROTATIONS = ("interleaved", "half", "none")


def parse_shape(text: str) -> tuple[int, ...]:
    """(1, 4096, 3072) of "1x4096x3072". ValueError for anything else."""
    parts = text.lower().replace("×", "x").split("x")
    if not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--shape {text} is not a shape: give sizes with x between them, like 1x4096x3072")
    return tuple(map(int, parts))


def example(
    op: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    norm: str | None = None,
    rotation: str | None = None,
    tables: str = "half",
) -> dict[str, Any]:
    """Arguments of `op` for x of `shape` and `dtype`, dense.

    The adaLN ops get a gate, scale and shift of one row per batch entry; norm_rope, for x [..., tokens, heads, d], a
    weight for its norm and fp32 tables of one row per token. norm: by default "layer", of queries and keys "rms".
    """
    arguments = dict(defaults(op))
    norm = norm or ("rms" if op == "norm_rope" else "layer")
    arguments.update(x=_empty(shape, dtype), out_dtype=dtype)
    if "norm" in arguments:
        arguments.update(norm=norm, eps=1e-6 if norm != "none" else 0.0)
        if norm == "rms":
            arguments["weight"] = _empty(shape[-1:], dtype)
    if op == "norm_rope":
        arguments.update(_rotation(shape, rotation or "interleaved", tables))
        return arguments
    row = (shape[0], *(1 for _ in shape[1:-1]), shape[-1]) if len(shape) > 2 else shape[-1:]
    for name in OPERANDS[op][1]:
        if name in ("gate", "scale", "shift", "scale2", "shift2"):
            arguments[name] = _empty(row, dtype)
    if "residual" in arguments:
        arguments["residual"] = _empty(shape, dtype)
    if "sum_dtype" in arguments:
        arguments["sum_dtype"] = dtype
    return arguments


def _rotation(shape: tuple[int, ...], rotation: str, tables: str) -> dict[str, Any]:
    if rotation == "none":
        return {"rotation": "none"}
    times, per = TABLES[tables]
    width = shape[-1] * times // per
    table = _empty((*shape[-3:-2], *(1 for _ in shape[-2:-1]), width), torch.float32)
    return {"rotation": rotation, "tables": tables, "cos": table, "sin": table if tables in ("half", "full") else None}


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
