"""What sgl-kernel's and FlashInfer's RMS norms have in common: their contract as constraints, and how to meet it.

    rmsnorm              out = z * rsqrt(mean(z^2) + eps) * weight
    fused_add_rmsnorm    z = residual + x in place of the residual, and the same of z in place of x

in fp32, rounded once, on rows of fp16 or bf16 that lie 16-byte aligned one behind the other; the norm reads the sum as
it was before it was rounded. dkfuse's ops leave their operands alone, so the second costs two copies: as many bytes
again as the kernel itself moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .axes import contiguous_strides
from .registry import Constraint
from .tables import TABLES

MAX_WIDTH = 16384
PIECE = 2**31 - 1  # elements that one launch may address; some of these kernels count in 32 bits
OTHERS = ("bias", "gate", "scale", "shift", "pick", *TABLES, "branch_bias", "branch_weight", "x2", "gate2")

Norm = Callable[[Any, Any, float, Any], None]  # input, weight, eps, out
AddNorm = Callable[[Any, Any, Any, float], None]  # input, residual, weight, eps; both in place


def contiguous(tensor: Any) -> bool:
    """True if it is statically known; dims of size 1 may have any stride."""
    strides = contiguous_strides(tuple(tensor.shape))
    return all(
        statically_known_true(size == 1) or statically_known_true(tensor.stride(dim) == stride)
        for dim, (size, stride) in enumerate(zip(tensor.shape, strides, strict=True))
    )


def dtypes_problem(arguments: Mapping[str, Any]) -> str | None:
    dtype = arguments["x"].dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return f"x has dtype {dtype}; the kernel takes float16 and bfloat16."
    seen = {n: arguments[n].dtype for n in ("residual", "weight") if arguments.get(n) is not None}
    seen.update((n, arguments[n]) for n in ("out_dtype", "sum_dtype") if arguments.get(n) is not None)
    for name, other in seen.items():
        if other != dtype:
            return f"x has dtype {dtype} but {name} is {other}; the kernel works in one dtype."
    return None


def rows_problem(arguments: Mapping[str, Any]) -> str | None:
    for name in ("x", "residual"):
        tensor = arguments.get(name)
        if tensor is not None and not contiguous(tensor):
            return f"{name} of shape {tuple(tensor.shape)} has strides {tuple(tensor.stride())}; make it contiguous."
    width = arguments["x"].shape[-1] if arguments["x"].dim() else 0
    if not isinstance(width, int) or width == 0 or width % 8 or width > MAX_WIDTH:
        return f"rows of {width} elements; the kernel takes a known multiple of 8 up to {MAX_WIDTH}."
    return None


def _norm(arguments: Mapping[str, Any]) -> str | None:
    return None if arguments["norm"] == "rms" else f"norm is {arguments['norm']!r}; the kernel's is 'rms'."


def _weight(arguments: Mapping[str, Any]) -> str | None:
    weight, offset = arguments.get("weight"), arguments.get("weight_offset", 0.0)
    if weight is None:
        return "there is no weight; the kernel multiplies by one."
    if weight.dim() != 1 or not statically_known_true(weight.shape[0] == arguments["x"].shape[-1]):
        return f"weight has shape {tuple(weight.shape)} and x {tuple(arguments['x'].shape)}; the kernel's is one row."
    if not contiguous(weight):
        return f"weight has stride {weight.stride(0)}; the kernel reads a dense one."
    return None if offset == 0 else f"weight_offset is {offset}; the kernel multiplies by the weight itself."


def _nothing_else(arguments: Mapping[str, Any]) -> str | None:
    for name in OTHERS:
        if arguments.get(name) is not None:
            return f"{name} is given; the kernel has none."
    norm, roundings = arguments.get("branch_norm", "none"), arguments.get("roundings", 0)
    if arguments.get("limit"):
        return f"limit is {arguments['limit']}; the kernel has none."
    if norm != "none":
        return f"branch_norm is {norm!r}; the kernel has none."
    return None if roundings == 0 else f"roundings is {roundings}; the kernel rounds results only."


RMS_CONSTRAINTS = (
    Constraint("norm", "norm 'rms'", _norm),
    Constraint("dtype", "fp16 or bf16, one dtype for all operands and results", dtypes_problem),
    Constraint("rows", f"contiguous rows, D % 8 == 0, D <= {MAX_WIDTH}", rows_problem),
    Constraint("weight", "weight [D], weight_offset 0", _weight),
    Constraint(
        "nothing_else", "no bias, gate, scale, shift, pick, table, branch norm, limit or rounding", _nothing_else
    ),
)


def run_norm(norm: Norm, arguments: Mapping[str, Any], outputs: Mapping[str, Any], alignment: int) -> None:
    """norm_modulate by a kernel that writes its result elsewhere."""
    x, out = _flat(aligned(arguments["x"], alignment)), outputs["out"]
    weight, target = aligned(arguments["weight"], 16), _target(out, alignment)
    for part in _pieces(x):
        norm(x[part], weight, arguments["eps"], target[part])
    _give(target, out)


def run_add_norm(norm: AddNorm, arguments: Mapping[str, Any], outputs: Mapping[str, Any], alignment: int) -> None:
    """residual_norm_modulate by a kernel that works in place, on copies."""
    out, total = outputs["out"], outputs.get("sum")
    weight, target = aligned(arguments["weight"], 16), _target(out, alignment)
    summed = torch.empty_like(target) if total is None else _target(total, alignment)
    target.copy_(_flat(arguments["x"]))
    summed.copy_(_flat(arguments["residual"]))
    for part in _pieces(target):
        norm(target[part], summed[part], weight, arguments["eps"])
    _give(target, out)
    if total is not None:
        _give(summed, total)


def aligned(tensor: Any, alignment: int) -> Any:
    """The tensor, or a copy where it does not start on a multiple of `alignment` bytes, as a view may."""
    return tensor if tensor.data_ptr() % alignment == 0 else tensor.clone()


def _flat(tensor: Any) -> Any:
    return tensor.reshape(-1, tensor.shape[-1])


def _target(out: Any, alignment: int) -> Any:
    """Rows to write: those of `out`, or new ones where a kernel cannot write these."""
    if out.is_contiguous() and out.data_ptr() % alignment == 0:
        return out.view(-1, out.shape[-1])
    return torch.empty(out.numel() // out.shape[-1], out.shape[-1], dtype=out.dtype, device=out.device)


def _give(target: Any, out: Any) -> None:
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view(out.shape))


def _pieces(rows: Any) -> Iterator[slice]:
    step = max(1, PIECE // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)
