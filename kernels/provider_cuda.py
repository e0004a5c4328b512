"""The CUDA kernels compiled at run time: norm_rope over heads of a power of two columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .registry import Constraint, Implementation
from .rope_support import rotated_columns, supports_rope, with_defaults

HEAD_DIMS = (64, 128, 256, 512, 1024)


def _call(arguments: Mapping[str, Any]) -> str | None:
    reason = supports_rope(arguments)
    return None if reason is None else reason.message


def _head_dim(arguments: Mapping[str, Any]) -> str | None:
    d = arguments["x"].shape[-1]
    return None if d in HEAD_DIMS else f"rows of {d} elements; the kernel is built for {_listed(HEAD_DIMS)}."


def _across(arguments: Mapping[str, Any]) -> str | None:
    across = with_defaults(arguments)["across"]
    return None if across is None else f"the norm is across dim {across} too; the kernel's is over the last dim only."


def _roundings(arguments: Mapping[str, Any]) -> str | None:
    flags = with_defaults(arguments)["roundings"]
    return None if flags == 0 else f"roundings is {flags}; the kernel rounds results only."


def _vectors(arguments: Mapping[str, Any]) -> str | None:
    arguments = with_defaults(arguments)
    d = arguments["x"].shape[-1]
    for name in ("weight", "bias"):
        tensor = arguments[name]
        if tensor is None:
            continue
        shape = tuple(tensor.shape)
        one = bool(shape) and all(statically_known_true(size == 1) for size in shape[:-1])
        if not (one and statically_known_true(shape[-1] == d) and statically_known_true(tensor.stride(-1) == 1)):
            strides = tuple(tensor.stride())
            return f"{name} of shape {shape} and strides {strides} is not one dense row of {d} elements."
    return None


def _tables(arguments: Mapping[str, Any]) -> str | None:
    arguments = with_defaults(arguments)
    if arguments["rotation"] == "none":
        return None
    if arguments["tables"] == "matrix":
        return "tables is 'matrix'; the kernel reads cosines and sines."
    given = {name: arguments[name] for name in ("cos", "sin") if arguments[name] is not None}
    for name, tensor in given.items():
        if tensor.dtype == torch.float64:
            return f"{name} has dtype {tensor.dtype}; the kernel reads float16, bfloat16 and float32 tables."
        if tensor.dtype != given["cos"].dtype:
            return (
                f"cos has dtype {given['cos'].dtype} but {name} {tensor.dtype}; the kernel reads tables of one dtype."
            )
        if not statically_known_true(tensor.stride(-1) == 1):
            return f"{name} has inner stride {tensor.stride(-1)}; the kernel reads dense tables."
    return None


def _rotated(arguments: Mapping[str, Any]) -> str | None:
    arguments = with_defaults(arguments)
    r, step = rotated_columns(arguments), 16 if arguments["rotation"] == "half" else 8
    if statically_known_true(r % step == 0):
        return None
    return f"{r} columns are rotated; with rotation {arguments['rotation']!r} the kernel takes a multiple of {step}."


def _listed(values: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, values[:-1]))} and {values[-1]}"


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation(
        "norm_rope",
        "cuda",
        (
            Constraint("call", "known row sizes, dense rows of x, at most three row dims after merging", _call),
            Constraint("head_dim", f"head_dim one of {_listed(HEAD_DIMS)}", _head_dim),
            Constraint("across", "norm over the last dim only", _across),
            Constraint("roundings", "no rounding of intermediates", _roundings),
            Constraint("weight", "weight and bias: one dense row [head_dim], or absent", _vectors),
            Constraint("tables", "tables half, full or complex, dense, of one dtype: fp16, bf16, fp32", _tables),
            Constraint("rotated", "rotated columns a multiple of 8 (interleaved) or 16 (half)", _rotated),
        ),
        "dkfuse.kernels.cuda_rope:run",
    ),
)
