"""FlashInfer's RMS norms and its rotation from a table of cosines and sines. Tested: 0.6.

Its rotation is of queries and keys at once, from one table [tokens, r] of cosines and sines; norm_rope has one tensor
and two tables, so that a call also builds a table and positions.

Not offered are its `diffusion_ops`, the fused layer norms for rows of 3072: release 0.6.14 reads the optional biases of
gate, scale and shift also where they are not given (a null pointer), and computes the variance as mean(z^2) -
mean(z)^2, which is less accurate than eager where a row's mean is large.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .peer_norms import RMS_CONSTRAINTS, contiguous, dtypes_problem
from .registry import Constraint, Implementation
from .rope_support import rotated_columns, supports_rope, with_defaults

HEAD_DIMS = (64, 128, 256, 512)  # of its rotation kernel; others go to another one
STEP = 32  # columns: whole vectors in each half


def _call(arguments: Mapping[str, Any]) -> str | None:
    reason = supports_rope(arguments)
    return None if reason is None else reason.message


def _rotation_alone(arguments: Mapping[str, Any]) -> str | None:
    arguments = with_defaults(arguments)
    if arguments["norm"] != "none":
        return f"norm is {arguments['norm']!r}; the kernel only rotates."
    for name in ("weight", "bias"):
        if arguments[name] is not None:
            return f"{name} is given; the kernel only rotates."
    if arguments["rotation"] == "none":
        return "rotation is 'none'; the kernel only rotates."
    roundings = arguments["roundings"]
    return None if roundings == 0 else f"roundings is {roundings}; the kernel rounds results only."


def _heads(arguments: Mapping[str, Any]) -> str | None:
    x = arguments["x"]
    shape = tuple(x.shape)
    if x.dim() < 3 or not contiguous(x):
        return f"x of shape {shape} and strides {tuple(x.stride())} is not contiguous [..., tokens, heads, head_dim]."
    if not isinstance(shape[-2], int) or shape[-2] < 2:
        return f"x has {shape[-2]} heads; the kernel rotates two tensors, which needs two heads or more."
    if shape[-1] not in HEAD_DIMS:
        return f"rows of {shape[-1]} elements; the kernel is built for {', '.join(map(str, HEAD_DIMS))}."
    return None


def _tables(arguments: Mapping[str, Any]) -> str | None:
    arguments = with_defaults(arguments)
    if arguments["tables"] != "half":
        return f"tables is {arguments['tables']!r}; the kernel reads 'half' tables."
    x, r = arguments["x"], rotated_columns(arguments)
    if not statically_known_true(r % STEP == 0):
        return f"{r} columns are rotated; the kernel takes a multiple of {STEP}."
    for name in ("cos", "sin"):
        table = arguments[name]
        shape = tuple(table.shape)
        if table.dtype != torch.float32:
            return f"{name} has dtype {table.dtype}; the kernel reads float32 tables."
        ones = (*shape[:-3], shape[-2]) if len(shape) >= 3 else (0,)
        if not all(statically_known_true(size == 1) for size in ones) or not statically_known_true(
            shape[-3] == x.shape[-3]
        ):
            return f"{name} has shape {shape}; the kernel's is [tokens, 1, pairs], the same for all heads and batches."
    return None


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("norm_modulate", "flashinfer", RMS_CONSTRAINTS, "dkfuse.kernels.peer_flashinfer:norm"),
    Implementation("residual_norm_modulate", "flashinfer", RMS_CONSTRAINTS, "dkfuse.kernels.peer_flashinfer:add_norm"),
    Implementation(
        "norm_rope",
        "flashinfer",
        (
            Constraint("call", "a call that the Triton kernel takes", _call),
            Constraint("rotation_alone", "a rotation without norm, weight, bias or rounding", _rotation_alone),
            Constraint("dtype", "fp16 or bf16, the result of x's dtype", dtypes_problem),
            Constraint("heads", "x contiguous [..., tokens, heads >= 2, head_dim 64, 128, 256 or 512]", _heads),
            Constraint("tables", f"fp32 half tables [tokens, 1, r/2], r % {STEP} == 0", _tables),
        ),
        "dkfuse.kernels.peer_flashinfer:rotate",
    ),
)
