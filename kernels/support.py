"""Which calls of the dkfuse ops the Triton kernels take: facts about dtypes, shapes, strides and devices only.

Works on fake tensors with symbolic sizes and never guards on a symbol: a fact that is not statically known counts as
not given. Imports neither triton nor a GPU library.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .axes import collapse, contiguous_strides
from .picks import first_rows, pick_problem
from .tables import TABLES, table_problem
from .unsupported import Unsupported

MAX_ROW = 16384
NORMS = ("layer", "rms")
BRANCH_NORMS = ("none", *NORMS)
ACTIVATIONS = (torch.float16, torch.bfloat16, torch.float32)

_BRANCHES = ("gate", "branch_bias", "branch_weight", "x2", "gate2")
# op -> (operands of x's full shape, operands that broadcast to it, outputs)
OPERANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "norm_modulate": (("x",), ("weight", "bias", "scale", "shift"), ("out",)),
    "residual_norm_modulate": (
        ("x", "residual"),
        (*_BRANCHES, "weight", "bias", "scale", "shift"),
        ("sum", "out"),
    ),
    "norm_modulate_dual": (("x",), ("weight", "bias", "scale", "shift", "scale2", "shift2"), ("out", "out2")),
    "residual_norm_modulate_dual": (
        ("x", "residual"),
        (*_BRANCHES, "weight", "bias", "scale", "shift", "scale2", "shift2"),
        ("sum", "out", "out2"),
    ),
    "gated_residual": (("x", "residual"), ("gate", "branch_bias"), ("out",)),
    "scale_shift": (("x",), ("scale", "shift"), ("out",)),
    "norm_rope": (("x",), ("weight", "bias", "cos", "sin"), ("out",)),  # cos and sin have a width of their own
}


def present(op: str, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The tensor operands of a call that are not None, as (name, tensor-like)."""
    full, broadcast, _ = OPERANDS[op]
    for name in (*full, *broadcast):
        if arguments.get(name) is not None:
            yield name, arguments[name]
    for name in ("pick", *TABLES):
        if arguments.get(name) is not None:
            yield name, arguments[name]


def broadcasts(shape: tuple[Any, ...], to: tuple[Any, ...]) -> bool:
    """True if it is statically known that `shape` right-broadcasts to `to` without enlarging it."""
    if len(shape) > len(to):
        return False
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return all(statically_known_true(a == b) or statically_known_true(a == 1) for a, b in pairs)


def supports(op: str, arguments: Mapping[str, Any]) -> Unsupported | None:
    """None if the Triton kernels take this call, else the first reason why not.

    Codes: "op", "dtype", "device", "rank", "row_too_long", "symbolic_row", "empty", "shape", "broadcast",
    "inner_stride", "outer_dims", "branch_norm", "limit", "second_branch", "pick", "table".
    `arguments` maps the op's argument names to tensor-likes (shape, dtype, device, stride()) or values.
    """
    if op not in OPERANDS:
        return Unsupported("op", f"dkfuse has no op {op!r}; known: {', '.join(OPERANDS)}.")
    if op == "norm_rope":
        from .rope_support import supports_rope

        return supports_rope(arguments)
    if (reason := pick_problem(arguments) or table_problem(arguments)) is not None:
        return reason
    arguments = first_rows(arguments)
    x = arguments["x"]
    for name, tensor in present(op, arguments):
        if tensor.dtype not in ACTIVATIONS and name != "pick":
            return Unsupported(
                "dtype", f"{name} has dtype {tensor.dtype}; the kernels read float16, bfloat16 and float32."
            )
        if tensor.device != x.device:
            return Unsupported("device", f"{name} is on {tensor.device} but x on {x.device}; move it to x's device.")
    for key in ("out_dtype", "sum_dtype"):
        dtype = arguments.get(key)
        if dtype is not None and dtype not in ACTIVATIONS:
            return Unsupported("dtype", f"{key} is {dtype}; the kernels write float16, bfloat16 and float32.")
    if x.dim() == 0:
        return Unsupported("rank", "x has no dims; the ops work on rows, give it at least one dim.")
    return branch_problem(arguments) or _row(x) or _shapes(op, arguments) or _outer_dims(op, arguments)


def has_branch_norm(arguments: Mapping[str, Any]) -> bool:
    """True if x is normalised before the gate (the sandwich norms)."""
    return arguments.get("branch_norm", "none") != "none"


def branch_problem(arguments: Mapping[str, Any]) -> Unsupported | None:
    """What is wrong with the arguments of a branch norm, a second branch or the limit; also the ops' own error."""
    norm = arguments.get("branch_norm", "none")
    if norm not in BRANCH_NORMS:
        return Unsupported("branch_norm", f"branch_norm is {norm!r}; use one of {', '.join(BRANCH_NORMS)}.")
    if norm == "none" and arguments.get("branch_weight") is not None:
        return Unsupported(
            "branch_norm", "branch_weight is given but branch_norm is 'none'; name its norm, 'layer' or 'rms'."
        )
    if not 0 <= arguments.get("limit", 0.0) < math.inf:
        return Unsupported("limit", f"limit is {arguments['limit']}; use a positive number, or 0 for none.")
    if arguments.get("gate2") is not None and arguments.get("x2") is None:
        return Unsupported("second_branch", "gate2 is given but x2 is not; name the branch that it is the gate of.")
    return None


def _row(x: Any) -> Unsupported | None:
    width = x.shape[-1]
    if not isinstance(width, int):
        return Unsupported(
            "symbolic_row", f"the last dim of x is the symbol {width}; kernels are built per width, mark it static."
        )
    if width > MAX_ROW:
        return Unsupported(
            "row_too_long", f"rows of {width} elements exceed {MAX_ROW}, the most that a program holds in registers."
        )
    if any(statically_known_true(size == 0) for size in x.shape):
        return Unsupported("empty", f"x has no elements (shape {tuple(x.shape)}); there is nothing to launch.")
    return None


def _shapes(op: str, arguments: Mapping[str, Any]) -> Unsupported | None:
    full = OPERANDS[op][0]
    x = arguments["x"]
    shape = tuple(x.shape)
    for name, tensor in present(op, arguments):
        if name in full:
            same = len(tensor.shape) == len(shape) and all(
                statically_known_true(a == b) for a, b in zip(tensor.shape, shape, strict=True)
            )
            if not same:
                return Unsupported(
                    "shape", f"{name} has shape {tuple(tensor.shape)} but x {shape}; they must be equal."
                )
        elif not broadcasts(tuple(tensor.shape), shape):
            return Unsupported(
                "broadcast", f"{name} of shape {tuple(tensor.shape)} does not broadcast to x of shape {shape}."
            )
        dense = not tensor.shape or tensor.shape[-1] == 1 or statically_known_true(tensor.stride(-1) == 1)
        if (name in full or name == "x2") and not dense:
            return Unsupported(
                "inner_stride", f"{name} has inner stride {tensor.stride(-1)}; rows must be dense (inner stride 1)."
            )
    return None


def _outer_dims(op: str, arguments: Mapping[str, Any]) -> Unsupported | None:
    """The outputs are contiguous when nobody asks for more; `plan` decides for other output layouts."""
    tensors = dict(present(op, arguments))
    shape = tuple(arguments["x"].shape)
    try:
        collapse(tensors, shape, extra={"out": contiguous_strides(shape)})
    except Unsupported as reason:
        return reason
    return None
